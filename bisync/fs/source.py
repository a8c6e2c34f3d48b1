"""The sources of a mirror: walked and read, never written.

Several sources are one tree: their directories of one name are merged, of anything else the
first one counts, as rsync has it.
"""

import contextlib
import errno
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.filters import Filters
from bisync.core.groups import JOURNALS, MAGIC, names_of_group, stem
from bisync.core.ignore import reserved
from bisync.core.node import ROOT, Content, Kind
from bisync.core.path import STATE_DIR, STORE_DIR
from bisync.core.wish import Seen, Wish
from bisync.errors import PathError, StaleError
from bisync.fs.content import BIG, Chunk, Expected, Scan, Version, read_version
from bisync.fs.holding import stamps, telling
from bisync.fs.meta import attributes_of, kind_of, read_xattrs
from bisync.fs.root import OPEN_DIR
from bisync.fs.stage import refuse_torn
from bisync.fs.starts import Start, read_rules
from bisync.fs.wanted import All, Shallow, Wanted
from bisync.linux.handle import HandleReader

if TYPE_CHECKING:
    from bisync.delta.changes import ChangeSink

log = logging.getLogger(__name__)


_HELD = 64  # descriptors of directories
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class Listed(Struct):
    """What the source holds in one directory."""

    key: int
    path: bytes  # below the root of the transfer
    complete: bool  # nothing in it was left out but what a filter hides
    entries: list[Seen] = field(default_factory=list)
    passed: list[bytes] = field(default_factory=list)  # names of kinds that are not carried


class _Origin(Struct, frozen=True):
    """Where a directory lies: in which source, below which path."""

    start: int
    path: bytes


class Rules(Struct, frozen=True):
    """How sources are walked."""

    wish: Wish
    filters: Filters
    one_file_system: bool = False
    prune_empty: bool = False
    files_from: Wanted | None = None
    stop: Callable[[], None] = lambda: None
    pace: Callable[[int], None] = lambda _n: None  # waits for the right to read so many bytes
    workers: int = 2  # threads that read one big file


class Entries:
    """What was walked of a source, wherever it is."""

    listings: list[Listed]
    root: Seen | None

    def is_single_file(self) -> bool:
        """Whether all of the source is one entry that is no directory."""
        entries = [seen for each in self.listings for seen in each.entries]
        return self.root is None and len(entries) == 1 and not entries[0].is_dir

    def rename_single(self, name: bytes) -> None:
        """The one entry gets another name at the destination."""
        for listed in self.listings:
            for seen in listed.entries:
                seen.name = name

    def directory_inodes(self) -> set[int]:
        """The inode numbers of all directories."""
        return {s.ino for each in self.listings for s in each.entries if s.is_dir}


