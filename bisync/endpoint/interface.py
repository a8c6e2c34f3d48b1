"""What a session needs from a side. A local tree offers it directly, a far one over a wire.

Calls take and return values in batches; content is pulled by the side that needs it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from msgspec import Struct

from bisync.core.closure import AgreedView, View
from bisync.core.declared import Declared
from bisync.core.groups import Together
from bisync.core.node import Attributes, Node, NodeId, Place, Side
from bisync.core.plan import Transition
from bisync.core.retention import Retention
from bisync.core.wish import Seen
from bisync.fs.archive import Chain, Commit, PairState
from bisync.fs.claim import Claim
from bisync.fs.conflicts import Choice, Quarrel
from bisync.fs.content import ContentSource
from bisync.fs.displaced import Probed
from bisync.fs.recovery import Recovered
from bisync.fs.result import Result
from bisync.fs.sizes import Sizes
from bisync.fs.source import Listed
from bisync.fs.walk import ScanResult
from bisync.watch.interface import Spot

MOVED_ON = "it was moved, or a directory above it, while its time was set"


class Hello(Struct, frozen=True):
    """Who a side is; exchanged before anything is written."""

    path: str
    known: bool  # readable state was found
    replica: str  # "" without state
    incarnation: str  # changes when every object in the tree is new; "" without state
    root: str  # identity of the root directory now
    recorded: str  # identity its own state was made for, "" without state
    empty: bool
    pairs: tuple[PairState, ...]
    damaged: str = ""  # what of its state could not be read
    became_link: bool = False  # a symlink stands where the root itself was


class Read(Struct, frozen=True):
    """What came of reading one file for its digest."""

    node: NodeId
    status: str  # read | stale | busy | problem
    reason: str = ""  # of a file that was read: why it has to be looked at again


class Ending(Struct, frozen=True):
    """How a run ended, for one side."""

    time_ns: int
    complete_ns: int | None  # all that had happened until then is done; None: something is left
    pending: dict[NodeId, str]
    waiting: frozenset[str]  # ids of the conflicts that still wait
    deletions: tuple[tuple[int, int], ...]  # (column that asked, entries)
    entries: int
    busy: tuple[str, ...] = ()  # paths that wait for their writers
    retention: Retention | None = None  # of the store; None: it is left alone


class AgreedCopy(AgreedView, Protocol):
    """One side's copy of the ancestor: lookups, its place in the chain, commits."""

    pair: int
    """Its number on that side."""

    flipped: bool
    """Whether alpha is column 1."""

    reasons: dict[int, str]
    """Of what is committed next, for the operation log."""

    def column(self, side: Side) -> int:
        """The column of a side of this session."""
        ...

    def state(self) -> PairState:
        """The pair's row."""
        ...

    def next_key(self) -> int:
        """The first archive number never used."""
        ...

    def nonces(self) -> set[str]:
        """Nonces of the links that are remembered."""
        ...

    def presumed(self, after: int, most: int) -> list[int]:
        """Numbers above one of files that were taken for equal by size and time; so many."""
        ...

    def halfway(self) -> dict[NodeId, Place]:
        """Where nodes of that side were left that their user did not put there."""
        ...

    def leave_halfway(self, placed: dict[NodeId, Place]) -> None:
        """Remember where nodes were left; agreeing on a node forgets it."""
        ...

    def prepare(self, commit: Commit) -> None:
        """Store a commit durably without making it count."""
        ...

    def prepared(self) -> Commit | None:
        """The commit that waits, if any."""
        ...

    def drop_prepared(self) -> None:
        """Forget a commit that only one side has."""
        ...

    def commit(self, rows: list[list[Any]] | None = None) -> None:
        """Let the prepared commit count; ``rows`` are what it holds, if at hand."""
        ...

    def forget(self) -> None:
        """Forget everything agreed, durably: first contact again."""
        ...

    def clear(self) -> None:
        """Forget everything agreed; no commit."""
        ...

    def forget_ids(self, column: int) -> None:
        """One side's node numbers mean nothing any more; places and contents stay."""
        ...

    def forget_results(self) -> None:
        """What the log proves is agreed on: it is not needed any more."""
        ...

    def rows(self) -> Iterator[list[list[Any]]]:
        """Everything agreed, some rows at a time."""
        ...

    def chain(self) -> Chain:
        """Where it stands."""
        ...

    def load(self, rows: list[list[Any]]) -> None:
        """Take rows of another copy, in place of what it has."""
        ...

    def adopt(self, chain: Chain) -> None:
        """Stand where another copy stands, with the rows that were loaded."""
        ...


