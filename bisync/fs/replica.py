"""A replica: one root with its state folder, index, stage, store and lock.

Opening a replica touches nothing; :meth:`Replica.establish` makes its state once it is
clear that this root may be written at all.
"""

import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.hot import Allowance
from bisync.core.ignore import Matcher, reserved
from bisync.core.method import BASE_CLONES, Apply
from bisync.core.node import Kind, NodeId
from bisync.core.path import STORE_DIR, display
from bisync.errors import (
    EndpointError,
    UsageError,
)
from bisync.fs.archive import PairState, pair_states
from bisync.fs.bases import may_serve, remove_base, remove_oldest
from bisync.fs.conflicts import ConflictList
from bisync.fs.contents import Contents
from bisync.fs.database import FORMAT, Database, StateDamagedError, is_sound
from bisync.fs.facts import FILE as FACTS
from bisync.fs.facts import PairFacts, RootFacts, facts
from bisync.fs.incoming import Arrived, not_told
from bisync.fs.index import Index
from bisync.fs.root import OPEN_DIR, Directories, Root
from bisync.fs.sizes import Sizes, sizes
from bisync.fs.stage import Stage
from bisync.fs.statefolder import Marker, StateFolder
from bisync.fs.store import Store, has_room
from bisync.fs.turns import Patience
from bisync.fs.walk import Scanner, ScanResult, ScanRules

log = logging.getLogger(__name__)
_LOST_LOG = "lost_log"
_SAMPLE = 200  # names looked at to tell whether a tree is still the one the index knows


class Options(Struct, frozen=True):
    """How a replica is opened."""

    rules: ScanRules
    store: bytes = STORE_DIR  # path below the root; absolute: somewhere else
    store_day: str | None = None  # the folder in it that takes everything; None: today's
    state_dir: str | None = None  # holds state folders outside the roots
    workers: int = 2
    whole_files: bool = False  # never make a new version of a file from the old one
    apply: Apply = Apply.AUTO
    hot: Matcher = field(default_factory=lambda: Matcher(()))  # files that are never closed
    # Of hot files; None: they may cost anything.
    allowance: Allowance | None = field(default_factory=Allowance)
    base_clones: int = BASE_CLONES  # how many big files may have a base
    fsync: bool = True
    stop: Callable[[], None] = lambda: None
    arrived: Arrived = not_told
    wait_s: float | None = None  # for another engine that works on the root; None: while it lives
    session: str = ""  # of which it is opened as a side
    wanted: Callable[[], None] | None = None  # called when somebody waits for the root


