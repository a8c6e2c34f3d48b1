"""The scan: compare the tree with the index, record what differs, prove what vanished.

An entry whose stamp (inode, size, times, mode, owner, links) equals the recorded one is
unchanged and costs one comparison; the rest is looked at: handle, attributes, target.

A scan is not an instant: a file moved from a directory not yet listed into one already
listed is in no listing. So a node without a name has only *vanished*; it counts as
deleted when its handle is stale or unlinked, when it now lives outside the root, or,
where handles may not be opened, when listing again found nothing new.
"""

import errno
import os
import time
from collections.abc import Callable

from msgspec import Struct, field

from bisync.core.ignore import Matcher, reserved
from bisync.core.node import ROOT, Content, Kind, Node, NodeId, Place
from bisync.core.path import STATE_DIR, TEMP_PREFIX, display
from bisync.errors import HaltError, StaleError
from bisync.fs.index import NO_STAMP, Index, stamp_of
from bisync.fs.look import stamp
from bisync.fs.meta import attributes_of, kind_of, read_xattrs
from bisync.fs.observe import differs, known_as, observe
from bisync.fs.proof import is_gone
from bisync.fs.root import OPEN_DIR, Directories, Root, is_a_root
from bisync.linux.encryption import can_encrypt, is_encrypted, is_locked

_RACY_NS = 50_000_000  # a change in the same clock tick as the look leaves no trace
_RACY_COARSE_NS = 2_000_000_000  # where times are kept in whole seconds
_ROUNDS = 5


class Problem(Struct, frozen=True):
    """One path that could not be handled; everything else goes on."""

    path: bytes
    reason: str
    kind: str = "problem"  # problem | busy | skipped | boundary


class ScanRules(Struct, frozen=True):
    """What a scan leaves alone."""

    matcher: Matcher
    store: bytes | None = None  # path of the rollback store below the root
    specials: bool = False  # FIFOs and sockets
    devices: bool = False


class ScanResult(Struct):
    """What a scan met."""

    entries: int = 0
    changed: int = 0
    vanished: int = 0
    problems: list[Problem] = field(default_factory=list)
    frozen: dict[NodeId, str] = field(default_factory=dict)  # known, but not to be looked at now


class _Listing(Struct):
    """One directory while it is listed."""

    fd: int
    node: NodeId
    prefix: bytes  # of its entries' paths
    known: dict[bytes, tuple[NodeId, bytes]]  # names not met yet, with node and stamp
    subdirs: list[tuple[Place, NodeId, bytes]] = field(default_factory=list)
    foreign: bool = False
    count: int = 0


