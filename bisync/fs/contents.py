"""Read the files of a replica: for their digest, for the other side, at one instant."""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from bisync.core.declared import Declared
from bisync.core.hot import Allowance
from bisync.core.ignore import Matcher
from bisync.core.node import Content, Kind, Node, NodeId, Place
from bisync.errors import BusyError, PathError, StaleError
from bisync.fs.bases import Bases
from bisync.fs.content import BIG, Chunk, Version, read_all, read_version
from bisync.fs.database import Database
from bisync.fs.debts import Debts
from bisync.fs.holding import Holds
from bisync.fs.index import Index, Seen
from bisync.fs.instant import HeldFile, Stamp, Taker
from bisync.fs.root import Directories

if TYPE_CHECKING:
    from bisync.delta.changes import ChangeSink
    from bisync.fs.bigfile import Comparer, Lister
    from bisync.fs.blocklist import BlockLists


class ReadOptions(Protocol):
    """How files are read."""

    @property
    def stop(self) -> Callable[[], None]:
        """Raises to end the run."""
        ...

    @property
    def workers(self) -> int:
        """Threads."""
        ...

    @property
    def hot(self) -> Matcher:
        """Files of which a version is taken before their first writer has closed them."""
        ...

    @property
    def allowance(self) -> Allowance | None:
        """What hot files may cost."""
        ...


