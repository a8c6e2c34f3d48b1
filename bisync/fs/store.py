"""The rollback store: everything the engine displaced, by day, append-only.

``rsync-rollback/YYYY-MM-DD/REL/PATH`` (local date) is what was displaced that day from
that path; a second version becomes ``PATH.~2~``. Nothing in the store is ever replaced.
The manifest (``.manifest/REPLICA-NNNNNN.jsonl``) records time, origin, reason and the
true path of each.
"""

import errno
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from bisync.core.path import NAME_MAX, delta_name, display, numbered, parse
from bisync.errors import PathError
from bisync.fs.copying import copy_object, is_another_place, remove_object
from bisync.fs.meta import kind_of, owned_like, proc_path
from bisync.fs.root import OPEN_DIR
from bisync.linux.closing import close
from bisync.linux.rename import is_unsupported, rename_noreplace

_MARKER = b".store"
_MANIFEST = b".manifest"
_ROLL = 8 << 20  # bytes after which a new manifest file begins
_RESERVE = 10 << 30  # bytes that stay free ...
_RESERVE_PART = 20  # ... or this part of the file system, where that is less
_SETID = 0o6000
_DAY = re.compile(rb"\d{4}-\d\d-\d\d")
_CAPABILITY = b"security.capability"
log = logging.getLogger(__name__)


class Kept(Struct, frozen=True):
    """Where a displaced object went, below the store's folder."""

    path: bytes
    day: str
    copied: bool  # the object itself is gone


class Fresh(Struct, frozen=True):
    """A version that the engine had installed itself, and replaced by the next one."""

    path: bytes
    kept: bytes
    time_ns: int


class Version(Struct, frozen=True):
    """One line of a manifest: an object that was kept."""

    time_ns: int
    path: bytes  # where it was, below the root
    kept: bytes  # where it is, below the store
    kind: str
    size: int
    mtime_ns: int
    reason: str
    digest: str | None
    installed: bool = False  # by the engine; else somebody's own work
    delta: bool = False  # only what was written over is there
    base: str | None = None  # digest of what a delta has to be applied to