class Scanner:
    """Scans one tree into its index. The index's transaction is the caller's."""

    def __init__(
        self,
        root: Root,
        index: Index,
        rules: ScanRules,
        *,
        stop: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda _n: None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.root = root
        self.index = index
        self.rules = rules
        self.result = ScanResult()
        self._stop = stop
        self._progress = progress
        self._clock = clock
        self._now = 0
        self._lost: dict[NodeId, list[Place]] = {}
        self._partial = False  # only some directories are listed
        self._covered = False  # something is mounted over what is known
        self._renamed: dict[NodeId, Place] = {}  # known nodes, and where else they were found
        self._news = 0  # names found that were not known to lead to their node
        self._fresh = index.node(ROOT) is None  # nothing to look up yet
        self._may_encrypt = can_encrypt(root.fd)
        self._matcher = rules.matcher if rules.matcher.active else None

    # -- entry points --------------------------------------------------------

    def scan(self) -> ScanResult:
        """Scan the whole tree."""
        self._now = self._clock()
        self._look_at_root()
        self._walk_all()
        self._prove_vanished()
        return self.result

    def rescan(self, nodes: set[NodeId]) -> ScanResult:
        """List some directories again, and what is new below them."""
        self._partial = True
        self._now = self._clock()
        directories = Directories(self.root, self.index)
        try:
            moved = [node for node in nodes if not self._list_known(directories, node)]
            self._drop_former_names(directories)
            for node in moved:
                if not self._list_known(directories, node):
                    self._lose_way(directories, node)
        finally:
            directories.close()
        self._prove_vanished()
        return self.result

    def _list_known(self, directories: Directories, node: NodeId) -> bool:
        """List a directory of the index; ``False``: it is not where the index has it."""
        path = self.index.path(node)
        if path is None:
            return True
        if node == ROOT:
            self._look_at_root()
        try:
            fd = os.open(b".", OPEN_DIR, dir_fd=directories.open(node))
        except (StaleError, FileNotFoundError):
            return False
        except OSError as error:
            self._freeze(node, path, f"cannot open directory: {error.strerror}", "problem")
            return True
        try:
            if node == ROOT or self._look_at_itself(directories, node, path, fd):
                self._list(fd, node, path, only_new=True)
        finally:
            os.close(fd)
        return True

    def _look_at_itself(self, directories: Directories, node: NodeId, path: bytes, fd: int) -> bool:
        """What was done in a directory changed its time: nobody may take the old one for it.

        What its parent's listing has to do with it is left to that: to look into all of it, too,
        where nothing is vouched for (``NO_STAMP``), or into what took its place just now.
        """
        for place in self.index.places(node):
            try:
                parent, name = directories.at(place)
                info = os.stat(name, dir_fd=parent, follow_symlinks=False)
                now, known = stamp(info), self.index.stamp(place)
                if now != known and os.path.samestat(info, os.fstat(fd)):
                    found = self._look(parent, place, path, info, now, (node, known))
                    if known == NO_STAMP or found != node:
                        self.index.set_stamp(place, NO_STAMP)
            except (FileNotFoundError, StaleError):
                pass  # it goes just now, which its parent will tell
            except OSError as error:
                self._freeze(node, path, f"cannot be looked at: {error.strerror}", "problem")
                return False
        return True

    def _lose_way(self, directories: Directories, node: NodeId) -> None:
        """It, or one above, is not where it was, nor was it met elsewhere: it has to be found.

        Who leaves that to the listing of its parent finds nothing if it comes back in time.
        """
        chain: list[tuple[Place, NodeId]] = []
        while node != ROOT and (places := self.index.places(node)):
            chain.append((places[0], node))
            node = places[0][0]
        for place, each in reversed(chain):
            try:
                os.close(os.open(b".", OPEN_DIR, dir_fd=directories.open(each)))
            except (StaleError, FileNotFoundError):
                if self._is_covered(directories, place):
                    self._cover(each, self.index.path(each) or place[1])
                else:
                    self._lose(place, each)
                return
            except OSError:
                return  # it is frozen

    def _is_covered(self, directories: Directories, place: Place) -> bool:
        """Whether something is mounted at a place; what is below that is still there."""
        try:
            fd = directories.open(place[0])
            info = os.stat(place[1], dir_fd=fd, follow_symlinks=False)
            return self._is_boundary(fd, place[1], info)
        except (StaleError, OSError):
            return False

    def _is_boundary(self, fd: int, name: bytes, info: os.stat_result) -> bool:
        root = self.root
        return info.st_dev != root.device or root.handles.mount_id(fd, name) != root.mount

    def _cover(self, node: NodeId, path: bytes) -> None:
        """Nobody can say what is under a mount: that stays, and so does what may be there now."""
        self._freeze(node, path, "something is mounted there")
        self._covered = True

    # -- walking -------------------------------------------------------------

    def _walk_all(self) -> None:
        self._walk(os.open(b".", OPEN_DIR, dir_fd=self.root.fd), ROOT, b"")

    def _walk(self, fd: int, node: NodeId, path: bytes) -> None:
        """Depth first; one descriptor per level is held, the first one is given."""
        stack: list[tuple[int, list[tuple[Place, NodeId, bytes]]]] = [(fd, [])]
        try:
            stack[0] = (fd, self._list(fd, node, path))
            while stack:
                parent, todo = stack[-1]
                if not todo:
                    stack.pop()
                    os.close(parent)
                    continue
                place, child, child_path = todo.pop()
                try:
                    below = os.open(place[1], OPEN_DIR, dir_fd=parent)
                except OSError as error:
                    self._cannot_open(error, place, child, child_path)
                    continue
                stack.append((below, []))
                stack[-1] = (below, self._list(below, child, child_path))
        finally:
            for open_fd, _ in stack:
                os.close(open_fd)

    def _cannot_open(self, error: OSError, place: Place, node: NodeId, path: bytes) -> None:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            # Moved or replaced since it was listed, and not looked into: whatever comes next, it
            # must not count as known here.
            self._lose(place, node)
            return
        self._freeze(node, path, f"cannot open directory: {error.strerror}", "problem")

    def _freeze(self, node: NodeId, path: bytes, reason: str, kind: str = "boundary") -> None:
        """What is known of a node and of everything below it stays as it is, on both sides."""
        self.result.problems.append(Problem(path, reason, kind))
        self.result.frozen[node] = reason
        for place in self.index.places(node) if kind == "problem" else ():
            self.index.set_stamp(place, NO_STAMP)  # it is looked into as soon as that works
        self._set_foreign(node, foreign=True)

    def _list(
        self, fd: int, node: NodeId, path: bytes, *, only_new: bool = False
    ) -> list[tuple[Place, NodeId, bytes]]:
        """List one directory; return its sub-directories (those new to the index if asked)."""
        self._stop()
        if self._is_closed(fd, node, path):
            return []
        listing = _Listing(fd, node, path + b"/" if path else b"", self.index.listing(node))
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._meet(entry, listing, only_new=only_new)
        except OSError as error:
            self._freeze(node, path, f"cannot list: {error.strerror}", "problem")
            return listing.subdirs
        if self._is_locked(fd):
            raise HaltError(f"{display(path)}: was locked while it was listed; nothing was touched")
        for name, (gone, _) in listing.known.items():
            self._lose((node, name), gone)
        self.result.entries += listing.count
        self._progress(listing.count)
        self._set_foreign(node, foreign=listing.foreign)
        if not only_new:
            return listing.subdirs
        for place, child, child_path in listing.subdirs:
            try:
                below = os.open(place[1], OPEN_DIR, dir_fd=fd)
            except OSError as error:
                self._cannot_open(error, place, child, child_path)
                continue
            self._walk(below, child, child_path)
        return []

    def _is_closed(self, fd: int, node: NodeId, path: bytes) -> bool:
        """Whether a directory must not be looked into at all; it is frozen then."""
        try:
            closed = node != ROOT and is_a_root(fd)
        except OSError as error:
            self._freeze(node, path, f"cannot look into it: {error.strerror}", "problem")
            return True
        if closed:
            self._freeze(node, path, "another root of bisync begins here; left alone")
            return True
        if self._is_locked(fd):
            if node == ROOT:
                raise HaltError("the root is encrypted and locked; unlock it first")
            self._freeze(node, path, "encrypted and locked; left alone", "problem")
            return True
        return False

    def _meet(self, entry: os.DirEntry[str], at: _Listing, *, only_new: bool) -> None:
        """One entry of a directory: left alone, unchanged, or looked at."""
        name = os.fsencode(entry.name)
        path = at.prefix + name
        if (name[:7] == STATE_DIR and self._is_ours(name, at)) or path == self.rules.store:
            return
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            self._cannot_stat(error, name, at)
            return
        mode = info.st_mode
        is_dir = mode & 0o170000 == 0o040000
        if self._matcher is not None and self._matcher.ignores(path, is_dir=is_dir):
            at.foreign = True
            if name in at.known:
                self._forget((at.node, name), at.known.pop(name)[0])
            return
        at.count += 1
        row = at.known.pop(name, None)
        stamp = stamp_of(
            info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, mode, info.st_uid,
            info.st_gid, info.st_nlink,
        )  # fmt: skip
        child: NodeId | None
        if row is not None and row[1] == stamp:
            child = row[0]
        else:
            try:
                child = self._look(at.fd, (at.node, name), path, info, stamp, row)
            except FileNotFoundError:
                if row is not None:
                    at.known[name] = row
                return
            if child is None:
                at.foreign = True
                if row is not None and is_dir:
                    self.result.frozen[row[0]] = "something is mounted there"
                    self._covered = True
                elif row is not None:
                    self._lose((at.node, name), row[0])  # a skipped kind took its name
                return
        if is_dir and not (only_new and row and row[0] == child and row[1] != NO_STAMP):
            at.subdirs.append(((at.node, name), child, path))

    def _is_ours(self, name: bytes, at: _Listing) -> bool:
        """Whether a name is the engine's; a user's file in its form is said."""
        if not reserved(name, at_root=at.node == ROOT):
            return False
        if name.startswith(TEMP_PREFIX):
            at.foreign = True
            reason = "named like a temporary file of bisync"
            self.result.problems.append(Problem(at.prefix + name, reason, "skipped"))
        return True

    def _cannot_stat(self, error: OSError, name: bytes, at: _Listing) -> None:
        at.foreign = True
        row, reason = at.known.pop(name, None), error.strerror or str(error)
        if row is None:
            self._problem(at.prefix + name, reason)
        else:
            self._freeze(row[0], at.prefix + name, reason, "problem")

    def _is_locked(self, fd: int) -> bool:
        """Whether a directory's names are not its real ones just now."""
        return self._may_encrypt and is_encrypted(fd) and is_locked(fd)

    # -- looking -------------------------------------------------------------

    def _look_at_root(self) -> None:
        info = os.fstat(self.root.fd)
        xattrs, acl = read_xattrs(self.root.fd, b"")
        attributes = attributes_of(info, xattrs, acl)
        old = self.index.node(ROOT)
        foreign = old.foreign if old is not None else False
        node = Node(ROOT, Content(Kind.DIR), attributes, info.st_ctime_ns, 0, foreign, 1)
        if old is None or old.attributes != attributes:
            self.index.put_node(node, self.root.handles.read(self.root.fd, b""), info.st_ino)
            self.index.mark(ROOT)

    def _look(
        self,
        fd: int,
        place: Place,
        path: bytes,
        info: os.stat_result,
        stamp: bytes,
        row: tuple[NodeId, bytes] | None,
    ) -> NodeId | None:
        """Record an entry that is new or differs; ``None`` if it is left alone."""
        name = place[1]
        kind = kind_of(info.st_mode)
        if kind in (Kind.FIFO, Kind.SOCKET) and not self.rules.specials:
            self.result.problems.append(Problem(path, f"{kind.name.lower()} skipped", "skipped"))
            return None
        if kind in (Kind.CHAR, Kind.BLOCK) and not self.rules.devices:
            self.result.problems.append(Problem(path, "device skipped", "skipped"))
            return None
        if kind is Kind.DIR and self._is_boundary(fd, name, info):
            reason = "another file system or subvolume begins here; left alone"
            self.result.problems.append(Problem(path, reason, "boundary"))
            return None
        handle = self.root.handles.read(fd, name)
        here = None if row is None else row[0]
        old = None
        if not self._fresh or info.st_nlink > 1:
            old = known_as(self.root, self.index, handle, kind, info, here)
        proven = row is not None and old is not None and row[0] == old.id and row[1] != NO_STAMP
        node = observe(self.index, fd, name, kind, info, old, proven=proven)
        if old is None and not self.index.insert_node(node, handle, info.st_ino):
            # Seen before in this scan, under another name.
            old = known_as(self.root, self.index, handle, kind, info, here)
            node = observe(self.index, fd, name, kind, info, old, proven=False)
            if old is None:
                self.index.insert_node(node, handle, info.st_ino)
        racy = self._is_racy(info)
        trusted = kind is not Kind.FILE or not racy
        changed = old is None or row is None or row[0] != node.id or differs(old, node)
        if changed or (old is not None and node.version != old.version):
            if old is not None:
                self.index.put_node(node, handle, info.st_ino)
            self.index.mark(node.id)
            self.result.changed += 1
        elif old != node:
            self.index.put_node(node, handle, info.st_ino)
        self.index.put_name(place, node.id, stamp if trusted else NO_STAMP)
        if row is None or row[0] != node.id:
            self._news += 1
            if old is not None:
                self._renamed[node.id] = place
                if kind is Kind.DIR and self._partial:
                    self._untangle(node.id, place[0])
            self.index.db.execute("DELETE FROM forgotten WHERE node=?", (node.id,))
            if row is not None:
                self._lost.setdefault(row[0], []).append(place)
                self.index.mark(row[0])
        return node.id

    def _is_racy(self, info: os.stat_result) -> bool:
        coarse = info.st_ctime_ns % 1_000_000_000 == 0
        window = _RACY_COARSE_NS if coarse else _RACY_NS
        return info.st_ctime_ns > self._clock() - window

    def _set_foreign(self, node: NodeId, *, foreign: bool) -> None:
        self.index.db.execute(
            "UPDATE node SET foreigners=? WHERE id=? AND foreigners<>? AND kind=?",
            (int(foreign), node, int(foreign), int(Kind.DIR)),
        )

    def _problem(self, path: bytes, reason: str) -> None:
        self.result.problems.append(Problem(path, reason))

    # -- vanishing -----------------------------------------------------------

    def _forget(self, place: Place, node: NodeId) -> None:
        """A filter hides a name now: nobody deleted anything."""
        self.index.drop_name(place)
        todo = [node]
        while todo:
            current = todo.pop()
            if self.index.places(current):
                continue
            self.index.forget(current)
            self.index.mark(current)
            for name, child in self.index.children([current])[current]:
                self.index.drop_name((current, name))
                todo.append(child)

    def _drop_former_names(self, directories: Directories) -> None:
        """Where a node cannot have so many names, some are former ones.

        The directory that it left may not be among those that are listed now: whoever told us of
        the other one tells of that in a moment.
        """
        for id_, found in self._renamed.items():
            node, places = self.index.node(id_), self.index.places(id_)
            if node is None or len(places) <= (most := max(node.nlink, 1)):
                continue
            for place in places:
                if place != found and (most == 1 or self._has_left(directories, place, id_)):
                    self._lose(place, id_)

    def _untangle(self, node: NodeId, parent: NodeId) -> None:
        """A directory was found in another one: that one is not below it, whatever was known."""
        seen = set[NodeId]()
        while parent != ROOT and parent not in seen:
            seen.add(parent)
            places = self.index.places(parent)
            for place in places:
                if place[0] == node:
                    self._lose(place, parent)
            if not places:
                return
            parent = places[0][0]

    def _has_left(self, directories: Directories, place: Place, node: NodeId) -> bool:
        """Whether a place is known not to lead to a node any more; who cannot look does not know.

        A directory that is elsewhere now has its names all the same.
        """
        known = self.index.identity(node)
        try:
            handle = self.root.handles.read(directories.open(place[0]), place[1])
        except FileNotFoundError:
            return True
        except (StaleError, OSError):
            return False
        return known is None or known[0] != handle

    def _lose(self, place: Place, node: NodeId) -> None:
        self.index.drop_name(place)
        self.index.mark(node)
        self._lost.setdefault(node, []).append(place)

    def _prove_vanished(self) -> None:
        """Decide about every node that lost its last name; undo what cannot be proven."""
        for _ in range(_ROUNDS):
            unproven = self._settle_lost()
            if not unproven:
                return
            before = self._news
            self._lost = {node: places for node, (places, _) in unproven.items()}
            self._walk_all()
            if self._news != before:
                continue
            # A whole round found nothing new and the old names are still free: whatever
            # could not be asked by handle is gone, unless it may sit where nobody can look.
            blind = self._covered or any(p.kind == "problem" for p in self.result.problems)
            unproven = self._settle_lost()
            todo = [(n, p) for n, (p, alive) in unproven.items() if not alive and not blind]
            if blind and unproven:
                reason = f"{len(unproven)} vanished entries wait until everything can be looked at"
                self.result.problems.append(Problem(b"", reason, "note"))
            self._restore({n: p for n, (p, alive) in unproven.items() if alive or blind})
            while todo:
                node, _places = todo.pop()
                if not self.index.places(node) and self.index.identity(node) is not None:
                    todo += self._gone(node)
            return
        self._restore({node: places for node, (places, _) in self._settle_lost().items()})

    def _restore(self, nodes: dict[NodeId, list[Place]]) -> None:
        """Not proven gone: it stays as it was until the next cycle."""
        for node, places in nodes.items():
            # Its name may have a new owner, and it may be where nobody can look: then it waits
            # under a name that no object has, and nothing is done about it or below it.
            waiting = (places[0][0], TEMP_PREFIX + b"%032x" % node)
            free = [p for p in places if p != waiting and not self.index.at([p])]
            for place in free or [waiting]:
                self.index.put_name(place, node, NO_STAMP)
            if not free:
                self.result.frozen[node] = "it vanished, and it cannot be told where to"

    def _settle_lost(self) -> dict[NodeId, tuple[list[Place], bool]]:
        """Settle what identity can settle; the rest with whether it is known to be alive."""
        unproven: dict[NodeId, tuple[list[Place], bool]] = {}
        lost, self._lost = self._lost, {}
        todo = list(lost.items())
        while todo:
            node, places = todo.pop()
            known = self.index.identity(node)
            if known is None or self.index.places(node):
                continue  # it has another name: moved, or a hard link
            gone = is_gone(self.root, known[0], self._is_left_alone)
            if gone:
                todo += self._gone(node)
            else:
                unproven[node] = (places, gone is False)
        return unproven

    def _gone(self, node: NodeId) -> list[tuple[NodeId, list[Place]]]:
        """A node is proven gone; what was below it has lost its name there."""
        self.result.vanished += 1
        self.result.changed += 1
        below = []
        for name, child in self.index.children([node])[node]:
            self.index.drop_name((node, name))
            self.index.mark(child)
            below.append((child, [(node, name)]))
        self.index.drop_node(node)
        return below

    def _is_left_alone(self, path: bytes) -> bool:
        parts = path.split(b"/")
        for i, name in enumerate(parts):
            above = b"/".join(parts[: i + 1])
            if reserved(name, at_root=i == 0) or above == self.rules.store:
                return True
            if self.rules.matcher.ignores(above, is_dir=i < len(parts) - 1):
                return True
        return False