class Endpoint(ContentSource, Protocol):
    """One side of a session."""

    @property
    def is_far(self) -> bool:
        """Whether every call costs a way to another machine and back."""
        ...

    @property
    def view(self) -> View:
        """Lookups in the side's index."""
        ...

    def is_empty(self) -> bool:
        """Whether the tree holds nothing but what is the engine's own."""
        ...

    def looks_familiar(self) -> bool:
        """Whether the tree is the one the index knows, going by names, sizes and times."""
        ...

    def hello(self) -> Hello:
        """Say who this side is."""
        ...

    def establish(self, *, new_identity: bool = False, new_incarnation: bool = False) -> Hello:
        """Make or change the side's state, so that it can be worked with."""
        ...

    def archive(self, hello: Hello, *, column: int, flipped: bool) -> AgreedCopy:
        """The side's copy of the ancestor shared with the peer that said ``hello``."""
        ...

    def recover(self, archive: AgreedCopy) -> Recovered:
        """Settle what an earlier run left half done."""
        ...

    def drive(self, archive: AgreedCopy, who: str) -> Claim | str:
        """Claim the pair for a session that stays; or who has it."""
        ...

    def scan(
        self, nodes: set[NodeId] | None = None, progress: Callable[[int], None] = ...
    ) -> ScanResult:
        """Bring the index up to date: everywhere, or in some directories."""
        ...

    def look(self, spots: set[Spot], progress: Callable[[int], None] = ...) -> ScanResult:
        """Bring the directories that are meant up to date, or the nearest known ones above."""
        ...

    def read(self, nodes: Iterable[NodeId]) -> list[Read]:
        """Learn the digests of files."""
        ...

    def companions(self) -> list[Place]:
        """The places of all journals of databases; see :mod:`bisync.core.groups`."""
        ...

    def hold(self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]) -> Read:
        """Let the files of one database be read at one instant, until :meth:`release`.

        Args:
            parent: their directory.
            names: all names that such files may have there.
            nodes: those that are there.
        """
        ...

    def hold_declared(
        self, top: NodeId, rule: Declared, nodes: dict[bytes, NodeId], agreed: set[NodeId]
    ) -> Read:
        """Let the files of a declared directory be read at one instant, until :meth:`release`.

        Args:
            nodes: its files by their paths below it.
            agreed: those that both sides had agreed on, as they were observed.
        """
        ...

    def release(self) -> list[str]:
        """Let go of what was held.

        Returns:
            What went wrong with that and a person should hear.
        """
        ...

    def apply(
        self,
        archive: AgreedCopy,
        steps: list[Transition],
        updates: dict[int, str],
        source: ContentSource,
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Perform transitions, with content from the other side.

        Args:
            together: of some keys, all steps are done or none.
        """
        ...

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """Nodes as the side now has them."""
        ...

    def set_directory_times(
        self, times: list[tuple[NodeId, int, bool]]
    ) -> tuple[dict[NodeId, Attributes], dict[NodeId, str]]:
        """Set times, in the given order.

        Args:
            times: directories, their times, and whether the engine did something in them. Where
                it did not, another time than the known one is a user's, and stays.

        Returns:
            What each directory then has, and the reason for each that could not be set now
            (``MOVED_ON``: it will be where it is looked for in a moment).
            Those that may never be set (another owner, a read-only place), or that somebody
            changed, are in neither.
        """
        ...

    def numbers(self) -> Iterator[NodeId]:
        """Fresh node numbers of this side."""
        ...

    def path(self, node: NodeId) -> bytes | None:
        """The path of a node, for output."""
        ...

    def place_path(self, place: Place) -> bytes:
        """The path of a place, for output."""
        ...

    def imagine(self, node: NodeId, place: Place) -> None:
        """In a dry run: remember where a directory would be, for output only."""
        ...

    def changed(self, archive: AgreedCopy) -> Iterable[NodeId]:
        """Nodes to look at in this run: marked since the last one, left over, or all.

        Called again: those that were marked since, by a scan or by another pair.
        """
        ...

    def keep_pending(self, archive: AgreedCopy, pending: dict[NodeId, str]) -> None:
        """Add to what the next run must look at; durable before any side forgets its marks."""
        ...

    def finish(self, archive: AgreedCopy, ending: Ending) -> list[str]:
        """Record how a run ended: what is left, conflicts, deletions; forget read marks.

        Returns:
            What a person should hear about the store.
        """
        ...

    def deletions_since(self, archive: AgreedCopy, side: int, time_ns: int) -> int:
        """Entries deleted for this pair on behalf of a column since a time."""
        ...

    def choices(self, archive: AgreedCopy) -> list[Choice]:
        """What a person chose for conflicts of this pair."""
        ...

    def carry_out(self, archive: AgreedCopy, choice: Choice) -> str:
        """Bring the chosen version to its name on this side; return why not, "" if done."""
        ...

    def add_conflicts(self, archive: AgreedCopy, rows: list[Quarrel]) -> None:
        """Put conflicts on this side's list."""
        ...

    def forget_conflicts(self, ids: Iterable[str]) -> None:
        """Take conflicts off this side's list."""
        ...

    def probe_displaced(self, *, min_age_ns: int) -> Probed:
        """Look again at what was displaced; bring back what somebody wrote to."""
        ...

    def sizes(self) -> Sizes:
        """How much room the engine's own files take. Looks at each kept version."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Tree(ContentSource, Protocol):
    """The source of a mirror, once it was walked. Content is asked for by the entries' keys."""

    listings: list[Listed]
    """What each directory holds, parents before what is below them."""

    root: Seen | None
    """Whose attributes the destination itself gets."""

    problems: list[tuple[bytes, str]]
    notes: list[tuple[bytes, str]]
    failed: bool
    """Something could not be looked at."""

    @property
    def by_key(self) -> dict[int, Seen]:
        """All entries by key."""
        ...

    @property
    def identity(self) -> str:
        """Which roots it is made of."""
        ...

    @property
    def location(self) -> bytes:
        """Where those are."""
        ...

    @property
    def only_named(self) -> bool:
        """Whether each source is a single name, not what a folder holds."""
        ...

    def is_single_file(self) -> bool:
        """Whether all of the source is one entry that is no directory."""
        ...

    def rename_single(self, name: bytes) -> None:
        """The one entry gets another name at the destination."""
        ...

    def directory_inodes(self) -> set[int]:
        """The inode numbers of all directories."""
        ...

    def handle(self, seen: Seen) -> bytes:
        """The identity of an entry's object; empty if it cannot be told."""
        ...

    def digest(self, seen: Seen) -> bytes | None:
        """The digest of a file; ``None`` if it cannot be read now."""
        ...

    def database(self, key: int) -> tuple[int, bytes] | None:
        """Which database a file belongs to: the key of the directory, and the name."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