class Contents:
    """Reads the files of one replica, and remembers what their blocks are."""

    def __init__(
        self,
        index: Index,
        directories: Directories,
        db: Database,
        options: ReadOptions,
        state_fd: int,
        *,
        dry: bool,
    ) -> None:
        # what is read at one instant
        self.holds = Holds(lambda: self.bases, directories.open, self._stamp)
        self._index, self._directories, self._db = index, directories, db
        self._options, self._state_fd, self._dry = options, state_fd, dry
        self._debts = Debts(db, options.allowance)
        self._lists: BlockLists | None = None
        self._bases: Bases | None = None

    @property
    def bases(self) -> Bases:
        """Frozen clones of big files."""
        if self._bases is None:
            self._bases = Bases(self._state_fd)
        return self._bases

    @property
    def lists(self) -> "BlockLists":
        """What is known of the blocks of big files."""
        if self._lists is None:
            from bisync.fs.blocklist import BlockLists  # noqa: PLC0415 -- loads numpy

            self._lists = BlockLists(None if self._dry else self._state_fd)
        return self._lists

    def read(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None] | None = None,
        restart: Callable[[], None] = lambda: None,
        *,
        refuse_writer: bool = False,
        buffer: bytearray | None = None,
    ) -> Version:
        """Read one whole version of a file and record its digest.

        Raises:
            PathError: stale, busy or unreadable.
        """
        index = self._index
        places, known = index.places(node), index.known(node)
        if not places or known is None:
            raise StaleError("it is not there any more")
        row, seen = known
        held = self.holds.get(node)
        if held is not None and held.fd >= 0:
            return self._read_held(row, held, sink)
        dir_fd, name = self._directories.at(places[0])
        lister = self._lister(node, sink) if seen.size >= BIG else None
        if lister is not None:
            self._debts.ask(node, dir_fd, name)
        began = time.monotonic()
        hot = refuse_writer and self._is_hot(node)
        try:
            version = read_version(
                dir_fd,
                name,
                sink,
                expect=seen.fits,
                restart=restart,
                refuse_writer=refuse_writer and held is None and not hot,
                buffer=buffer,
                scan=lister,
            )
        except PathError as error:
            if lister is not None:
                lister.settle(proven=False)
            if not isinstance(error, BusyError | StaleError):
                raise
            # It never rests. Where files can be cloned, one instant of it is to be had.
            instant = self._instant(dir_fd, name, seen, lister)
            if instant is None and hot and sink is not None and lister is not None:
                restart()
                instant = self._whole_instant(node, seen, lister)
            if instant is None:
                raise
            version = instant
        if lister is not None:
            lister.settle(proven=True)
            if version.writer:
                self._debts.pay(node, began, lister)
            version = replace(version, blocks=lister.blocks)
            self.lists.save(node, lister.blocks)
        if row.content.digest != version.digest:
            self._db.begin()
            index.set_digest(node, row.version, version.size, version.digest)
        if version.writer:
            self._db.begin()
            index.distrust(node)  # a file with a writer is never clean
        return version

    def hold(self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]) -> None:
        """Let the files of one database be read at one instant, until ``holds.release()``.

        Args:
            parent: their directory.
            names: all names that such files may have there.
            nodes: those that are there, by the index.

        Raises:
            PathError: stale or busy.
        """
        self._note_held(self.holds.take(parent, names, nodes))

    def hold_declared(
        self,
        top: NodeId,
        rule: Declared,
        nodes: dict[bytes, NodeId],
        agreed: set[NodeId],
        ignores: Callable[[bytes, bool], bool],
        where: bytes,
    ) -> None:
        """Let a declared directory be read at one instant, until ``holds.release()``.

        Args:
            nodes: its files by their paths below it.
            agreed: those that both sides had agreed on, as the index has them.
            ignores: whether a path below it is left alone; and whether that is a directory.
            where: its path, for commands.

        Raises:
            PathError: stale or busy, or it cannot be done.
        """
        index = self._index

        def is_known(node: NodeId, info: os.stat_result) -> bool:
            known = index.known(node) if node in agreed and index.is_trusted(node) else None
            return known is not None and known[1].fits(info)

        directories, links = index.links_below(top)
        taker = Taker(
            rule, lambda: self._directories.open(top), ignores, nodes, directories, links,
            is_known, self._stamp, self.bases,
        )  # fmt: skip
        self._note_held(self.holds.take_declared(taker, where))

    def _stamp(self, node: NodeId | None) -> Stamp | None:
        known = None if node is None else self._index.known(node)
        if known is None:
            return None
        _, seen = known
        return seen.ino, seen.size, seen.mtime_ns, seen.ctime_ns

    def _note_held(self, held: dict[NodeId, HeldFile]) -> None:
        for node, file in held.items():
            known = self._index.known(node)
            if known is None:
                raise StaleError("it is not there any more")
            if not known[1].fits(file.info):
                self._observe_held(known[0], known[1], file)

    def _observe_held(self, row: Node, seen: Seen, file: HeldFile) -> None:
        """A file moved on since it was observed: what is held of it is what it is now."""
        size = file.info.st_size if file.fd < 0 else os.fstat(file.fd).st_size
        identity = self._index.identity(row.id)
        if file.info.st_ino != seen.ino or identity is None:
            raise StaleError("something else has its name")
        now = replace(
            row,
            content=Content(Kind.FILE, size),
            attributes=replace(row.attributes, mtime_ns=file.info.st_mtime_ns),
            ctime_ns=file.info.st_ctime_ns,
            version=row.version + 1,
        )
        self._db.begin()
        self._index.put_node(now, identity[0], seen.ino)
        self._index.distrust(row.id)
        self._index.mark(row.id)

    def _read_held(
        self, row: Node, held: HeldFile, sink: Callable[[Chunk], None] | None
    ) -> Version:
        """Read a file that is held, and record what it is."""
        from bisync.fs.bigfile import Lister  # noqa: PLC0415 -- loads numpy

        size = os.fstat(held.fd).st_size
        blocks = None
        if size >= BIG:
            lister = Lister(
                self.lists.known(row.id),
                workers=self._options.workers,
                sink=sink,
                stop=self._options.stop,
            )
            digest = lister(held.fd, size)
            blocks = lister.blocks
            self.lists.save(row.id, blocks)
        else:
            digest = read_all(held.fd, size, sink=sink)
        if digest is None:
            raise StaleError("it ended too early")
        self._db.begin()
        if (row.content.digest, row.content.size) != (digest, size):
            self._index.set_digest(row.id, row.version, size, digest)
        self._index.distrust(row.id)  # it lives
        return Version(size, digest, writer=False, blocks=blocks)

    def _lister(self, node: NodeId, sink: Callable[[Chunk], None] | None) -> "Lister | Comparer":
        """What reads a big file."""
        from bisync.fs.bigfile import Comparer, Lister  # noqa: PLC0415 -- loads numpy

        known, workers = self.lists.known(node), self._options.workers
        if sink is not None or self._dry:
            return Lister(known, workers=workers, sink=sink, stop=self._options.stop)
        return Comparer(node, known, self.bases, workers=workers, stop=self._options.stop)

    def _instant(
        self, dir_fd: int, name: bytes, seen: Seen, lister: "Lister | Comparer | None"
    ) -> Version | None:
        """What a file is at this very moment; ``None`` where that cannot be frozen.

        A file that has another size than a moment ago is being made, not lived in.
        """
        from bisync.fs.bigfile import Lister  # noqa: PLC0415 -- loads numpy

        if lister is None or isinstance(lister, Lister):
            return None
        with _same_file(dir_fd, name, seen) as found:
            if found is None:
                return None
            fd, _ = found
            digest = lister.instant(fd)
        if digest is None or lister.blocks.size != seen.size:
            return None
        return Version(seen.size, digest, writer=True, instant=True)

    def _is_hot(self, node: NodeId) -> bool:
        path = self._index.path(node) if self._options.hot.active else None
        return path is not None and self._options.hot.ignores(path, is_dir=False)

    def _whole_instant(
        self, node: NodeId, seen: Seen, lister: "Lister | Comparer"
    ) -> Version | None:
        """All of what a file is at this very moment; ``None`` where that cannot be frozen."""
        dir_fd, name = self._directories.at(self._index.places(node)[0])
        with _same_file(dir_fd, name, seen) as found:
            if found is None:
                return None
            fd, _ = found
            frozen = self.bases.freeze(fd)
        if frozen is None:
            return None
        try:
            digest = lister(frozen[0], seen.size)
            if digest is None or os.fstat(frozen[0]).st_size != seen.size:
                self.bases.discard(frozen[1])
                return None
            self.bases.keep(node, frozen, digest)
        except BaseException:
            self.bases.discard(frozen[1])
            raise
        finally:
            os.close(frozen[0])
        return Version(seen.size, digest, writer=True, instant=True)

    def send_changes(
        self, node: NodeId, sink: "ChangeSink", *, refuse_writer: bool = False
    ) -> Version:
        """Tell a receiver what its old version of a big file lacks.

        Raises:
            PathError: stale, busy or unreadable.
        """
        from bisync.fs.bigfile import BasisError, Sender  # noqa: PLC0415 -- loads numpy

        places, known = self._index.places(node), self._index.known(node)
        if not places or known is None:
            raise StaleError("it is not there any more")
        row, seen = known
        refuse_writer = refuse_writer and not self._is_hot(node)
        blocks = self.lists.of(node, row.content.digest)
        if blocks is None:
            blocks = self.read(node, refuse_writer=refuse_writer).blocks
        stop, workers = self._options.stop, self._options.workers
        sender = Sender(sink, blocks, workers=workers, pace=lambda _length: stop(), stop=stop)
        held = self.holds.get(node)
        if held is not None and held.fd >= 0:
            digest = sender(held.fd, os.fstat(held.fd).st_size)
            if digest is None:
                raise StaleError("it ended too early")
            return Version(os.fstat(held.fd).st_size, digest, writer=False)
        dir_fd, name = self._directories.at(places[0])
        try:
            return read_version(
                dir_fd, name, expect=seen.fits, refuse_writer=refuse_writer, scan=sender
            )
        except BasisError:
            raise
        except (BusyError, StaleError):
            digest = row.content.digest
            base = None if digest is None or blocks is None else self.bases.open(node, digest)
            if base is None or digest is None:
                raise
        began = time.monotonic()
        try:  # the instant that was read of a file that never rests
            if sender(base, os.fstat(base).st_size) != digest:
                raise StaleError("its base is not what it should be")
            return Version(os.fstat(base).st_size, digest, writer=False)
        finally:
            os.close(base)
            self._debts.pay_more(node, began)

    def begins(self, place: Place, magic: bytes) -> bool:
        """Whether there is a regular file at a place that begins with some bytes.

        Raises:
            StaleError: its directory is not where it was.
            OSError: it cannot be read.
        """
        dir_fd = self._directories.open(place[0])
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(place[1], flags, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(magic), 0) == magic
        finally:
            os.close(fd)

    def look_at_content(self, node: NodeId) -> Version:
        """Read a file that nobody wrote to since it was observed; nothing is recorded.

        Raises:
            PathError: stale, busy or unreadable.
        """
        places, known = self._index.places(node), self._index.known(node)
        if not places or known is None:
            raise StaleError("it is not there any more")
        spot, expect = self._directories.at(places[0]), known[1].fits
        return read_version(*spot, expect=expect, refuse_writer=True)

    def is_as_observed(self, node: NodeId) -> bool:
        """Whether a file is where and what it was when it was last observed."""
        places, known = self._index.places(node), self._index.known(node)
        if not places or known is None:
            return False
        try:
            dir_fd, name = self._directories.at(places[0])
            info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except (StaleError, OSError):
            return False
        return known[1].fits(info)

    def close(self) -> None:
        """Give everything back."""
        self.holds.release()
        for part in (self._lists, self._bases):
            if part is not None:
                part.close()
        self._lists = self._bases = None


@contextmanager
def _same_file(dir_fd: int, name: bytes, seen: Seen) -> Iterator[tuple[int, os.stat_result] | None]:
    """An observed file, open for reading; ``None`` if it is another one or has another size."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:
        yield None
        return
    try:
        info = os.fstat(fd)
        same = (info.st_ino, info.st_size) == (seen.ino, seen.size)
        yield (fd, info) if same and stat.S_ISREG(info.st_mode) else None
    finally:
        os.close(fd)
