"""What a root holds, as values that can be compared."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

STATE = ".bisync"
STORE = "rsync-rollback"
TEMPORARY = ".bisync-"  # the engine's own names inside a tree begin so; none stays after a run


@dataclass(frozen=True, slots=True)
class Content:
    """What a user can put at a name: the bytes of a file, or where a symbolic link points."""

    kind: str  # "file" or "link"
    value: str  # SHA-256 of the bytes, or the target

    @property
    def is_empty(self) -> bool:
        return self == EMPTY


EMPTY = Content("file", hashlib.sha256(b"").hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """All that two agreeing replicas must have in common at one path."""

    kind: str
    content: str  # as in Content; "" for a directory
    size: int
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[str, ...]  # all paths of the same object, sorted: the hard-link group


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (path relative to the root, lstat) of the user's tree: no state, no store, no root."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for name in sorted(os.listdir(root / folder)):
            if folder == "" and name in {STATE, STORE}:
                continue
            path = f"{folder}/{name}" if folder else name
            info = os.lstat(root / path)
            yield path, info
            if stat.S_ISDIR(info.st_mode):
                waiting.append(path)


def content_at(path: Path, info: os.stat_result) -> Content | None:
    """Return the content at a path; `None` for directories and special files."""
    if stat.S_ISLNK(info.st_mode):
        return Content("link", os.readlink(path))
    if stat.S_ISREG(info.st_mode):
        return Content("file", hashlib.sha256(path.read_bytes()).hexdigest())
    return None


def contents(root: Path) -> dict[Content, list[str]]:
    """Map each content live in the user's tree to its paths; the engine's temporaries left out."""
    found: dict[Content, list[str]] = {}
    for path, info in walk(root):
        if is_temporary(path):
            continue
        content = content_at(root / path, info)
        if content is not None:
            found.setdefault(content, []).append(path)
    return found


def kept(root: Path) -> set[Content]:
    """Return every content that the root's store keeps."""
    found: set[Content] = set()
    for folder, folders, names in os.walk(root / STORE):
        for name in folders + names:
            path = Path(folder, name)
            content = content_at(path, path.lstat())
            if content is not None:
                found.add(content)
    return found


def reverse_deltas(root: Path) -> list[bytes]:
    """Return the bytes of each kept version that is stored as a reverse delta."""
    return [path.read_bytes() for path in sorted((root / STORE).rglob("*.bisync-delta"))]


def is_temporary(path: str) -> bool:
    return any(part.startswith(TEMPORARY) for part in path.split("/"))


def snapshot(root: Path) -> dict[str, Entry]:
    """Return every path of the user's tree with all its attributes."""
    found = list(walk(root))
    groups: dict[tuple[int, int], list[str]] = {}
    for path, info in found:
        if not stat.S_ISDIR(info.st_mode):
            groups.setdefault((info.st_dev, info.st_ino), []).append(path)
    entries = {}
    for path, info in found:
        content = content_at(root / path, info)
        names = groups.get((info.st_dev, info.st_ino), [path])
        entries[path] = Entry(
            kind=_KINDS.get(stat.S_IFMT(info.st_mode), "special"),
            content="" if content is None else content.value,
            size=info.st_size if stat.S_ISREG(info.st_mode) else 0,
            mode=stat.S_IMODE(info.st_mode),
            owner=(info.st_uid, info.st_gid),
            mtime_ns=info.st_mtime_ns,
            xattrs=_xattrs(root / path),
            names=tuple(sorted(names)),
        )
    return entries


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


def _xattrs(path: Path) -> tuple[tuple[str, bytes], ...]:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError:  # the file system has none
        return ()
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def differences(alpha: dict[str, Entry], beta: dict[str, Entry]) -> list[str]:
    """Say in words where two snapshots differ; nothing if they agree."""
    found = []
    for path in sorted(alpha.keys() | beta.keys()):
        left, right = alpha.get(path), beta.get(path)
        if left is None or right is None:
            there, entry = ("beta", right) if left is None else ("alpha", left)
            assert entry is not None
            found.append(f"{path!r}: a {entry.kind}, only at {there}")
            continue
        for field in fields(Entry):
            here, other = getattr(left, field.name), getattr(right, field.name)
            if here != other:
                found.append(f"{path!r}: {field.name} {_short(here)} != {_short(other)}")
    return found


def resting_state(root: Path) -> dict[str, tuple[int, ...]]:
    """Return what any write in the user's tree would change: identity, times, links, size."""
    return {
        path: (info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink, info.st_size)
        for path, info in walk(root)
    }


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
