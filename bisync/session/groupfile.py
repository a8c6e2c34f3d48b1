"""Groups as a file says them: a TOML table ``[[group]]`` for each declared directory."""

import os
from typing import Any

from bisync.core.declared import Declared, Hooks, postgresql
from bisync.errors import UsageError
from bisync.session.tomlfile import meant, read_toml

_KINDS = ("files", "postgresql")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "directory": str,
    "kind": str,
    "stamp": str,
    "last": str,
    "exclude": list,
    "freeze": str,
    "thaw": str,
    "read-from": str,
    "limit": (int, float),
    "root": str,
}


def read_groups(path: str) -> tuple[Declared, ...]:
    """The groups of a file.

    Raises:
        UsageError: it cannot be read, or says something that is not understood.
    """
    tables = read_toml(path)
    try:
        for key in tables.keys() - {"group"}:
            raise UsageError(f"{key} is not known; groups are tables: [[group]]")
        return groups_from(tables.get("group", []))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def groups_from(tables: object) -> tuple[Declared, ...]:
    """The groups that tables of a configuration declare.

    Raises:
        UsageError: something in them is not understood.
    """
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError("groups are tables: [[group]]")
    return tuple(map(_group, tables))


def _group(table: dict[str, Any]) -> Declared:
    for key, value in table.items():
        if key not in _KEYS:
            raise UsageError(f"{key} is not known{meant(key, _KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise UsageError(f"{key} = {value!r} is not understood")
    if "directory" not in table:
        raise UsageError("a group needs its directory")
    directory = os.fsencode(table["directory"].strip("/"))
    left_out = tuple(table.get("exclude", ()))
    if not all(isinstance(pattern, str) and pattern for pattern in left_out):
        raise UsageError(f"exclude = {table['exclude']!r} is not understood")
    kind = table.get("kind", "files")
    if kind not in _KINDS:
        raise UsageError(f"kind = {kind!r}: give {' or '.join(_KINDS)}")
    if kind == "postgresql":
        if "stamp" in table or "last" in table:
            raise UsageError("a postgresql group has its own stamp and order")
        return postgresql(directory, left_out, _hooks(table))
    stamp, last = (_path(table.get(key)) for key in ("stamp", "last"))
    return Declared(directory, stamp, last, left_out, _hooks(table))


def _hooks(table: dict[str, Any]) -> Hooks | None:
    if not table.keys() & {"freeze", "thaw", "read-from", "limit", "root"}:
        return None
    return Hooks(
        table.get("freeze", ""),
        table.get("thaw", ""),
        os.fsencode(table["read-from"]) if "read-from" in table else None,
        float(table.get("limit", 30.0)),
        os.fsencode(table["root"].rstrip("/") or "/") if "root" in table else None,
    )


def _path(text: str | None) -> bytes | None:
    return os.fsencode(text.strip("/")) if text else None