class Store:
    """One replica's rollback store; made when first needed."""

    def __init__(
        self,
        base_fd: int,
        name: bytes,
        replica: str,
        model_fd: int = -1,
        *,
        day: str | None = None,
    ) -> None:
        """``name`` is the store's path below ``base_fd``, one or more components.

        Args:
            model_fd: a directory whose owner the store gets, if root makes it (the state).
            day: the folder that takes everything, "" for the store itself; ``None``: today's.
        """
        self._day = day
        self._base_fd = base_fd
        self._model_fd = model_fd
        self._name = name
        self._replica = replica
        self._fd = -1
        self._manifest = -1
        self._torn = False  # the last line of the manifest was cut off
        self._touched: dict[int, None] = {}
        self._open_dirs: dict[bytes, int] = {}
        self.fresh: list[Fresh] = []  # what was kept since this was opened, and may be thinned
        self._whole: dict[bytes, set[bytes]] = {}  # day -> directories kept as versions

    def _open(self) -> int:
        if self._fd >= 0:
            return self._fd
        fd = self._base_fd
        for part in self._name.split(b"/"):
            made, below = self._make_dir(fd, part)
            if made:
                os.fsync(fd)
            if fd != self._base_fd:
                os.close(fd)
            fd = below
        try:
            self._furnish(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return fd

    def _furnish(self, fd: int) -> None:
        """Make what every store has: its marker and a manifest of ours."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        marker = os.open(_MARKER, flags, 0o600, dir_fd=fd)
        self._own(marker)
        os.close(marker)
        _, manifest = self._make_dir(fd, _MANIFEST)
        try:
            self._open_manifest(manifest)
            os.fsync(manifest)
        finally:
            os.close(manifest)
        os.fsync(fd)

    def _own(self, fd: int) -> None:
        if self._model_fd >= 0:
            owned_like(fd, self._model_fd)

    def _make_dir(self, parent: int, name: bytes) -> tuple[bool, int]:
        """Open a directory, made if it is not there: (made, descriptor)."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            made = True
        except FileExistsError:
            made = False
        fd = os.open(name, OPEN_DIR, dir_fd=parent)
        if made:
            self._own(fd)
        return made, fd

    def _open_manifest(self, folder: int) -> None:
        prefix = self._replica.encode() + b"-"
        names = [n for n in map(os.fsencode, os.listdir(folder)) if n.startswith(prefix)]
        numbers = [n[len(prefix) : len(prefix) + 6] for n in names]
        number = max((int(n) for n in numbers if n.isdigit()), default=1)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            name = prefix + b"%06d.jsonl" % number
            fd = os.open(name, flags, 0o600, dir_fd=folder)
            self._own(fd)
            size = os.fstat(fd).st_size
            if size < _ROLL:
                break
            os.close(fd)
            number += 1
        self._manifest = fd
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")  # a line torn by a crash stays one bad line

    def keep(
        self,
        dir_fd: int,
        name: bytes,
        path: bytes,
        record: dict[str, Any],
        *,
        copy: bool,
        delta: bool = False,
    ) -> Kept:
        """Move an object from the stage into the store.

        Args:
            dir_fd: where it lies now (the stage).
            name: its name there.
            path: its true path below the root.
            record: what the manifest should say (reason, origin, digest ...).
            copy: its inode has other names, so the store gets a copy of its own.
            delta: it is a reverse delta, and must not look like the version it restores.

        Raises:
            PathError: it cannot be kept; it is still where it was.
        """
        day = time.strftime("%Y-%m-%d") if self._day is None else self._day
        try:
            info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            parent, where, copied = self._place(dir_fd, name, path, day, copy=copy, delta=delta)
            target = where.rpartition(b"/")[2]
            try:
                self._record(path, where, info, {**record, **_powers(parent, target, info)})
            except OSError:
                if copied or delta:
                    remove_object(parent, target)
                else:
                    rename_noreplace(parent, target, dir_fd, name)
                raise
            if copied or delta:
                # A delta says nothing without its line; until that is durable it stays where it is.
                os.fsync(parent)
                if delta:
                    os.fdatasync(self._manifest)
                remove_object(dir_fd, name)
        except OSError as error:
            raise PathError(f"cannot keep the old version: {error.strerror}") from error
        if record.get("installed"):
            self.fresh.append(Fresh(path, where, time.time_ns()))
        if stat.S_ISDIR(info.st_mode):
            self._whole_directories(day.encode()).add(where)
        _disarm(parent, target, info)
        return Kept(where, day, copied)

    def _place(
        self, dir_fd: int, name: bytes, path: bytes, day: str, *, copy: bool, delta: bool
    ) -> tuple[int, bytes, bool]:
        """Give an object its place: (directory, path below the store, whether it is a copy).

        By a rename; by a copy where its inode has other names, or the store is another
        quota project, encryption policy or file system.
        """
        parent, base, prefix = self._folder(path, day)
        number = 1
        while True:
            target = delta_name(base, number) if delta else numbered(base, number)
            try:
                if copy:
                    self._spare(dir_fd, name)
                    copy_object(dir_fd, name, parent, target)
                elif delta:
                    os.link(name, target, src_dir_fd=dir_fd, dst_dir_fd=parent)
                else:
                    rename_noreplace(dir_fd, name, parent, target)
                return parent, prefix + target, copy
            except FileExistsError:
                number += 1
            except OSError as error:
                if copy or not (is_another_place(error) or is_unsupported(error)):
                    raise
                copy = True

    @staticmethod
    def _spare(dir_fd: int, name: bytes) -> None:
        """Refuse a copy that would use the space that is to stay free."""
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if stat.S_ISREG(info.st_mode) and not has_room(dir_fd, info.st_blocks * 512):
            raise OSError(errno.ENOSPC, "a copy would not leave the free-space reserve")

    def has_room(self) -> bool:
        """Whether the free-space reserve of the store's file system is left."""
        fd = self.folder_to_read()
        try:
            return has_room(fd)
        finally:
            os.close(fd)

    def _folder(self, path: bytes, day: str) -> tuple[int, bytes, bytes]:
        """The store's directory for a path: (descriptor, base name, prefix for output).

        Where a component exists with another kind, the nearest one that is free gets a
        number: ``a`` kept as a file in the morning, ``a/b`` in the evening.
        """
        fd, prefix = self._open(), b""
        if day:
            fd, prefix = self._enter(fd, prefix, day.encode())
        *parts, base = path.split(b"/")
        for part in parts:
            fd, prefix = self._enter(fd, prefix, part)
        self._touched[fd] = None
        return fd, base[:NAME_MAX], prefix

    def _enter(self, parent: int, prefix: bytes, name: bytes) -> tuple[int, bytes]:
        number = 1
        while True:
            actual = numbered(name, number)
            below = prefix + actual + b"/"
            if prefix and prefix + actual in self._whole_directories(prefix[:10]):
                number += 1  # a version of its own: nothing may get into it
                continue
            if below in self._open_dirs:
                return self._open_dirs[below], below
            try:
                made, fd = self._make_dir(parent, actual)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                number += 1
                continue
            if made:
                self._touched[parent] = None
            if len(self._open_dirs) > 512:
                self.flush()
                self._forget_dirs(keep=parent)
            self._open_dirs[below] = fd
            return fd, below

    def _whole_directories(self, day: bytes) -> set[bytes]:
        """The directories that were kept whole on a day; from the manifests, once."""
        if day not in self._whole:
            found: set[bytes] = set()
            wanted = b'"kept":"' + day + b"/"
            for data in self.manifests():
                for line in data.splitlines():
                    if wanted in line and b'"kind":"dir"' in line:
                        try:
                            found.add(parse(json.loads(line)["kept"]))
                        except (ValueError, KeyError):
                            continue  # cut off by a full disk or a crash
            self._whole[day] = found
        return self._whole[day]

    def _forget_dirs(self, keep: int = -1) -> None:
        for path, fd in list(self._open_dirs.items()):
            if fd != keep:
                os.close(fd)
                del self._open_dirs[path]

    def _record(
        self, path: bytes, where: bytes, info: os.stat_result, record: dict[str, Any]
    ) -> None:
        line = {
            "time_ns": time.time_ns(),
            "path": display(path),
            "kept": display(where),
            "kind": kind_of(info.st_mode).name.lower(),
            "mode": stat.S_IMODE(info.st_mode),
            "uid": info.st_uid,
            "gid": info.st_gid,
            "size": info.st_size,
            "mtime_ns": info.st_mtime_ns,
            **record,
        }
        self._write_line(line)

    def _write_line(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if self._torn:
            data = b"\n" + data  # what a full disk cut off stays one bad line
        written = os.write(self._manifest, data)
        self._torn = written != len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def tell_anew(self, folder: int, temp: bytes, version: Version, base: str) -> bytes:
        """Give a delta that was written anew its name beside the former one, and a line of its own.

        Args:
            folder: where both are.
            temp: its name until now.
            version: the former one.
            base: what the new one has to be applied to.

        Returns:
            Its path below the store.
        """
        self._open()
        rows = [row for row in self.records() if row.get("kept") == display(version.kept)]
        number, stem = 1, version.path.rpartition(b"/")[2][:NAME_MAX]
        while True:
            try:
                name = delta_name(stem, number)
                rename_noreplace(folder, temp, folder, name)
                break
            except FileExistsError:
                number += 1
        kept = version.kept.rpartition(b"/")[0] + b"/" + name
        try:
            os.fsync(folder)
            self._write_line({**rows[-1], "kept": display(kept), "base": base})
        except OSError:
            rename_noreplace(folder, name, folder, temp)
            raise
        self.flush()
        return kept

    def note(self, record: dict[str, Any]) -> None:
        """Add a line to the manifest that is about no version."""
        self._open()
        self._write_line({"time_ns": time.time_ns(), **record})

    def exists(self) -> bool:
        """Whether there is a store yet."""
        try:
            os.stat(self._name, dir_fd=self._base_fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def days(self) -> list[bytes]:
        """The names of the days that have a folder."""
        if not self.exists():
            return []
        fd = self.folder_to_read()
        try:
            names = [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)
        return sorted(name for name in names if _DAY.fullmatch(name))

    def manifests(self) -> Iterator[bytes]:
        """The content of every manifest, one after the other."""
        store = self.folder_to_read()
        try:
            folder = os.open(_MANIFEST, OPEN_DIR, dir_fd=store)
        except FileNotFoundError:
            return  # a store that another program filled
        finally:
            os.close(store)
        try:
            for name in sorted(map(os.fsencode, os.listdir(folder))):
                with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
                    yield file.read()
        finally:
            os.close(folder)

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of all manifests, oldest first."""
        for data in self.manifests():
            for line in data.splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut off by a full disk or a crash
                if isinstance(row, dict):
                    yield row

    def versions(self) -> Iterator[Version]:
        """The kept objects that the manifests tell of, oldest first; senseless lines are left out.

        They may be gone since.
        """
        for row in self.records():
            digest, base = row.get("digest"), row.get("base")
            try:
                version = Version(
                    int(row["time_ns"]),
                    parse(row["path"]),
                    parse(row["kept"]),
                    str(row["kind"]),
                    int(row["size"]),
                    int(row["mtime_ns"]),
                    str(row.get("reason", "")),
                    digest if isinstance(digest, str) else None,
                    row.get("installed") is True,
                    row.get("delta") is True,
                    base if isinstance(base, str) else None,
                )
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
            yield version

    def find(self, path: bytes, digest: str | None) -> bytes | None:
        """Where the last version of a path with this digest was kept whole, by the manifests.

        One that was brought there after a crash has no digest; it will do if no other fits.
        """
        shown, found, perhaps = display(path), None, None
        if not self.exists():
            return None
        for row in self.records():
            if row.get("path") != shown or "kept" not in row or row.get("delta"):
                continue
            if digest in (None, row.get("digest")):
                found = parse(row["kept"])
            elif row.get("digest") is None:
                perhaps = parse(row["kept"])
        return found or perhaps

    def tidy(self, path: bytes) -> None:
        """Remove the folders above a removed version that are empty now."""
        while b"/" in path:
            path = path.rpartition(b"/")[0]
            try:
                fd, name = self.open_kept(path)
            except OSError:
                return
            try:
                os.rmdir(name, dir_fd=fd)
            except OSError:
                return  # something else is still in it
            finally:
                os.close(fd)

    def discard(self, kept: bytes) -> None:
        """Remove one version that nobody wants; said in the manifest.

        One that is gone already, with the directory that it was in or by somebody else, is done.
        """
        try:
            fd, name = self.open_kept(kept)
        except FileNotFoundError:
            return
        try:
            _, size = remove_object(fd, name)
        except FileNotFoundError:
            return
        finally:
            os.close(fd)
        self.note({"dropped": 1, "bytes": size, "kept": display(kept)})
        self.tidy(kept)

    def folder(self) -> int:
        """A descriptor of the store's folder, made if need be; the caller closes it."""
        return os.dup(self._open())

    def flush(self) -> None:
        """Make the manifest and the touched folders durable."""
        if self._fd < 0:
            return
        for fd in self._touched:
            os.fsync(fd)
        self._touched.clear()
        if self._manifest >= 0:
            os.fdatasync(self._manifest)

    def folder_to_read(self) -> int:
        """A descriptor of the store as it is, for reading only; the caller closes it.

        Raises:
            OSError: there is none.
        """
        if self._fd >= 0:
            return os.dup(self._fd)
        return _descend(self._base_fd, self._name.split(b"/"))

    def look_at(self, path: bytes) -> os.stat_result | None:
        """What a kept object, or something in a kept directory, is; ``None`` if it is gone."""
        try:
            fd, name = self.open_kept(path)
        except OSError:
            return None
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(fd)

    def open_kept(self, path: bytes) -> tuple[int, bytes]:
        """The directory (caller closes) and name of a kept object.

        A path out of the store, which only a damaged or forged manifest has, is not there.
        """
        *parts, base = path.split(b"/")
        if {b"", b".", b".."} & {*parts, base}:
            raise FileNotFoundError(errno.ENOENT, "not a path of the store", path)
        store = self.folder_to_read()
        try:
            return _descend(store, parts), base
        finally:
            os.close(store)

    def close(self) -> None:
        """Close all descriptors."""
        self._forget_dirs()
        for fd in (self._manifest, self._fd):
            if fd >= 0:
                close(fd)
        self._fd = self._manifest = -1


def has_room(fd: int, need: int = 0) -> bool:
    """Whether a file system has its free-space reserve, and ``need`` bytes more."""
    info = os.fstatvfs(fd)
    reserve = min(_RESERVE, info.f_blocks * info.f_frsize // _RESERVE_PART)
    return info.f_bavail * info.f_frsize - need >= reserve


def _descend(fd: int, parts: list[bytes]) -> int:
    """A new descriptor of the directory that ``parts`` lead to; links are not followed."""
    fd = os.dup(fd)
    for part in parts:
        try:
            below = os.open(part, OPEN_DIR, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _powers(dir_fd: int, name: bytes, info: os.stat_result) -> dict[str, str]:
    """What the manifest should remember of a program's capabilities."""
    if not stat.S_ISREG(info.st_mode) or not info.st_mode & 0o111:
        return {}
    try:
        path = proc_path(dir_fd, name)
        return {"capability": os.getxattr(path, _CAPABILITY, follow_symlinks=False).hex()}
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return {}


def _disarm(dir_fd: int, name: bytes, info: os.stat_result) -> None:
    """A kept program must not keep its powers: no set-id bits, no capabilities."""
    if not stat.S_ISREG(info.st_mode) or not info.st_mode & (_SETID | 0o111):
        return
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        path = proc_path(fd)
        if info.st_mode & _SETID:
            os.chmod(path, stat.S_IMODE(info.st_mode) & ~_SETID)
        if info.st_mode & 0o111:
            os.removexattr(path, _CAPABILITY)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            # It is safe in the store, which nobody else can enter; that it still has its
            # powers there is worth a line, not the loss of the version.
            log.warning("kept-still-armed path=%s reason=%s", display(name), error)
    finally:
        os.close(fd)
