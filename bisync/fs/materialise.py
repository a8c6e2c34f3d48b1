"""Build a tree of an earlier time at a new place, each content found by its digest."""

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Container, Iterator, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.node import Attributes, Kind
from bisync.core.past import Past
from bisync.core.path import display
from bisync.errors import PathError
from bisync.fs.content import read_version
from bisync.fs.copying import write_chunk
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.restore import parent_of
from bisync.fs.rewind import (
    Chain,
    Kept,
    chain_of,
    complete,
    copy_into,
    is_there,
    lay_back,
    open_version,
)
from bisync.fs.store import Store, Version

log = logging.getLogger(__name__)
_PRIVATE = 0o700


class Origin(Struct):
    """A root and its store, where contents may be."""

    root: bytes
    store_name: bytes
    _store: Store | None = None
    _fd: int = -1
    _by_digest: dict[str, list[Version]] = field(default_factory=dict)
    _by_path: dict[bytes, list[Version]] = field(default_factory=dict)

    def store(self) -> Store | None:
        """The store; ``None`` where there is none."""
        if self._fd < 0:
            self._fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            store = Store(self._fd, self.store_name, "")
            if store.exists():
                self._store = store
                last = {version.kept: version for version in store.versions()}
                for version in last.values():  # a name may be used again
                    if version.digest is not None:
                        self._by_digest.setdefault(version.digest, []).append(version)
                    self._by_path.setdefault(version.path, []).append(version)
        return self._store

    @property
    def fd(self) -> int:
        """The root's descriptor."""
        self.store()
        return self._fd

    def candidates(self, past: Past, path: bytes) -> list[Version]:
        """Kept versions that may have a content and are still there, the likeliest first.

        By its digest, by path, size and time where there is none, and inside of directories
        that were kept as a whole; whether it is the one, its digest or its time decides.
        """
        store = self.store()
        if store is None:
            return []
        content = past.content
        time_ns = None if past.attributes is None else past.attributes.mtime_ns
        found: list[Version] = []
        if content.digest is not None:
            found += reversed(self._by_digest.get(content.digest.hex(), []))
        for version in reversed(self._by_path.get(path, [])):
            same = (version.size, version.mtime_ns) == (content.size, time_ns)
            if same and (version.digest is None or content.digest is None):
                found.append(version)
        found += self._inside(path, content.size)
        here = [v for v in found if is_there(store, v)]
        if content.digest is None:
            here = [v for v in here if not v.delta]
        return [v for v in here if content.digest is not None or v.mtime_ns == time_ns]

    def _inside(self, path: bytes, size: int) -> list[Version]:
        """What a path would be in each kept directory above it."""
        found, at = [], len(path)
        while (at := path.rfind(b"/", 0, at)) > 0:
            for version in reversed(self._by_path.get(path[:at], [])):
                inside = version.kind == "dir" and self._inside_time(version.kept + path[at:])
                if inside is not False and inside is not None:
                    kept = version.kept + path[at:]
                    found.append(
                        replace(
                            version, kept=kept, size=size, mtime_ns=inside, kind="file", digest=None
                        )
                    )
        return found

    def _inside_time(self, kept: bytes) -> int | None:
        """The modification time of something in a kept directory; ``None`` if it is not there."""
        assert self._store is not None
        info = self._store.look_at(kept)
        return None if info is None else info.st_mtime_ns

    def kept(self, digest: str) -> list[Kept]:
        """The files with a digest that are in the store."""
        store = self.store()
        if store is None:
            return []
        known = self._by_digest.get(digest, [])
        return [Kept(v, store) for v in known if v.kind == "file" and is_there(store, v)]

    def open(self, path: bytes) -> int:
        """A regular file of the tree, open for reading; -1 if there is none."""
        try:
            with parent_of(self.fd, path) as (fd, name):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                found = os.open(name, flags, dir_fd=fd)
        except (PathError, OSError):
            return -1
        if stat.S_ISREG(os.fstat(found).st_mode):
            return found
        os.close(found)
        return -1

    def close(self) -> None:
        """Give the descriptors back."""
        if self._store is not None:
            self._store.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Builder:
    """Makes entries of an earlier time, parents first; directories get their attributes last."""

    def __init__(self, places: list[Origin], live: dict[bytes, bytes]) -> None:
        """``live``: digest -> a path below the roots where that content is now."""
        self.places = places
        self.live = live
        self.incomplete: list[bytes] = []
        self._directories: list[tuple[bytes, Attributes]] = []

    def make(self, names: list[bytes], past: Past, target: bytes) -> None:
        """Make one entry.

        Args:
            names: where it was below the root, then and when it went, to find its content.
            target: where to make it; nothing may be there.
        """
        content, wanted = past.content, past.attributes
        match content.kind:
            case Kind.DIR:
                os.mkdir(target, _PRIVATE)
                if wanted is not None:
                    self._directories.append((target, wanted))
                return
            case Kind.FILE:
                if not any(self._file(path, past, target) for path in names):
                    self.incomplete.append(names[0])
                    return
            case Kind.SYMLINK:
                os.symlink(content.target, target)
            case Kind.FIFO:
                os.mkfifo(target, 0o600)
            case Kind.SOCKET:
                os.mknod(target, stat.S_IFSOCK | 0o600)
            case Kind.CHAR:
                os.mknod(target, stat.S_IFCHR | 0o600, content.rdev)
            case Kind.BLOCK:
                os.mknod(target, stat.S_IFBLK | 0o600, content.rdev)
        if wanted is not None:
            _dress(target, content.kind, wanted)

    def finish(self) -> None:
        """Directories get their attributes, the deepest first."""
        for target, wanted in reversed(self._directories):
            _dress(target, Kind.DIR, wanted)
        for place in self.places:
            place.close()

    def _file(self, path: bytes, past: Past, target: bytes) -> bool:
        for place in self.places:
            if self._copy_live(place, path, past, target) or self._copy_kept(
                place, path, past, target
            ):
                return True
        return False

    def _copy_live(self, place: Origin, path: bytes, past: Past, target: bytes) -> bool:
        digest = past.content.digest
        candidates = [path] if digest is None else [self.live.get(digest, path)]
        for candidate in candidates:
            try:
                with parent_of(place.fd, candidate) as (fd, name):
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if not stat.S_ISREG(info.st_mode) or not _may_be(info, past):
                        continue
                    if _copy(fd, name, past, target):
                        return True
            except (PathError, OSError):
                continue  # the next place has it, or none: then it is said
        return False

    def _copy_kept(self, place: Origin, path: bytes, past: Past, target: bytes) -> bool:
        store = place.store()
        if store is None:
            return False
        for version in place.candidates(past, path):
            if version.delta:
                if self._rewind(Kept(version, store), target):
                    return True
                continue
            try:
                fd, name = store.open_kept(version.kept)
            except OSError:
                continue
            try:
                if _copy(fd, name, past, target):
                    return True
            except (PathError, OSError):
                continue  # the next one has it, or none: then it is said
            finally:
                os.close(fd)
        return False

    def _rewind(self, kept: Kept, target: bytes) -> bool:
        """Make a version of which only what was written over was kept."""
        chain = chain_among(self.places, kept, self.live)
        out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        done = False
        try:
            with contextlib.ExitStack() as stack:
                sources = list(self._sources(stack, chain, kept.version.path))
                done = _assemble(out, sources, chain, os.path.dirname(target))
            os.fsync(out)
        except OSError as error:
            log.info("not-rewound path=%s reason=%s", display(kept.version.path), error)
        finally:
            os.close(out)
            if not done:
                os.unlink(target)
        return done

    def _sources(self, stack: contextlib.ExitStack, chain: Chain, path: bytes) -> Iterator[int]:
        """Open files that may have a base's blocks, the base itself first."""
        live = path if chain.base is None else self.live.get(bytes.fromhex(chain.base), path)
        if chain.kept is not None:
            fd = open_version(chain.kept.store, chain.kept.version)
            if fd >= 0:
                stack.callback(os.close, fd)
                yield fd
        for each in self.places:
            for name in dict.fromkeys((live, path)):
                fd = each.open(name)
                if fd >= 0:
                    stack.callback(os.close, fd)
                    yield fd


