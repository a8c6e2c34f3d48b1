"""Take a declared directory at one instant; see :mod:`bisync.core.declared`.

On btrfs a read-only snapshot of its subvolume is that instant, where we may make and remove one.
Elsewhere its files are cloned in the declared order, and the clones count if what proves it did not
change meanwhile. Files that the index knows as they are need no clone. Where nothing can be cloned,
what was read counts if nothing at all moved until all of it was read.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct, field

from bisync.core.declared import Declared
from bisync.core.ignore import reserved
from bisync.core.node import NodeId
from bisync.core.path import display
from bisync.errors import BusyError, PathError, StaleError
from bisync.fs.bases import Bases
from bisync.fs.root import OPEN_DIR
from bisync.linux.subvolume import place_in_subvolume

log = logging.getLogger(__name__)

TRIES = 10
_FIRST_WAIT_S = 0.005  # between tries, doubled each time up to
_LONGEST_WAIT_S = 0.2
_TICK_NS = 20 * 10**6  # within it two writes may leave the same times (before Linux 6.13)
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Stamp = tuple[int, int, int, int]
Known = Callable[[NodeId | None], Stamp | None]


class HeldFile(Struct, frozen=True):
    """One file: its frozen clone, where there is one, and what it was when it was held."""

    fd: int  # -1: it is read where it is
    info: os.stat_result

    def close(self) -> None:
        """Give the clone back."""
        if self.fd >= 0:
            os.close(self.fd)


def waits() -> Iterator[None]:
    """Once per try, with a longer wait before each."""
    wait = 0.0
    for _ in range(TRIES):
        time.sleep(wait)
        wait = min(max(2 * wait, _FIRST_WAIT_S), _LONGEST_WAIT_S)
        yield


def stamp(info: os.stat_result) -> Stamp:
    """What tells that a file is another, or was written to."""
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class Listing(Struct):
    """What is below a directory: regular files with what they are, and directories."""

    files: dict[bytes, os.stat_result] = field(default_factory=dict)
    links: dict[bytes, os.stat_result] = field(default_factory=dict)  # symbolic ones
    directories: set[bytes] = field(default_factory=set)
    ways_out: list[bytes] = field(default_factory=list)  # links to directories

    def stamps(self) -> dict[bytes, Stamp]:
        """What tells whether anything is not as it was."""
        return {path: stamp(info) for path, info in (self.files | self.links).items()}


class Taker(Struct, frozen=True):
    """Takes one directory.

    Args:
        top: opens it.
        ignores: whether a path below it is left alone; and whether that is a directory.
        nodes: its files by path, as the index has them.
        directories: by path, itself (empty) included.
        links: symbolic ones by path: inode, time.
        is_known: whether the index knows what is in a file, and both sides agreed on it.
        index: what the index says of a file: the engine itself may give it other attributes.
    """

    rule: Declared
    top: Callable[[], int]
    ignores: Callable[[bytes, bool], bool]
    nodes: dict[bytes, NodeId]
    directories: set[bytes]
    links: dict[bytes, tuple[int, int]]
    is_known: Callable[[NodeId, os.stat_result], bool]
    index: Known
    bases: Bases

    def take(self) -> tuple[dict[NodeId, HeldFile], "Still | None"]:
        """Its files at one instant; and what has to stay as it is, if they are read in place.

        Raises:
            StaleError: it has other files than the index says; observe again.
            BusyError: it moved during every try.
            PathError: it cannot be taken at all.
        """
        if self.rule.stamp is not None and self.rule.stamp not in self.nodes:
            raise PathError(f"{display(self.rule.stamp)} is missing: it cannot be taken as a whole")
        hooks = self.rule.hooks
        elsewhere = None if hooks is None else hooks.read_from
        with self._snapshot() if elsewhere is None else _snapshot_at(elsewhere) as frozen:
            if frozen is not None:
                there = self.listing(frozen)
                self._compare(there)
                self._compare_numbers(there)
                return self.gather(there.files, lambda path, _: _opened(frozen, path)), None
        for _ in waits():
            try:
                taken = self._try()
            except FileNotFoundError as error:
                raise StaleError("files of it came or went") from error
            if taken is not None:
                return taken
        raise BusyError("it was written to, at every try")

    @contextmanager
    def _snapshot(self) -> Iterator[int | None]:
        """The directory in a snapshot of its subvolume; ``None`` where there can be none."""
        try:
            subvolume, path = place_in_subvolume(self.top())
        except OSError as error:
            log.info("no-snapshot reason=%s", error)
            yield None
            return
        try:
            name = self.bases.snapshot(subvolume)
        finally:
            os.close(subvolume)
        if name is None:
            yield None
            return
        try:
            fd = self.bases.open_snapshot(name, path)
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            self.bases.destroy(name)  # it lives as long as files of it are open

    def _try(self) -> tuple[dict[NodeId, HeldFile], "Still | None"] | None:
        fd, rule = self.top(), self.rule
        before = None if rule.stamp is None else _content(fd, rule.stamp)
        there = self.listing(fd)
        self._compare(there)
        newest = max((info.st_ctime_ns for info in there.files.values()), default=0)
        young = 0 <= time.time_ns() - newest < _TICK_NS  # the next write may leave the same times
        if rule.stamp is None and young:
            return None
        frozen = True

        def freeze(path: bytes, info: os.stat_result) -> HeldFile:
            nonlocal frozen
            held = self._freeze(fd, path) if frozen else None
            frozen = held is not None
            return held or HeldFile(-1, info)

        files: dict[NodeId, HeldFile] = {}
        still = False
        try:
            late = [path for path in there.files if rule.last and path.startswith(rule.last + b"/")]
            early = there.files.keys() - set(late) - {rule.stamp}
            order = [path for path in (rule.stamp,) if path is not None] + sorted(early)
            self.gather({path: there.files[path] for path in order}, freeze, files)
            if rule.last is not None:
                log_now = self.listing(fd, rule.last).files
                if log_now.keys() != set(late):
                    raise StaleError("files of it came or went")
                self.gather(log_now, freeze, files)
            still = self._is_still(fd, before, there, frozen=frozen) and (frozen or not young)
        finally:
            if not still:
                for file in files.values():
                    file.close()
        return (files, None if frozen else Still(self, there.stamps())) if still else None

    def _is_still(self, fd: int, before: bytes | None, there: Listing, *, frozen: bool) -> bool:
        if self.rule.stamp is None or not frozen:
            return self.listing(fd).stamps() == there.stamps()
        if before != _content(fd, self.rule.stamp):
            return False
        if self.rule.last is None:
            return True
        late = {path for path in there.files if path.startswith(self.rule.last + b"/")}
        return self.listing(fd, self.rule.last).files.keys() == late

    def gather(
        self,
        there: dict[bytes, os.stat_result],
        hold: Callable[[bytes, os.stat_result], HeldFile],
        files: dict[NodeId, HeldFile] | None = None,
    ) -> dict[NodeId, HeldFile]:
        """Hold what is not known as it is."""
        found: dict[NodeId, HeldFile] = {} if files is None else files
        try:
            for path, info in there.items():
                node = self.nodes[path]
                if node not in found and not self.is_known(node, info):
                    found[node] = hold(path, info)
        except BaseException as error:
            for file in found.values():
                file.close()
            found.clear()
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise PathError("it has more files than may be open (ulimit -n)") from error
            raise
        return found

    def _freeze(self, top: int, path: bytes) -> HeldFile | None:
        fd = _open_below(top, path, _READ)
        try:
            clone = self.bases.freeze(fd)
            if clone is None:
                return None
            self.bases.discard(clone[1])  # it lives as long as it is open
            return HeldFile(clone[0], os.fstat(fd))
        finally:
            os.close(fd)

    def _compare(self, there: Listing) -> None:
        if self.rule.stamp is not None and there.ways_out:
            what = display(there.ways_out[0])
            raise PathError(f"{what} is a link to a directory: it cannot be taken with the rest")
        if there.files.keys() != self.nodes.keys() or there.directories != self.directories:
            raise StaleError("files of it came or went")
        if {path: (i.st_ino, i.st_mtime_ns) for path, i in there.links.items()} != self.links:
            raise StaleError("links in it came, went or changed")

    def _compare_numbers(self, there: Listing) -> None:
        """A snapshot has the files themselves: who restores from a copy has others."""
        for path, info in there.files.items():
            known = self.index(self.nodes[path])
            if known is not None and known[0] != info.st_ino:
                raise StaleError(f"{display(path)} is another file in the snapshot")

    def listing(self, top: int, below: bytes = b"") -> Listing:
        """What is below a directory, or one of its own, by paths below the first."""
        found = Listing()

        def cannot(error: OSError) -> None:
            raise error

        start = below or b"."
        for here, names, others, fd in os.fwalk(start, onerror=cannot, dir_fd=top):
            base = b"" if here == b"." else here.removeprefix(b"./") + b"/"
            found.directories.add(base[:-1])
            kept = []
            for name in names + others:
                path = base + name
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                is_dir = stat.S_ISDIR(info.st_mode)
                if is_dir and info.st_dev != os.fstat(fd).st_dev:
                    raise PathError(f"{display(path)}: another file system begins there")
                if reserved(name, at_root=False) or self.ignores(path, is_dir):
                    continue
                if is_dir:
                    kept.append(name)
                elif stat.S_ISREG(info.st_mode):
                    found.files[path] = info
                elif stat.S_ISLNK(info.st_mode):
                    found.links[path] = info
                    if name in names:
                        found.ways_out.append(path)
            names[:] = kept
        return found


class Still(Struct, frozen=True):
    """A directory that is read where it is: what was read counts as long as nothing moved."""

    taker: Taker
    stamps: dict[bytes, Stamp]

    def nodes(self) -> set[NodeId]:
        """The files it is about."""
        return set(self.taker.nodes.values())

    def moved(self) -> bool:
        """Whether anything did."""
        try:
            now = self.taker.listing(self.taker.top()).stamps()
        except (StaleError, FileNotFoundError):
            return True
        return not are_still(self.stamps, now, self.taker.nodes, self.taker.index)


def are_still(
    before: dict[bytes, Stamp], now: dict[bytes, Stamp], nodes: dict[bytes, NodeId], index: Known
) -> bool:
    """Whether files are the same, and nobody but the engine did anything to them."""
    for path in before.keys() | now.keys():
        is_now = now.get(path)
        if before.get(path) != is_now and (is_now is None or index(nodes.get(path)) != is_now):
            return False
    return True


@contextmanager
def _snapshot_at(path: bytes) -> Iterator[int]:
    """A snapshot that somebody else made."""
    try:
        fd = os.open(path, OPEN_DIR)
    except OSError as error:
        raise PathError(f"read-from {display(path)}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _opened(top: int, path: bytes) -> HeldFile:
    fd = _open_below(top, path, _READ)
    return HeldFile(fd, os.fstat(fd))


def _open_below(top: int, path: bytes, flags: int) -> int:
    """Open a file below a directory, through no link."""
    *parents, name = path.split(b"/")
    here = top
    try:
        for parent in parents:
            fd = os.open(parent, OPEN_DIR, dir_fd=here)
            if here != top:
                os.close(here)
            here = fd
        return os.open(name, flags, dir_fd=here)
    finally:
        if here != top:
            os.close(here)


def _content(top: int, path: bytes) -> bytes:
    """What a small file holds, and which one it is."""
    fd = _open_below(top, path, _READ)
    try:
        with os.fdopen(os.dup(fd), "rb") as file:
            return b"%d %d " % (os.fstat(fd).st_ino, os.fstat(fd).st_mtime_ns) + file.read(1 << 20)
    finally:
        os.close(fd)