class SourceTree(Entries):
    """All sources of one run as one tree."""

    def __init__(self, starts: list[Start], rules: Rules) -> None:
        self.starts = starts
        self.rules = rules
        self.problems: list[tuple[bytes, str]] = []
        self.notes: list[tuple[bytes, str]] = []
        self.failed = False  # something could not be looked at
        self.root: Seen | None = None  # whose attributes the destination itself gets
        self.listings: list[Listed] = []
        self._next = ROOT + 1
        self._handles = HandleReader()
        self._held: OrderedDict[_Origin, int] = OrderedDict()
        self._beside: tuple[int, dict[bytes, Seen]] = -1, {}  # the directory asked about last
        self._where: dict[int, tuple[_Origin, bytes]] = {}  # of an entry: directory and name
        self._groups: dict[tuple[int, int], int] = {}
        self._devices: dict[int, int] = {}
        self._by_key: dict[int, Seen] = {}
        self._implied: set[int] = set()
        self._buffer = bytearray(1 << 20)

    # -- walking -------------------------------------------------------------

    def walk(self) -> list[Listed]:
        """Walk everything, parents before what they hold."""
        wanted = self.rules.files_from
        stack = [(ROOT, b"", self._roots(), wanted)]
        while stack:
            key, path, origins, names = stack.pop()
            self.rules.stop()
            everything = names is None or isinstance(names, All)
            whole = self.rules.wish.recursive if everything else isinstance(names, Shallow)
            listed = Listed(key, path, whole)
            subdirs = self._list(listed, origins, names)
            self.listings.append(listed)
            for seen, inside, below in reversed(subdirs):
                child = path + b"/" + seen.name if path else seen.name
                stack.append((seen.key, child, inside, below))
        if self._implied:
            self._leave_out_implied()
        if self.rules.prune_empty:
            self._prune()
        return self.listings

    def _roots(self) -> list["_Inside"]:
        files = self.rules.files_from
        for number, start in enumerate(self.starts):
            if start.only is not None or (files is not None and not files.whole):
                continue
            if self.root is None and (self.rules.wish.recursive or files is not None):
                info = os.fstat(start.fd)
                self.root = self._seen(start.fd, b"", info, ROOT)
                self.root.key = ROOT
                self._where[ROOT] = _Origin(number, b""), b""
        return [
            (_Origin(number, b""), self.rules.filters if start.only else self._under(number))
            for number, start in enumerate(self.starts)
        ]

    def _under(self, number: int) -> Filters:
        """The rules for what a source holds."""
        start = self.starts[number]
        return self.rules.filters.under(start.folder, read_rules, itself=start.only is not None)

    def _list(
        self,
        listed: Listed,
        origins: list["_Inside"],
        wanted: Wanted | None,
    ) -> list[tuple[Seen, list["_Inside"], Wanted | None]]:
        found: dict[bytes, tuple[Seen, list[_Inside]]] = {}
        for origin, above in origins:
            start = self.starts[origin.start]
            alone = start.only if not origin.path else None
            filters = above
            if alone is None:
                filters = above.within(listed.path, partial(self._rules_file, origin))
            try:
                fd = self._open(origin)
                names = self._names(fd, alone, wanted)
            except (PathError, OSError) as error:
                self._fail(listed.path, f"cannot open directory: {_reason(error)}")
                listed.complete = False
                continue
            for name in names:
                self._meet(listed, origin, fd, name, filters, found, wanted)
                if alone is not None and name in found and found[name][0].is_dir:
                    # Rules that lie above it are for what it holds.
                    found[name][1][-1:] = [(found[name][1][-1][0], self._under(origin.start))]
        subdirs = []
        for name, (seen, inside) in found.items():
            implied = seen.key in self._implied
            node = None if wanted is None else wanted.below.get(name)
            if node is not None and node.below and not seen.is_dir:
                parts = [*listed.path.split(b"/"), name, min(node.below)]
                self._fail(b"/".join(filter(None, parts)), os.strerror(errno.ENOTDIR))
                if implied:
                    continue
            listed.entries.append(seen)
            below = self._below(wanted, name, implied=implied)
            if seen.is_dir and seen.listed and self._goes_on(below):
                subdirs.append((seen, inside, below))
        return subdirs

    def _goes_on(self, below: Wanted | None) -> bool:
        if below is None:
            return self.rules.wish.recursive
        return bool(below.below) or isinstance(below, (All, Shallow))

    def _below(self, wanted: Wanted | None, name: bytes, *, implied: bool) -> Wanted | None:
        """What is wanted of a directory; ``implied``: it is only on the way to something."""
        node = None if wanted is None else wanted.below.get(name)
        if wanted is None or (isinstance(wanted, All) and node is None):
            return None
        if node is None or implied:
            return node or Wanted()
        if isinstance(wanted, All) or (node.whole and self.rules.wish.recursive):
            return All(node.below) if node.below else None
        return Shallow(node.below) if node.whole and node.contents else node

    def _names(self, fd: int, alone: bytes | None, wanted: Wanted | None) -> list[bytes]:
        if alone is not None:
            return [alone]
        found: set[bytes] = set() if wanted is None else set(wanted.below)
        if wanted is None or isinstance(wanted, (All, Shallow)):
            found.update(map(os.fsencode, os.listdir(fd)))
        return sorted(found)

    def _meet(
        self,
        listed: Listed,
        origin: _Origin,
        fd: int,
        name: bytes,
        filters: Filters,
        found: dict[bytes, tuple[Seen, list["_Inside"]]],
        wanted: Wanted | None,
    ) -> None:
        start = self.starts[origin.start]
        path = listed.path + b"/" + name if listed.path else name
        try:
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            named = start.only is not None or (wanted is not None and name in wanted.below)
            if named or error.errno != errno.ENOENT:
                self._fail(path, _reason(error))
                listed.complete = False
            return
        is_dir = stat.S_ISDIR(info.st_mode)
        if self._is_ours(fd, name, path, is_dir=is_dir):
            return
        hidden = filters.hides(path, is_dir=is_dir)
        node = None if wanted is None else wanted.below.get(name)
        implied = False  # --files-from names only things below it: no filter is asked about it
        if node is not None and node.below:
            implied = hidden or not (node.whole or isinstance(wanted, All))
        if hidden and not implied:
            return
        below = _Origin(origin.start, origin.path + b"/" + name if origin.path else name)
        inside = below, filters
        known = found.get(name)
        if known is not None and (known[0].is_dir or not is_dir):
            if is_dir:
                known[1].append(inside)
            return  # the first one counts, but a directory before anything else
        if name in listed.passed:
            if not is_dir:
                return
            listed.passed.remove(name)
        if is_dir and not self.rules.wish.recursive and wanted is None:
            listed.passed.append(name)
            self.notes.append((path, "skipping directory"))
            return
        kind = kind_of(info.st_mode)
        if not self.rules.wish.takes(Content(kind)):
            listed.passed.append(name)
            self.notes.append((path, "skipping non-regular file"))
            return
        try:
            seen = self._seen(fd, name, info, listed.key)
        except OSError as error:
            self._fail(path, _reason(error))
            listed.complete = False
            return
        if is_dir and self.rules.one_file_system and info.st_dev != start.device:
            seen.listed = False
            self.notes.append((path, "another file system begins here; an empty directory"))
        if implied:
            self._implied.add(seen.key)
        self._where[seen.key] = origin, name
        self._devices[seen.key] = info.st_dev
        found[name] = seen, [inside]

    def _is_ours(self, fd: int, name: bytes, path: bytes, *, is_dir: bool) -> bool:
        """State and store of a root are no content."""
        if reserved(name, at_root=False):
            return True
        if name == STATE_DIR and is_dir:
            try:
                inside = os.open(name, OPEN_DIR, dir_fd=fd)
            except OSError:
                return True
            try:
                refuse_torn(os.path.dirname(path) or b".", inside)
                return path == STATE_DIR or b"replica" in map(os.fsencode, os.listdir(inside))
            finally:
                os.close(inside)
        if path == STORE_DIR and is_dir:
            self.notes.append((path, "the rollback store; 'bisync rollback merge' takes it over"))
            return True
        return False

    def _seen(self, fd: int, name: bytes, info: os.stat_result, parent: int) -> Seen:
        kind, wish = kind_of(info.st_mode), self.rules.wish
        content = Content(kind)
        match kind:
            case Kind.FILE:
                content = Content(kind, size=info.st_size)
            case Kind.SYMLINK:
                content = Content(kind, target=os.readlink(name, dir_fd=fd))
            case Kind.CHAR | Kind.BLOCK:
                content = Content(kind, rdev=info.st_rdev)
            case _:
                pass
        xattrs, acl = read_xattrs(fd, name) if wish.xattrs or wish.acls else ((), ())
        key = self._next
        self._next += 1
        group = None
        if wish.hard_links and info.st_nlink > 1 and kind is not Kind.DIR:
            group = self._groups.setdefault((info.st_dev, info.st_ino), key)
        attributes = attributes_of(info, xattrs, acl)
        return Seen(key, parent, name, content, attributes, info.st_ino, info.st_ctime_ns, group)

    def _fail(self, path: bytes, reason: str) -> None:
        self.failed = True
        self.problems.append((path, reason))

    def _rules_file(self, origin: _Origin, path: bytes) -> bytes | None:
        name = path.rsplit(b"/", 1)[-1]
        try:
            return read_rules(name, self._open(origin))
        except PathError:
            return None

    def _leave_out_implied(self) -> None:
        """A directory on the way to nothing is not made."""
        empty: set[int] = set()
        for listed in reversed(self.listings):
            listed.entries = [seen for seen in listed.entries if seen.key not in empty]
            if listed.key in self._implied and not listed.entries:
                empty.add(listed.key)
        self.listings = [listed for listed in self.listings if listed.key not in empty]

    def _prune(self) -> None:
        """Leave out the directories that hold nothing but directories.

        A rule that protects an empty directory keeps it, as rsync's manual has it under ``-m``.
        """
        full: set[int] = {ROOT}
        parent = {s.key: s.parent for each in self.listings for s in each.entries if s.is_dir}
        for listed in self.listings:
            full_itself = listed.passed or any(not seen.is_dir for seen in listed.entries)
            if full_itself or self.rules.filters.protects(listed.path, is_dir=True):
                key = listed.key
                while key not in full:
                    full.add(key)
                    key = parent[key]
        self.listings = [each for each in self.listings if each.key in full]
        for listed in self.listings:
            listed.entries = [s for s in listed.entries if not s.is_dir or s.key in full]

    # -- what it is ----------------------------------------------------------

    @property
    def identity(self) -> str:
        """Which roots these are."""
        return " ".join(start.identity for start in self.starts)

    @property
    def location(self) -> bytes:
        """Where they are."""
        return b"\0".join(os.path.realpath(start.text) for start in self.starts)

    @property
    def only_named(self) -> bool:
        """Whether each source is a single name, not what a folder holds."""
        return all(start.only is not None for start in self.starts)

    # -- what the pairing asks -----------------------------------------------

    def handle(self, seen: Seen) -> bytes:
        """The identity of an entry's object; empty if it cannot be told."""
        origin, name = self._where[seen.key]
        start = self.starts[origin.start]
        if self._devices.get(seen.key, start.device) != start.device:
            return b""  # handles of another file system may be the same
        try:
            return b"%d:" % origin.start + self._handles.read(self._open(origin), name)
        except (PathError, OSError):
            return b""

    # -- content -------------------------------------------------------------

    def supply(
        self,
        node: int,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version of a file, by its key.

        A file that is still being written is read like any other: what is read is one state.
        """
        del refuse_writer

        def paced(chunk: Chunk) -> None:
            self.rules.stop()
            if chunk.data is not None:
                self.rules.pace(chunk.length)
            sink(chunk)

        return self._read(self.by_key[node], paced, restart)

    def expect(self, files: Sequence[Expected]) -> None:
        """Nothing is gained by reading ahead here."""

    def database(self, key: int) -> tuple[int, bytes] | None:
        """Which database a file belongs to: the key of the directory, and the name."""
        seen = self.by_key[key]
        files = self._siblings(seen)
        bases = (seen.name, stem(seen.name))
        base = next((b for b in bases if any(b + end in files for end in JOURNALS)), b"")
        if not base:
            return None
        try:
            for end, magic in MAGIC.items():
                if base + end in files and self._begins(seen, base + end, magic):
                    return seen.parent, base
        except (PathError, OSError) as error:
            log.info("not-looked-at name=%s reason=%s", base, error)
        return None

    def _siblings(self, seen: Seen) -> dict[bytes, Seen]:
        if self._beside[0] != seen.parent:
            every = next(each.entries for each in self.listings if each.key == seen.parent)
            self._beside = seen.parent, {one.name: one for one in every}
        return self._beside[1]

    def _begins(self, seen: Seen, name: bytes, magic: bytes) -> bool:
        fd = os.open(
            name,
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK,
            dir_fd=self._open(self._where[seen.key][0]),
        )
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(magic), 0) == magic
        finally:
            os.close(fd)

    def moved(self, nodes: set[int]) -> bool:
        """Whether files of one database are not all what they were when walked."""
        for seen in (self.by_key[node] for node in nodes):
            belongs = self.database(seen.key)
            names = names_of_group(seen.name if belongs is None else belongs[1])
            there = stamps(self._open(self._where[seen.key][0]), names)
            walked = {
                name: (one.ino, one.content.size, one.attributes.mtime_ns, one.ctime_ns)
                for name, one in self._siblings(seen).items()
                if name in names and one.kind is Kind.FILE
            }
            if telling(walked) != telling(there):
                return True
        return False

    def supply_changes(
        self, node: int, sink: "ChangeSink", *, refuse_writer: bool = False
    ) -> Version:
        """Tell a receiver what its old version of a big file lacks."""
        del refuse_writer
        from bisync.fs.bigfile import Sender  # noqa: PLC0415 -- loads numpy

        def pace(length: int) -> None:
            self.rules.stop()
            self.rules.pace(length)

        sender = Sender(sink, None, workers=self.rules.workers, pace=pace, stop=self.rules.stop)
        return self._read(self.by_key[node], None, lambda: None, sender)

    def digest(self, seen: Seen) -> bytes | None:
        """The digest of a file; ``None`` if it cannot be read now."""
        with contextlib.suppress(PathError):
            return self._read(seen, None, lambda: None).digest
        return None

    @property
    def by_key(self) -> dict[int, Seen]:
        """All entries by key; made once the walk is over."""
        if not self._by_key:
            self._by_key = {s.key: s for each in self.listings for s in each.entries}
        return self._by_key

    def _read(
        self,
        seen: Seen,
        sink: Callable[[Chunk], None] | None,
        restart: Callable[[], None],
        scan: Scan | None = None,
    ) -> Version:
        origin, name = self._where[seen.key]

        def expect(info: os.stat_result) -> bool:
            return info.st_ino == seen.ino and stat.S_ISREG(info.st_mode)

        fd = self._open(origin)
        if scan is None and seen.content.size >= BIG:
            from bisync.fs.bigfile import Lister  # noqa: PLC0415 -- loads numpy

            scan = Lister.fresh(sink, workers=self.rules.workers)
        version = read_version(
            fd, name, sink, expect=expect, restart=restart, buffer=self._buffer, scan=scan
        )
        return replace(version, blocks=getattr(scan, "blocks", None))

    # -- descriptors ---------------------------------------------------------

    def _open(self, origin: _Origin) -> int:
        """A held descriptor of a directory; links are not followed on the way.

        Raises:
            StaleError: it is not there any more.
        """
        if not origin.path:
            return self.starts[origin.start].fd
        if origin in self._held:
            self._held.move_to_end(origin)
            return self._held[origin]
        fd, opened = self.starts[origin.start].fd, -1
        parent, _, name = origin.path.rpartition(b"/")
        above = _Origin(origin.start, parent)
        try:
            if above in self._held or not parent:
                fd = self._open(above)
                opened = os.open(name, OPEN_DIR, dir_fd=fd)
            else:
                for part in origin.path.split(b"/"):
                    below = os.open(part, OPEN_DIR, dir_fd=fd if opened < 0 else opened)
                    if opened >= 0:
                        os.close(opened)
                    opened = below
        except OSError as error:
            if error.errno in _GONE:
                raise StaleError("it was moved or replaced") from error
            raise
        self._held[origin] = opened
        if len(self._held) > _HELD:
            _, old = self._held.popitem(last=False)
            os.close(old)
        return opened

    def close(self) -> None:
        """Give all descriptors back."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()
        for start in self.starts:
            os.close(start.fd)
        self.starts = []


_Inside = tuple[_Origin, Filters]
"""Where a directory lies, and the rules as they stand above it."""


def _reason(error: Exception) -> str:
    if isinstance(error, PathError):
        return error.reason
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
