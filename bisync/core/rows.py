"""Values as plain text for databases and logs: JSON with bytes as Latin-1 strings.

One byte is one character, so a row can be read by a person and by any JSON library.
"""

import json
from typing import Any

from bisync.core.node import ACL_NAMES, Attributes, Content, Kind, Place, XAttrs
from bisync.core.path import valid_name
from bisync.core.plan import Update


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _pairs(values: XAttrs) -> list[list[str]]:
    return [[_text(name), _text(value)] for name, value in values]


def _xattrs(values: Any) -> XAttrs:
    return tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in values)


def xattrs_to_text(xattrs: XAttrs, acl: XAttrs) -> str | None:
    """Extended attributes and ACLs of a node, ``None`` where there are none."""
    if not xattrs and not acl:
        return None
    return json.dumps([_pairs(xattrs), _pairs(acl)], separators=(",", ":"))


def xattrs_from_text(text: str | None) -> tuple[XAttrs, XAttrs]:
    """Undo :func:`xattrs_to_text`."""
    if text is None:
        return (), ()
    xattrs, acl = json.loads(text)
    return _xattrs(xattrs), _xattrs(acl)


def attributes_to_list(a: Attributes | None) -> list[Any] | None:
    """Attributes as a list for JSON."""
    if a is None:
        return None
    out: list[Any] = [a.mode, a.uid, a.gid, a.mtime_ns]
    if a.xattrs or a.acl:
        out += [_pairs(a.xattrs), _pairs(a.acl)]
    return out


def attributes_from_list(row: Any) -> Attributes | None:
    """Undo :func:`attributes_to_list`."""
    if row is None:
        return None
    mode, uid, gid, mtime_ns, *more = row
    xattrs, acl = map(_xattrs, more) if more else ((), ())
    return Attributes(mode, uid, gid, mtime_ns, xattrs, acl)


def attributes_from_text(text: str | None) -> Attributes | None:
    """Undo :func:`attributes_to_list` as JSON text."""
    return None if text is None else attributes_from_list(json.loads(text))


def content_to_list(content: Content | None) -> list[Any] | None:
    """Content as a list for JSON."""
    if content is None:
        return None
    digest = None if content.digest is None else content.digest.hex()
    return [int(content.kind), content.size, digest, _text(content.target), content.rdev]


def content_from_list(row: Any) -> Content | None:
    """Undo :func:`content_to_list`."""
    if row is None:
        return None
    kind, size, digest, target, rdev = row
    known = None if digest is None else bytes.fromhex(digest)
    return Content(Kind(kind), size, known, target.encode("latin-1"), rdev)


def places_to_list(places: frozenset[Place]) -> list[list[Any]]:
    """Names as a list for JSON."""
    return [[parent, _text(name)] for parent, name in sorted(places)]


def places_from_list(rows: Any) -> frozenset[Place]:
    """Undo :func:`places_to_list`."""
    return frozenset((parent, name.encode("latin-1")) for parent, name in rows)


def update_to_list(update: Update, versions: tuple[int, int]) -> list[Any]:
    """One row of a commit of the archive."""
    return [
        update.key,
        places_to_list(update.names),
        content_to_list(update.content),
        list(update.ids),
        [attributes_to_list(a) for a in update.attributes],
        list(versions),
        int(update.presumed),
    ]


def update_from_list(row: Any) -> tuple[Update, tuple[int, int]]:
    """Undo :func:`update_to_list`."""
    key, names, content, ids, attributes, versions, presumed = row
    update = Update(
        key=key,
        names=places_from_list(names),
        content=content_from_list(content),
        ids=(ids[0], ids[1]),
        attributes=(attributes_from_list(attributes[0]), attributes_from_list(attributes[1])),
        presumed=bool(presumed),
    )
    return update, (versions[0], versions[1])


def check_rows(rows: Any) -> list[list[Any]]:
    """Rows of a commit that somebody else made: each has to be what :func:`update_to_list` makes.

    Raises:
        ValueError: one is not.
    """
    _due(type(rows) is list)
    for row in rows:
        _due(type(row) is list and len(row) == 7)
        key, names, content, ids, attributes, versions, presumed = row
        _due(_is_number(key) and type(names) is list and type(ids) is list and len(ids) == 2)
        for place in names:
            _due(type(place) is list and len(place) == 2 and _is_number(place[0]))
            _due(valid_name(_bytes(place[1])))
        if content is not None:
            _check_content(content)
        _due(all(each is None or _is_number(each) for each in ids))
        _due(type(attributes) is list and len(attributes) == 2)
        for each in attributes:
            if each is not None:
                _check_attributes(each)
        _due(type(versions) is list and len(versions) == 2)
        _due(all(type(v) is int and -1 <= v < _MOST for v in versions))
        _due(type(presumed) is int and presumed in (0, 1))
    return rows  # type: ignore[no-any-return]


_MOST = 2**62
_LONGEST_TARGET = 4096


def _due(fits: bool) -> None:
    if not fits:
        raise ValueError("a row that nobody writes")


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _bytes(text: Any) -> bytes:
    _due(type(text) is str)
    return bytes(text, "latin-1")  # or a UnicodeEncodeError, which is a ValueError


def _check_content(row: Any) -> None:
    _due(type(row) is list and len(row) == 5)
    kind, size, digest, target, rdev = row
    Kind(kind if type(kind) is int else 0)
    _due(_is_number(size) and _is_number(rdev) and len(_bytes(target)) <= _LONGEST_TARGET)
    _due("\0" not in target)
    if digest is not None:
        _due(type(digest) is str and bytes.fromhex(digest).hex() == digest and len(digest) == 64)


def _check_attributes(row: Any) -> None:
    _due(type(row) is list and len(row) in (4, 6))
    mode, uid, gid, mtime_ns, *more = row
    _due(type(mode) is int and 0 <= mode <= 0o7777 and type(mtime_ns) is int)
    _due(abs(mtime_ns) < 2**64 * 10**9)
    _due(all(type(each) is int and 0 <= each < 2**32 for each in (uid, gid)))
    for pairs in more:
        _due(type(pairs) is list)
        for pair in pairs:
            _due(type(pair) is list and len(pair) == 2)
            name, value = map(_bytes, pair)
            _due(0 < len(name) <= 255 and b"\0" not in name and len(value) <= 1 << 16)
    if more:
        _due(bool(more[0] or more[1]))
        _due(all(pair[0] in _ACLS for pair in more[1]))


_ACLS = tuple(name.decode() for name in ACL_NAMES)
