"""What a person does with a rollback store: look, prune, lock, unlock, merge another one in."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bisync.core.path import TEMP_PREFIX, display, numbered
from bisync.errors import PathError
from bisync.fs.content import read_version
from bisync.fs.copying import copy_object, remove_object
from bisync.fs.root import OPEN_DIR
from bisync.fs.store import Store
from bisync.linux.filesystem import APPEND_ONLY, IMMUTABLE, change_flags, get_flags
from bisync.linux.rename import rename_noreplace

_MANIFEST = b".manifest"
_WRITE = 0o222


@dataclass(slots=True)
class Day:
    """One day of a store, as it lies there."""

    name: bytes
    entries: int = 0
    size: int = 0  # bytes of files
    unknown: int = 0  # entries that no manifest tells of: filled by another program
    locked: bool = False


@dataclass(slots=True)
class Done:
    """What a change of the store came to."""

    entries: int = 0
    size: int = 0  # bytes of files
    renamed: int = 0  # merged under a number, because the name had other bytes
    skipped: int = 0  # there already
    refused: list[tuple[bytes, str]] = field(default_factory=list)
    weaker: bool = False  # by permission bits, because flags are not to be had


def days(store: Store) -> list[Day]:
    """All days, the oldest first."""
    if not store.exists():
        return []
    known = {version.kept for version in store.versions()}
    whole = {version.kept for version in store.versions() if version.kind == "dir"}
    found = []
    top = store.folder_to_read()
    try:
        for name in store.days():
            day = Day(name)
            fd = os.open(name, OPEN_DIR, dir_fd=top)
            try:
                day.locked = _is_locked(fd)
                for path, info in _walk(fd, name):
                    if stat.S_ISDIR(info.st_mode):
                        continue
                    day.entries += 1
                    day.size += info.st_size if stat.S_ISREG(info.st_mode) else 0
                    day.unknown += path not in known and not _is_inside(path, whole)
            finally:
                os.close(fd)
            found.append(day)
    finally:
        os.close(top)
    return found


def prune(store: Store, chosen: Callable[[bytes], bool]) -> Done:
    """Remove whole days; a locked one refuses. Said in the manifest."""
    done = Done()
    for day in days(store):
        if not chosen(day.name):
            continue
        if day.locked:
            done.refused.append((day.name, "locked; 'bisync rollback unlock' first"))
            continue
        top = store.folder_to_read()
        try:
            _, size = remove_object(top, day.name)
            os.fsync(top)
        except OSError as error:
            done.refused.append((day.name, error.strerror or str(error)))
            continue
        finally:
            os.close(top)
        done.entries += day.entries
        done.size += size
        store.note({"dropped": day.entries, "bytes": size, "day": display(day.name)})
    store.flush()
    return done


def lock(store: Store, *, on: bool) -> Done:
    """Make past days immutable and today append-only, or undo that."""
    done = Done()
    today = time.strftime("%Y-%m-%d").encode()
    top = store.folder()
    try:
        for name in [*store.days(), _MANIFEST]:
            grows = name in (today, _MANIFEST)
            fd = os.open(name, OPEN_DIR, dir_fd=top)
            try:
                _lock_tree(fd, done, on=on, flag=APPEND_ONLY if grows else IMMUTABLE)
            finally:
                os.close(fd)
    finally:
        os.close(top)
    return done


def _lock_tree(fd: int, done: Done, *, on: bool, flag: int) -> None:
    """A directory and all below it; what is in a directory first when locking, last otherwise."""
    if not on:
        _lock_one(fd, done, on=on, flag=flag)
    for name in map(os.fsencode, os.listdir(fd)):
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            below = os.open(name, OPEN_DIR, dir_fd=fd)
            try:
                _lock_tree(below, done, on=on, flag=flag)
            finally:
                os.close(below)
        elif stat.S_ISREG(info.st_mode):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=fd)
            try:
                kept = IMMUTABLE if flag == APPEND_ONLY and not name.endswith(b".jsonl") else flag
                _lock_one(file, done, on=on, flag=kept)
            finally:
                os.close(file)
    if on:
        _lock_one(fd, done, on=on, flag=flag)


def _lock_one(fd: int, done: Done, *, on: bool, flag: int) -> None:
    done.entries += 1
    both = IMMUTABLE | APPEND_ONLY
    if change_flags(fd, add=flag if on else 0, remove=both if not on else both & ~flag):
        return
    done.weaker = True
    if flag == APPEND_ONLY:
        return  # permission bits cannot say that something may only grow
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    is_dir = stat.S_ISDIR(os.fstat(fd).st_mode)
    os.fchmod(fd, mode & ~_WRITE if on else mode | (0o700 if is_dir else 0o200))


def _is_locked(fd: int) -> bool:
    flags = get_flags(fd) or 0
    return bool(flags & (IMMUTABLE | APPEND_ONLY)) or not os.fstat(fd).st_mode & _WRITE


def _walk(fd: int, prefix: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    for name in sorted(map(os.fsencode, os.listdir(fd))):
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        path = prefix + b"/" + name
        yield path, info
        if stat.S_ISDIR(info.st_mode):
            below = os.open(name, OPEN_DIR, dir_fd=fd)
            try:
                yield from _walk(below, path)
            finally:
                os.close(below)


def _is_inside(path: bytes, whole: set[bytes]) -> bool:
    at = len(path)
    while (at := path.rfind(b"/", 0, at)) > 0:
        if path[:at] in whole:
            return True
    return False


# -- merging ---------------------------------------------------------------


def merge(store: Store, other_fd: int, takes: Callable[[bytes, os.stat_result], bool]) -> Done:
    """Bring what another store has and this one lacks; nothing here is replaced or removed.

    Args:
        other_fd: the other store's folder.
        takes: whether an entry (path below the store) is wanted.
    """
    done = Done()
    top = store.folder()
    try:
        _merge_folder(store, other_fd, top, b"", done, takes)
        os.fsync(top)
        store.flush()
    finally:
        os.close(top)
    return done


def _merge_folder(
    store: Store,
    source: int,
    target: int,
    prefix: bytes,
    done: Done,
    takes: Callable[[bytes, os.stat_result], bool],
) -> None:
    for name in sorted(map(os.fsencode, os.listdir(source))):
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        path = prefix + name
        if name.startswith(TEMP_PREFIX) or path == b".store" or not takes(path, info):
            continue
        try:
            if prefix == _MANIFEST + b"/":
                _merge_manifest(source, target, name, done)
            elif stat.S_ISDIR(info.st_mode):
                _merge_directory(store, source, target, path, done, takes)
            else:
                _merge_entry(store, source, target, path, info, done)
        except (PathError, OSError) as error:
            text = error.reason if isinstance(error, PathError) else error.strerror
            done.refused.append((path, text or str(error)))
    os.fsync(target)


def _merge_directory(
    store: Store,
    source: int,
    target: int,
    path: bytes,
    done: Done,
    takes: Callable[[bytes, os.stat_result], bool],
) -> None:
    prefix, _, name = path.rpartition(b"/")
    number = 1
    while True:
        actual = numbered(name, number)
        with contextlib.suppress(FileExistsError):
            os.mkdir(actual, 0o700, dir_fd=target)
        try:
            below = os.open(actual, OPEN_DIR, dir_fd=target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            number += 1  # a file has that name here
    try:
        inside = os.open(name, OPEN_DIR, dir_fd=source)
        try:
            there = (prefix + b"/" if prefix else b"") + actual + b"/"
            _merge_folder(store, inside, below, there, done, takes)
        finally:
            os.close(inside)
    finally:
        os.close(below)


def _merge_entry(
    store: Store, source: int, target: int, path: bytes, info: os.stat_result, done: Done
) -> None:
    prefix, _, name = path.rpartition(b"/")
    temporary = TEMP_PREFIX + os.urandom(16).hex().encode()
    number = 1
    while _exists(target, numbered(name, number)):
        if _is_same(source, name, target, numbered(name, number), info):
            done.skipped += 1
            return
        number += 1
    copy_object(source, name, target, temporary)
    try:
        while True:
            actual = numbered(name, number)
            try:
                rename_noreplace(target, temporary, target, actual)
                break
            except FileExistsError:
                number += 1
    except BaseException:
        remove_object(target, temporary)
        raise
    done.entries += 1
    done.size += info.st_size if stat.S_ISREG(info.st_mode) else 0
    if number > 1:
        done.renamed += 1
        day, _, rest = (prefix + b"/" + name if prefix else name).partition(b"/")
        kept = (prefix + b"/" if prefix else b"") + actual
        store.note(
            {
                "path": display(rest or day),
                "kept": display(kept),
                "kind": "file",
                "size": info.st_size,
                "mtime_ns": info.st_mtime_ns,
                "reason": "merged from another store",
                "conflict": False,
                "digest": None,
            }
        )


def _merge_manifest(source: int, target: int, name: bytes, done: Done) -> None:
    """Manifests only grow and are named by their replica: the longer one has it all."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=source), "rb") as file:
        theirs = file.read()
    if _exists(target, name):
        with open(os.open(name, flags, dir_fd=target), "rb") as file:
            mine = file.read()
        if not theirs.startswith(mine):
            if not mine.startswith(theirs):
                done.refused.append((_MANIFEST + b"/" + name, "differs; both stay as they are"))
            return
        more = theirs[len(mine) :]
        fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW, dir_fd=target)
    else:
        more = theirs
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=target)
    with open(fd, "ab") as file:
        file.write(more)
        file.flush()
        os.fsync(file.fileno())


def _exists(fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_same(source: int, name: bytes, target: int, other: bytes, info: os.stat_result) -> bool:
    there = os.stat(other, dir_fd=target, follow_symlinks=False)
    if stat.S_IFMT(there.st_mode) != stat.S_IFMT(info.st_mode):
        return False
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(name, dir_fd=source) == os.readlink(other, dir_fd=target)
    if not stat.S_ISREG(info.st_mode):
        return info.st_rdev == there.st_rdev
    if info.st_size != there.st_size:
        return False
    return read_version(source, name).digest == read_version(target, other).digest