def chain_among(places: Sequence[Origin], kept: Kept, live: Container[bytes]) -> Chain:
    """How a version is made of which only what was written over was kept, from all stores."""
    return chain_of(
        kept, lambda digest: [each for place in places for each in place.kept(digest)], live
    )


def _assemble(out: int, sources: list[int], chain: Chain, scratch: bytes) -> bool:
    """Make a version in an empty file, from whatever has its base or parts of it."""
    if sources:
        copy_into(sources[0], out)
    wanted = lay_back(out, chain.deltas)
    if wanted is None:
        return False
    if complete(out, wanted, ()):
        return True
    for source in sources[1:]:
        # Pages were written over, so a block comes from another base that was taken back, too.
        with tempfile.TemporaryFile(dir=scratch) as again:
            copy_into(source, again.fileno())
            lay_back(again.fileno(), chain.deltas)
            if complete(out, wanted, (again.fileno(), source)):
                return True
    return False


def _may_be(info: os.stat_result, past: Past) -> bool:
    """Whether a live file can be the version; its digest decides where it is known."""
    if info.st_size != past.content.size:
        return False
    if past.content.digest is not None or past.attributes is None:
        return True
    return info.st_mtime_ns == past.attributes.mtime_ns


def _copy(fd: int, name: bytes, past: Past, target: bytes) -> bool:
    """Copy one file; ``False`` (and nothing made) if it is not that version."""
    out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        version = read_version(
            fd, name, lambda chunk: write_chunk(out, chunk), restart=lambda: os.ftruncate(out, 0)
        )
        os.ftruncate(out, version.size)
        fits = past.content.digest in (None, version.digest)
        if fits:
            os.fsync(out)
    except BaseException:
        os.unlink(target)
        raise
    finally:
        os.close(out)
    if not fits:
        os.unlink(target)
    return fits


def _dress(target: bytes, kind: Kind, wanted: Attributes) -> None:
    """Set attributes as far as this user may."""
    folder, _, name = target.rpartition(b"/")
    fd = os.open(folder or b"/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        now = attributes_of(os.stat(name, dir_fd=fd, follow_symlinks=False), *read_xattrs(fd, name))
        if os.geteuid() != 0:
            wanted = replace(wanted, uid=now.uid, gid=now.gid)
        apply_attributes(fd, name, kind, now, wanted)
    finally:
        os.close(fd)
