"""The daemon's configuration: TOML, whose keys are the options of ``bisync watch``.

[defaults]
keep = "30d"

[session.books]
alpha = "/srv/books"
beta = "nas:/srv/books"
exclude = ["*.tmp", "cache/"]
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

from bisync.errors import UsageError
from bisync.session.tomlfile import meant, read_toml

_PLACES = ("alpha", "beta")
_NOT_HERE = {"help", "json", "progress", "stats", "name"}  # the daemon's own business


def default_path() -> str:
    """Where the configuration is, if nobody says."""
    if os.geteuid() == 0:
        return "/etc/bisync/config.toml"
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/bisync/config.toml"


def read(path: str, parser: argparse.ArgumentParser) -> dict[str, argparse.Namespace]:
    """The sessions of a file, each as the options of ``bisync watch``.

    Raises:
        UsageError: it cannot be read or understood; says where, and what was probably meant.
    """
    found = read_toml(path)
    _known(path, "", found, {"defaults", "session"})
    actions = _actions(parser)
    defaults = _table(path, "defaults", found.get("defaults", {}))
    _known(path, "[defaults] ", defaults, set(actions))
    sessions = _table(path, "session", found.get("session", {}))
    if not sessions:
        raise UsageError(f"{path}: it has no session; write [session.NAME] with alpha and beta")
    return {
        name: _options(f"{path}: [session.{name}]", {**defaults, **_table(path, name, table)},
                       actions, parser)
        for name, table in sessions.items()
    }  # fmt: skip


def _table(path: str, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {name} has to be a table")
    return value


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What ``watch`` takes, by the names of its long options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            watch = action.choices["watch"]
    names = {
        option.removeprefix("--"): each
        for each in watch._actions
        for option in each.option_strings
        if option.startswith("--")
    }
    return {name: each for name, each in names.items() if name not in _NOT_HERE}


def _known(path: str, where: str, table: dict[str, Any], names: set[str]) -> None:
    for key in table:
        if key not in names:
            hint = meant(key, names)
            raise UsageError(f"{path}: {where}{key}: there is no such key{hint}")


def _options(
    where: str,
    table: dict[str, Any],
    actions: dict[str, argparse.Action],
    parser: argparse.ArgumentParser,
) -> argparse.Namespace:
    _known(where, "", table, {*actions, *_PLACES})
    places = []
    for side in _PLACES:
        if not isinstance(table.get(side), str):
            raise UsageError(f"{where} {side}: say where that side is")
        places.append(table[side])
    words = [
        word
        for key, value in table.items()
        if key not in _PLACES
        for word in _words(f"{where} {key}", key, value, actions[key])
    ]
    try:
        return parser.parse_args(["watch", *words, "--", *places])
    except UsageError as error:
        raise UsageError(f"{where} {error}") from error


def _words(where: str, key: str, value: object, action: argparse.Action) -> Iterator[str]:
    """A key as words of the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: write true or false")
        if value:
            yield f"--{key}"
        return
    several = not isinstance(action, argparse._StoreAction)
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not several:
        raise UsageError(f"{where}: one value, not a list")
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise UsageError(f"{where}: write text or a number")
        yield f"--{key}={each}"