class Replica:
    """One root and everything that belongs to it."""

    def __init__(self, path: bytes, options: Options) -> None:
        """Open the root and read the state if there is any.

        Raises:
            UsageError: no directory there, or its state is newer than this version.
            RootLockedError: another engine holds it.
        """
        self.options = options
        self.root = Root(path)
        self.path = self.root.path
        self.db: Database | None = None
        self.marker: Marker | None = None
        self.damaged = ""  # what could not be read of the state
        self.lost_log = False  # there was state, and its result log is not to be had
        self._stage: Stage | None = None
        self._store: Store | None = None
        self._index: Index | None = None
        self._directories: Directories | None = None
        self._contents: Contents | None = None
        self._outside = -1  # what a store elsewhere is opened from
        try:
            patience = Patience(options.session, options.wait_s, options.stop)
            self.folder = StateFolder(self.root, options.state_dir, patience, options.wanted)
        except BaseException:
            self.root.close()
            raise
        try:
            self.marker = self.folder.read_marker()
            self.damaged = self.folder.damaged
            if self.marker is not None:
                self._open_database()
        except BaseException:
            self.close()
            raise

    # -- opening -------------------------------------------------------------

    def _open_database(self) -> None:
        path = self.folder.database_path
        try:
            os.stat(path)
        except FileNotFoundError:
            self.damaged = "state.db is missing"
        except OSError as error:
            text = f"{os.fsdecode(self.path)}: cannot read its state: {error.strerror}"
            raise EndpointError(text) from error
        try:
            self._use(Database(path))
        except StateDamagedError as error:
            if is_sound(path):
                raise EndpointError(f"{error}; reading it failed just now") from error
            self.damaged = str(error)
            self.set_aside()
            self._use(Database(path))
        self.lost_log = self.damaged != "" or self.database.get(_LOST_LOG) is not None
        if self.damaged:
            # Whoever opens this next finds an empty log, and must not take it for the whole one.
            self.database.begin()
            self.database.put(_LOST_LOG, 1)
            self.database.commit()

    def settled(self) -> None:
        """The stage is empty: from now on the log says all there is to be said. No commit."""
        self.database.execute("DELETE FROM meta WHERE key=?", (_LOST_LOG,))
        self.lost_log = False

    def set_aside_if_damaged(self) -> bool:
        """Move the database away if it cannot be read; whether that was so."""
        had_one = self.db is not None
        self.detach()
        damaged = had_one and not is_sound(self.folder.database_path)
        if damaged:
            self.set_aside()  # the next opening finds it missing, and the log lost
        return damaged

    def _use(self, db: Database) -> None:
        try:
            self.db = db
            self._index = Index(db)
            pair_states(db)
        except BaseException:
            db.close()
            self.db = None
            raise

    def set_aside(self) -> None:
        """Move an unreadable database away, for a person to look at; nothing is deleted."""
        for number in range(1, 1000):
            try:
                os.stat(b"state.db.damaged-%d" % number, dir_fd=self.folder.fd)
            except FileNotFoundError:
                break
        for suffix in (b"", b"-wal", b"-shm"):
            try:
                os.rename(
                    b"state.db" + suffix,
                    b"state.db.damaged-%d%s" % (number, suffix),
                    src_dir_fd=self.folder.fd,
                    dst_dir_fd=self.folder.fd,
                )
            except FileNotFoundError:
                continue

    # -- making and changing state -------------------------------------------

    @property
    def known(self) -> bool:
        """Whether readable state was found when the root was opened."""
        return self.marker is not None and not self.damaged

    @property
    def became_link(self) -> bool:
        """Whether a symlink stands where the root's own directory was the last time."""
        m, root = self.marker, self.root
        return m is not None and root.is_link and not m.link and m.given == display(root.given)

    @property
    def moved(self) -> bool:
        """Whether the state was made for another root object than this one."""
        return self.marker is not None and self.marker.root != self.root.identity.text()

    def establish(self) -> None:
        """Make the state folder, or complete it; idempotent."""
        self.folder.make()
        given = display(self.root.given)
        if self.marker is None:
            self.marker = Marker(
                FORMAT,
                os.urandom(16).hex(),
                os.urandom(16).hex(),
                os.uname().nodename,
                self.root.identity.text(),
                os.urandom(16).hex(),
                given,
                self.root.is_link,
            )
            self.folder.write_marker(self.marker)
        if (self.marker.given, self.marker.link) != (given, self.root.is_link):
            self.marker = replace(self.marker, given=given, link=self.root.is_link)
            self.folder.write_marker(self.marker)
        if self.db is None:
            self._open_database()
        # From here on all that there is to know is on disk, for whoever meets this root next.
        self.damaged = ""
        if self._stage is None:
            self._stage = Stage(self.folder.fd, workers=self.options.workers)

    def become_ephemeral(self) -> None:
        """Keep everything in memory: a plan changes nothing, not even state."""
        if self.db is None:
            self._use(Database(None))

    def detach(self) -> None:
        """Go on as if there were no state; what is on disk stays untouched."""
        if self.db is not None:
            self.db.close()
            self.db = None
        self._index = self._directories = None
        self._close_contents()
        self.marker = None

    def new_identity(self) -> None:
        """This root is a copy of another replica: it becomes one of its own, without state."""
        had_state = self.db is not None
        self.detach()
        if had_state:
            self.set_aside()
        self.establish()

    def new_incarnation(self) -> None:
        """The tree is the one we knew, every object in it is new: forget all identities."""
        assert self.marker is not None
        self.marker = replace(
            self.marker,
            incarnation=os.urandom(16).hex(),
            host=os.uname().nodename,
            root=self.root.identity.text(),
        )
        db = self.database
        db.begin()
        for table in ("node", "name", "mark", "forgotten", "halfway"):
            db.execute(f"DELETE FROM {table}")
        db.commit()
        self.folder.write_marker(self.marker)

    # -- parts ---------------------------------------------------------------

    @property
    def database(self) -> Database:
        """The open database."""
        if self.db is None:
            raise EndpointError(f"{os.fsdecode(self.path)}: its state is not open")
        return self.db

    @property
    def index(self) -> Index:
        """The index."""
        if self._index is None:
            self._index = Index(self.database)
        return self._index

    @property
    def conflicts(self) -> ConflictList:
        """The conflict list."""
        return ConflictList(self.database)

    @property
    def stage(self) -> Stage:
        """The stage."""
        if self._stage is None:
            raise EndpointError(f"{os.fsdecode(self.path)}: its stage is not open")
        return self._stage

    @property
    def store(self) -> Store:
        """The rollback store; made on disk when first needed."""
        if self._store is None:
            assert self.marker is not None
            name, base = self.options.store, self.root.fd
            if name.startswith(b"/"):
                base, name = self._outside_fd(), name.lstrip(b"/")
            self._store = Store(
                base, name, self.marker.replica[:8], self.folder.fd, day=self.options.store_day
            )
        return self._store

    def _outside_fd(self) -> int:
        if self._outside < 0:
            self._outside = os.open(b"/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._outside

    @property
    def directories(self) -> Directories:
        """Held directory descriptors."""
        if self._directories is None:
            self._directories = Directories(self.root, self.index)
        return self._directories

    # -- observing -----------------------------------------------------------

    def rest(self) -> None:
        """Be in nobody's way: a folder that is held open cannot be locked or unmounted."""
        if self._directories is not None:
            self._directories.let_go()

    def is_empty(self) -> bool:
        """Whether the tree holds nothing but what is the engine's own."""
        fd = os.open(b".", OPEN_DIR, dir_fd=self.root.fd)
        try:
            names = [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)
        return all(reserved(n, at_root=True) or n == self.options.store for n in names)

    def looks_familiar(self) -> bool:
        """Whether the tree is the one the index knows, going by names, sizes and times."""
        index = self.index
        rows = self.database.execute(
            "SELECT parent, name, node FROM name WHERE node IN "
            "(SELECT id FROM node WHERE kind=? ORDER BY random() LIMIT ?)",
            (int(Kind.FILE), _SAMPLE),
        ).fetchall()
        fits = 0
        for parent, name, node in rows:
            known = index.node(node)
            try:
                info = os.stat(
                    index.place_path((parent, name)), dir_fd=self.root.fd, follow_symlinks=False
                )
            except OSError:
                continue
            if known is not None and stat.S_ISREG(info.st_mode):
                seen = (known.content.size, known.attributes.mtime_ns)
                fits += seen == (info.st_size, info.st_mtime_ns)
        return not rows or fits * 2 >= len(rows)

    def scan(
        self, nodes: set[NodeId] | None = None, progress: Callable[[int], None] = lambda _n: None
    ) -> ScanResult:
        """Bring the index up to date: everywhere, or in some directories."""
        self.root.check()
        self.folder.check()
        db = self.database
        db.begin()
        try:
            scanner = Scanner(
                self.root, self.index, self.options.rules, stop=self.options.stop, progress=progress
            )
            result = scanner.scan() if nodes is None else scanner.rescan(nodes)
            self.root.check()
            self.index.save_numbers()
        except BaseException:
            db.rollback()
            self._index = None
            self._directories = None
            self._close_contents()
            raise
        if db.path is not None and not self._dry:
            db.commit()
        return result

    _dry = False

    def keep_dry(self) -> None:
        """From now on commit nothing: everything is forgotten at the end."""
        self._dry = True
        self._close_contents()

    # -- content -------------------------------------------------------------

    @property
    def contents(self) -> Contents:
        """Reads files."""
        if self._contents is None:
            state = self.folder.fd
            self._contents = Contents(
                self.index, self.directories, self.database, self.options, state, dry=self._dry
            )
        return self._contents

    def _close_contents(self) -> None:
        """What reads files has to begin anew: with another index, or without a trace."""
        if self._contents is not None:
            self._contents.close()
            self._contents = None

    def tidy_big_files(self) -> None:
        """Forget block lists and bases that are of no use any more, and what a crash left of them.

        A base takes room: it goes with its version, and when there is little room at all.
        """
        self.stage.tidy(room=has_room(self.folder.fd), now_ns=time.time_ns())
        if self.database.execute("SELECT 1 FROM hot LIMIT 1").fetchone() is not None:
            self.database.begin()
            self.database.execute("DELETE FROM hot WHERE node NOT IN (SELECT id FROM node)")
            self.database.commit()
        for folder in (b"blocks", b"bases"):
            try:
                fd = os.open(folder, OPEN_DIR, dir_fd=self.folder.fd)
            except FileNotFoundError:
                continue
            try:
                names = os.listdir(fd)
                there = self.index.nodes(int(name) for name in names if name.isdecimal())
                room = folder == b"blocks" or (has_room(fd) if names else True)
                for name in names:
                    row = there.get(int(name)) if name.isdecimal() else None
                    useful = row is not None and room
                    if useful and row is not None and folder == b"bases":
                        useful = may_serve(fd, os.fsencode(name), row.content.digest)
                    if not useful:
                        remove_base(fd, os.fsencode(name))
                if folder == b"bases":
                    remove_oldest(fd, self.options.base_clones)
            except OSError as error:
                log.info("not-tidied folder=%s reason=%s", folder, error)
            finally:
                os.close(fd)

    def write_facts(self, pair: PairState, ended_ns: int, busy: tuple[str, ...], left: int) -> None:
        """Say of a pair what can be read without its peer and without the lock."""
        assert self.marker is not None
        fresh = PairFacts(
            pair.peer, pair.location, pair.epoch.number, pair.epoch.nonce, pair.entries,
            pair.complete_ns, ended_ns, busy, left,
        )  # fmt: skip
        path = os.fsdecode(self.path)
        try:
            known = facts(self.path, state=os.path.dirname(self.folder.database_path))
        except UsageError:
            known = RootFacts(path, "", "")
        now = replace(known, path=path, replica=self.marker.replica,
                      incarnation=self.marker.incarnation).with_pair(fresh)  # fmt: skip
        self.folder.write(FACTS.encode(), json.dumps(now.to_json(), indent=1).encode() + b"\n")

    def sizes(self) -> Sizes:
        """How much room the engine's own files take."""
        if not self.folder.exists:
            return Sizes()
        store = self.store.folder_to_read() if self.store.exists() else None
        try:
            return sizes(self.folder.fd, store)
        finally:
            if store is not None:
                os.close(store)

    def pairs(self) -> list[PairState]:
        """The pairs this replica belongs to."""
        return [] if self.db is None else pair_states(self.db)

    def close(self) -> None:
        """Give everything back. What was not committed is forgotten."""
        parts = (self._directories, self._store, self._stage, self._contents, self.db)
        self._directories = self._store = self._stage = self._contents = self.db = None
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others say
            stack.callback(self._close_root)
            stack.callback(self.folder.close)
            for part in reversed(parts):
                if part is not None:
                    stack.callback(part.close)

    def _close_root(self) -> None:
        for fd in (self._outside, self.root.fd):
            if fd >= 0:
                os.close(fd)
        self._outside = self.root.fd = -1
