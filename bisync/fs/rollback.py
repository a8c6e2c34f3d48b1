"""What a person does with a rollback store: look, prune, lock, unlock, merge another one in."""

import contextlib
import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator

from msgspec import Struct, field

from bisync.core.path import TEMP_PREFIX, display, numbered
from bisync.errors import PathError
from bisync.fs.content import read_version
from bisync.fs.copying import copy_object, remove_object
from bisync.fs.meta import kind_of
from bisync.fs.rewind import bridge
from bisync.fs.root import OPEN_DIR
from bisync.fs.store import Store
from bisync.linux.filesystem import APPEND_ONLY, IMMUTABLE, change_flags, get_flags
from bisync.linux.rename import rename_noreplace

_MANIFEST = b".manifest"
_MANIFEST_NAME = re.compile(rb"[0-9a-f]{8}-[0-9]{6}\.jsonl")
_MODES = b".locked.json"  # what unlocking gives back, where flags are not to be had
_WRITE = 0o222


class Day(Struct):
    """One day of a store, as it lies there."""

    name: bytes
    entries: int = 0
    size: int = 0  # bytes of files
    unknown: int = 0  # entries that no manifest tells of: filled by another program
    locked: bool = False


class Done(Struct):
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
    found = [day for day in days(store) if chosen(day.name)]
    going = {day.name for day in found if not day.locked}
    # What an older version needs of one that goes now is written into that older one.
    doomed = {v.kept for v in store.versions() if v.kept[:10] in going} if going else set()
    bridged = bridge(store, doomed)
    for old in bridged.renamed:
        store.discard(old)
    needed = {kept[:10] for kept in bridged.needed}
    for day in found:
        if day.name in needed and not day.locked:
            done.refused.append((day.name, "versions of other days are made from what it has"))
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
    today = time.strftime("%Y-%m-%d").encode()
    top = store.folder()
    try:
        locker = _Locker(_read_modes(top), on=on)
        for name in [*store.days(), _MANIFEST]:
            grows = name in (today, _MANIFEST)
            fd = os.open(name, OPEN_DIR, dir_fd=top)
            try:
                locker.tree(fd, name, APPEND_ONLY if grows else IMMUTABLE)
            finally:
                os.close(fd)
        _write_modes(top, locker.modes)
    finally:
        os.close(top)
    return locker.done


def _read_modes(top: int) -> dict[str, int]:
    """The permission bits that were taken away, by path below the store."""
    try:
        fd = os.open(_MODES, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    except FileNotFoundError:
        return {}
    with open(fd, encoding="utf-8") as file:
        try:
            rows = json.load(file)
            return {str(path): int(mode) for path, mode in rows.items()}
        except (ValueError, AttributeError, TypeError):
            return {}  # damaged: everything becomes writable for its owner, and no more


def _write_modes(top: int, modes: dict[str, int]) -> None:
    if not modes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_MODES, dir_fd=top)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(_MODES + b".new", flags, 0o600, dir_fd=top), "w", encoding="utf-8") as file:
        json.dump(modes, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(_MODES + b".new", _MODES, src_dir_fd=top, dst_dir_fd=top)
    os.fsync(top)


class _Locker:
    """Locks or unlocks, by flags where that is allowed, by permission bits elsewhere."""

    def __init__(self, modes: dict[str, int], *, on: bool) -> None:
        self.modes = modes
        self.on = on
        self.done = Done()

    def tree(self, fd: int, path: bytes, flag: int) -> None:
        """A directory and all below it; itself last when locking, first otherwise."""
        if not self.on:
            self._one(fd, path, flag)
        self._below(fd, path, flag)
        if self.on:
            self._one(fd, path, flag)

    def _below(self, fd: int, path: bytes, flag: int) -> None:
        for name in map(os.fsencode, os.listdir(fd)):
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            below = path + b"/" + name
            if stat.S_ISDIR(info.st_mode):
                inner = os.open(name, OPEN_DIR, dir_fd=fd)
                try:
                    self.tree(inner, below, flag)
                finally:
                    os.close(inner)
            elif stat.S_ISREG(info.st_mode):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(name, flags, dir_fd=fd)
                try:
                    grows = flag == APPEND_ONLY and name.endswith(b".jsonl")
                    self._one(file, below, APPEND_ONLY if grows else IMMUTABLE)
                finally:
                    os.close(file)

    def _one(self, fd: int, path: bytes, flag: int) -> None:
        self.done.entries += 1
        both, text = IMMUTABLE | APPEND_ONLY, display(path)
        if self.on:
            if change_flags(fd, add=flag, remove=both & ~flag):
                return
            self.done.weaker = True
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if flag == IMMUTABLE and mode & _WRITE:  # bits cannot say that something may only grow
                self.modes[text] = mode
                os.fchmod(fd, mode & ~_WRITE)
            return
        flags = get_flags(fd) or 0
        if flags & both and not change_flags(fd, remove=both):
            self.done.refused.append((path, "its flags may not be changed"))
        before = self.modes.pop(text, None)
        if before is not None:
            self.done.weaker = True
            os.fchmod(fd, before)


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
        if name.startswith(TEMP_PREFIX) or path in (b".store", _MODES) or not takes(path, info):
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
        is_file = stat.S_ISREG(info.st_mode)
        digest = read_version(target, actual).digest.hex() if is_file else None
        store.note(
            {
                "path": display(rest or day),
                "kept": display(kept),
                "kind": kind_of(info.st_mode).name.lower(),
                "size": info.st_size,
                "mtime_ns": info.st_mtime_ns,
                "reason": "merged from another store",
                "conflict": False,
                "digest": digest,
            }
        )


def _merge_manifest(source: int, target: int, name: bytes, done: Done) -> None:
    """Manifests only grow and are named by their replica: the longer one has it all."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=source), "rb") as file:
        if _MANIFEST_NAME.fullmatch(name) is None or not _is_regular(file.fileno()):
            done.refused.append((_MANIFEST + b"/" + name, "it is no manifest"))
            return
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


def _is_regular(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


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
