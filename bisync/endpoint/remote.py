"""A root on another machine as a side of a session, through a connection."""

import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from bisync.core.declared import Declared
from bisync.core.groups import Together
from bisync.core.node import Agreed, Attributes, Node, NodeId, Place, Side
from bisync.core.plan import Exchange, Move, Transition, place_of
from bisync.core.rows import check_rows
from bisync.endpoint.calls import Done, Opening
from bisync.endpoint.connect import Connection
from bisync.endpoint.far import Far, RemoteView, in_messages
from bisync.endpoint.glance import AT_A_TIME, Glance, Peers
from bisync.endpoint.inline import inline
from bisync.endpoint.interface import AgreedCopy, Ending, Hello, Read
from bisync.endpoint.service import ContentOnly, FarContent
from bisync.endpoint.watching import listener
from bisync.errors import BisyncError, EndpointError, RootLockedError
from bisync.fs.apply import expected
from bisync.fs.archive import Chain, Commit, PairState
from bisync.fs.claim import Claim
from bisync.fs.conflicts import Choice, Quarrel
from bisync.fs.content import Chunk, ContentSource, Expected, Version
from bisync.fs.displaced import Probed
from bisync.fs.recovery import Recovered
from bisync.fs.result import Result
from bisync.fs.sizes import Sizes
from bisync.fs.walk import ScanResult
from bisync.watch.interface import Coverage, Sink, Spot
from bisync.wire.schema import refuse

log = logging.getLogger(__name__)
_NUMBERS = 4096  # taken at a time
_MOST_MARKS = 50_000_000
_NO_PEERS = Peers()


class RemoteArchive:
    """The other end's copy of the ancestor."""

    def __init__(self, far: Far, pair: int, column: int, *, flipped: bool) -> None:
        self.pair = pair
        self.flipped = flipped
        self.reasons: dict[int, str] = {}
        self._far = far
        self._column = column
        self._nothing_halfway = False  # as far as is known

    def _ask(self, name: str, *values: Any) -> Any:
        return self._far("agreed." + name, self.pair, *values)

    def nodes(self, keys: Iterable[int]) -> dict[int, Agreed]:
        """The agreed nodes with these numbers."""
        return self._some("nodes", keys)

    def names_of(self, keys: Iterable[int]) -> dict[int, frozenset[Place]]:
        """All names of each agreed node."""
        return self._some("names_of", keys)

    def at(self, places: Iterable[Place]) -> dict[Place, int]:
        """What was agreed at each place."""
        return self._some("at", places)

    def children(self, keys: Iterable[int]) -> dict[int, list[tuple[bytes, int]]]:
        """What each agreed directory held."""
        return self._some("children", keys)

    def by_side(self, side: Side, ids: Iterable[NodeId]) -> dict[NodeId, int]:
        """The archive's numbers of a side's nodes."""
        found: dict[NodeId, int] = {}
        for some in in_messages(ids):
            found.update(self._ask("by_side", int(side), some))
        return found

    def _some(self, name: str, values: Iterable[Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for some in in_messages(values):
            found.update(self._ask(name, some))
        return found

    def column(self, side: Side) -> int:
        """The column of a side of this session."""
        return 1 - side if self.flipped else int(side)

    def state(self) -> PairState:
        """The pair's row."""
        found: PairState = self._ask("state")
        return found

    def next_key(self) -> int:
        """The first archive number never used."""
        return int(self._ask("next_key"))

    def nonces(self) -> set[str]:
        """Nonces of the links that are remembered."""
        found: set[str] = self._ask("nonces")
        return found

    def presumed(self, after: int, most: int) -> list[int]:
        """Numbers above one of files that were taken for equal by size and time; so many."""
        found: list[int] = self._ask("presumed", after, most)
        if sorted(set(found)) != found or (found and found[0] <= after):
            refuse("numbers out of order")
        return found

    def halfway(self) -> dict[NodeId, Place]:
        """Where nodes of that side were left that their user did not put there."""
        if self._nothing_halfway:
            return {}
        found: dict[NodeId, Place] = self._ask("halfway")
        self._nothing_halfway = not found
        return found

    def leave_halfway(self, placed: dict[NodeId, Place]) -> None:
        """Remember where nodes were left."""
        if placed:
            self._nothing_halfway = False
            self._ask("leave_halfway", placed)

    def prepare(self, commit: Commit) -> None:
        """Store a commit durably without making it count."""
        self._ask("prepare", commit)

    def prepared(self) -> Commit | None:
        """The commit that waits, if any."""
        found: Commit | None = self._ask("prepared")
        return found

    def drop_prepared(self) -> None:
        """Forget a commit that only one side has."""
        self._ask("drop_prepared")

    def commit(self, rows: list[list[Any]] | None = None) -> None:
        """Let the prepared commit count; the other end has its rows."""
        del rows
        self._far.later("agreed.commit", self.pair, self.reasons)

    def forget(self) -> None:
        """Forget everything agreed, durably."""
        self._ask("forget")

    def clear(self) -> None:
        """Forget everything agreed; no commit."""
        self._ask("clear")

    def forget_ids(self, column: int) -> None:
        """One side's node numbers mean nothing any more."""
        self._ask("forget_ids", column)

    def forget_results(self) -> None:
        """What the log proves is agreed on."""
        self._ask("forget_results")

    def rows(self) -> Iterator[list[list[Any]]]:
        """Everything agreed, some rows at a time."""
        found: list[bytes] = []
        self._far("agreed.rows", self.pair, part=found.append)
        for data in found:
            try:
                yield check_rows(json.loads(data))
            except (ValueError, TypeError, RecursionError) as error:
                raise EndpointError("the other end's ancestor cannot be read") from error

    def chain(self) -> Chain:
        """Where it stands."""
        found: Chain = self._ask("chain")
        return found

    def load(self, rows: list[list[Any]]) -> None:
        """Take rows of another archive."""
        self._nothing_halfway = False
        self._ask("load", json.dumps(rows, separators=(",", ":")).encode())

    def adopt(self, chain: Chain) -> None:
        """Stand where another archive stands."""
        self._nothing_halfway = False
        self._ask("adopt", chain)


class RemoteEndpoint:
    """One root of another machine as a side of a session.

    Args:
        connection: to a bisync there; it is closed with this.
        opening: which root, and how.
        name: of the machine, as a person knows it.
    """

    is_far = True

    def __init__(self, connection: Connection, opening: Opening, name: str) -> None:
        self._connection = connection
        self.channel = channel = connection.channel
        self._far = far = Far(channel)
        self._name = name
        self._content = FarContent(channel)
        self._paths: dict[Place, bytes] = {}
        self._node_paths: dict[NodeId, bytes | None] = {}
        self.view = view = RemoteView(far)
        self._pair: int | None = None
        self._glance: tuple[set[Spot], Glance] | None = None  # until something else was asked for
        self._due = array("q")  # nodes to look at that were told, and not yet asked for
        self._more_due = True  # there may be more of them
        self._holds = False
        self._probes: int | None = None  # the least age that was asked for
        self._is_probed = False  # since something was displaced
        self._probed = Probed()

        def index_changes() -> None:
            view.forget()
            self._glance, self._more_due, self._is_probed = None, True, False
            self._content.forget()

        far.index_changes = index_changes
        far("open", opening)

    # -- who it is -----------------------------------------------------------

    def _named(self, hello: Hello) -> Hello:
        return replace(hello, path=f"{self._name}:{hello.path}")

    def hello(self) -> Hello:
        """Say who this side is."""
        return self._named(self._far("hello"))

    def establish(self, *, new_identity: bool = False, new_incarnation: bool = False) -> Hello:
        """Make or change the side's state."""
        return self._named(self._far("establish", new_identity, new_incarnation))

    def is_empty(self) -> bool:
        """Whether the index has no name at all."""
        return bool(self._far("is_empty"))

    def looks_familiar(self) -> bool:
        """Whether the tree is the one the index knows."""
        return bool(self._far("looks_familiar"))

    def archive(self, hello: Hello, *, column: int, flipped: bool) -> AgreedCopy:
        """The side's copy of the ancestor."""
        here = replace(hello, pairs=())  # nobody else's business
        pair = self._pair = self._far("archive", here, column, flipped)
        return RemoteArchive(self._far, pair, column, flipped=flipped)

    def recover(self, archive: AgreedCopy) -> Recovered:
        """Settle what an earlier run left half done."""
        found: Recovered = self._far("recover", archive.pair)
        return found

    def drive(self, archive: AgreedCopy, who: str) -> Claim | str:
        """Claim the pair, until the connection ends."""
        return self._far("drive", archive.pair, who) or Claim()

    # -- observing -----------------------------------------------------------

    def scan(
        self, nodes: set[NodeId] | None = None, progress: Callable[[int], None] = lambda _n: None
    ) -> ScanResult:
        """Bring the index up to date."""
        self._forget_paths()
        found: ScanResult = self._far("scan", nodes, part=progress)
        return found

    def look(
        self, spots: set[Spot], progress: Callable[[int], None] = lambda _n: None
    ) -> ScanResult:
        """Bring some directories up to date."""
        self._forget_paths()
        found: ScanResult
        if self._glance is not None and self._glance[0] == spots:
            found = self._glance[1].scanned
            progress(found.entries)
        else:
            found = self._far("look", spots, part=progress)
        return found

    def read(self, nodes: Iterable[NodeId]) -> list[Read]:
        """Learn the digests of files."""
        found: list[Read] = []
        known: dict[NodeId, Node] = {}
        for some in in_messages(nodes):
            reads, now = self._far("read", some)
            found += reads
            known.update(now)
        self.view.learn_nodes(known)
        return found

    def companions(self) -> list[Place]:
        """The places of all journals of databases."""
        if self._glance is not None:
            return self._glance[1].companions
        found: list[Place] = self._far("companions")
        return found

    def hold(self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]) -> Read:
        """Let the files of one database be read at one instant."""
        self._holds = True
        found: Read = self._far("hold", parent, names, nodes)
        return found

    def hold_declared(
        self, top: NodeId, rule: Declared, nodes: dict[bytes, NodeId], agreed: set[NodeId]
    ) -> Read:
        """Let the files of a declared directory be read at one instant."""
        self._holds = True
        found: Read = self._far("hold_declared", top, rule, nodes, agreed)
        return found

    def release(self) -> list[str]:
        """Let go of what was held."""
        if not self._holds:
            return []
        found: list[str] = self._far("release")
        self._holds = False
        return found

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """Nodes as the side now has them."""
        return self.view.nodes(ids)

    # -- content -------------------------------------------------------------

    def expect(self, files: Sequence[Expected]) -> None:
        """These will be asked for whole, in this order."""
        self._read_there([file.node for file in files])
        self._content.expect(files)

    def _read_there(self, nodes: list[NodeId]) -> None:
        """These will be read there, if they did not come already: who reads learns digests."""
        if not self._content.has(nodes):
            self._far.index_changes()

    def supply(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version of a node."""
        self._read_there([node])
        return self._content.supply(node, sink, restart, refuse_writer=refuse_writer)

    def supply_changes(self, node: NodeId, sink: Any, *, refuse_writer: bool = False) -> Version:
        """Tell what an older version of a big file lacks."""
        self._far.index_changes()
        return self._content.supply_changes(node, sink, refuse_writer=refuse_writer)

    def moved(self, nodes: set[NodeId]) -> bool:
        """Whether files that are to be read at one instant moved on."""
        return bool(nodes) and bool(self._far("moved", nodes))

    # -- changing ------------------------------------------------------------

    def apply(
        self,
        archive: AgreedCopy,
        steps: list[Transition],
        updates: dict[int, str],
        source: ContentSource,
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Perform transitions; the other end pulls content from ``source`` meanwhile."""
        self._forget_paths()
        results: list[Result] = []

        def take(some: list[Done]) -> None:
            for done in some:
                if done.position != len(results) or done.position >= len(steps):
                    refuse("how a step ended that is not due")
                step = steps[done.position]
                self._remember(step, done.path, done.old)
                results.append(
                    Result(
                        step,
                        done.status,
                        done.reason,
                        done.size,
                        done.matched,
                        done.kept,
                        done.missed,
                        done.beside,
                    )
                )

        contents = inline(source, expected(steps))
        self.channel.service = ContentOnly(lambda: source)
        try:
            values = (archive.pair, steps, updates, together, contents)
            now = self._far("apply", *values, part=take)
        finally:
            self.channel.service = None
        if len(results) != len(steps):
            refuse("too little of how the steps ended")
        self.view.learn_nodes(now)
        return results

    def _remember(self, step: Transition, path: bytes | None, old: bytes | None) -> None:
        place = place_of(step)
        if place is None:
            self._node_paths[step.node] = path
        elif path is not None:
            self._paths[place] = path
        if old is not None and isinstance(step, Move | Exchange) and step.old is not None:
            self._paths[step.old] = old

    def _forget_paths(self) -> None:
        self._paths.clear()
        self._node_paths.clear()

    def set_directory_times(
        self, times: list[tuple[NodeId, int, bool]]
    ) -> tuple[dict[NodeId, Attributes], dict[NodeId, str]]:
        """Set directory times."""
        found: tuple[dict[NodeId, Attributes], dict[NodeId, str]]
        about = [*{node for node, _, _ in times}.union(self.view.few())][:AT_A_TIME]
        answer = self._far.ask("set_directory_times", times)
        said = self._far.ask("around", about)
        found = answer()
        self.view.learn(said())
        return found

    def numbers(self) -> Iterator[NodeId]:
        """Fresh node numbers."""
        while True:
            first = self._far("numbers", _NUMBERS)
            yield from range(first, first + _NUMBERS)

    def path(self, node: NodeId) -> bytes | None:
        """The path of a node, for output."""
        if node not in self._node_paths:
            self._node_paths[node] = self._far("path", node)
        return self._node_paths[node]

    def place_path(self, place: Place) -> bytes:
        """The path of a place, for output."""
        if place not in self._paths:
            self._paths[place] = self._far("place_path", place)
        return self._paths[place]

    def imagine(self, node: NodeId, place: Place) -> None:
        """Remember where a directory of a dry run would be."""
        self._far("imagine", node, place)

    # -- the run as a whole --------------------------------------------------

    def changed(self, archive: AgreedCopy) -> Iterator[NodeId]:
        """Nodes to look at in this run."""
        if self._more_due:
            answer = self._far.ask("changed", archive.pair, part=self._is_due)
            self._probe_behind(answer)
            self._more_due = False
        found, self._due = self._due, array("q")
        return iter(found)

    def _is_due(self, some: list[NodeId]) -> None:
        self._due.extend(some)
        if len(self._due) > _MOST_MARKS:
            refuse("more nodes than any tree has")

    def keep_pending(self, archive: AgreedCopy, pending: dict[NodeId, str]) -> None:
        """Add to what the next run must look at."""
        self._far("keep_pending", archive.pair, pending)

    def finish(self, archive: AgreedCopy, ending: Ending) -> list[str]:
        """Record how a run ended."""
        found: list[str] = self._far("finish", archive.pair, ending)
        self._glance, self._more_due = None, True  # the next run begins with what is pending
        self._content.forget()
        return found

    def deletions_since(self, archive: AgreedCopy, side: int, time_ns: int) -> int:
        """Entries deleted for this pair on behalf of a column since a time."""
        return int(self._far("deletions_since", archive.pair, side, time_ns))

    def choices(self, archive: AgreedCopy) -> list[Choice]:
        """What a person chose for conflicts of this pair."""
        if self._glance is not None:
            return self._glance[1].choices
        found: list[Choice] = self._far("choices", archive.pair)
        return found

    def carry_out(self, archive: AgreedCopy, choice: Choice) -> str:
        """Bring the chosen version to its name."""
        return str(self._far("carry_out", archive.pair, choice))

    def add_conflicts(self, archive: AgreedCopy, rows: list[Quarrel]) -> None:
        """Put conflicts on this side's list."""
        if not rows:
            return
        self._glance = None
        self._far("add_conflicts", archive.pair, rows)

    def forget_conflicts(self, ids: Iterable[str]) -> None:
        """Take conflicts off this side's list."""
        todo = list(ids)
        if todo:
            self._glance = None
            self._far("forget_conflicts", todo)

    def probe_displaced(self, *, min_age_ns: int) -> Probed:
        """Look again at what was displaced."""
        if not self._is_probed or self._probes != min_age_ns:
            self._was_probed(self._far("probe_displaced", min_age_ns))
        self._probes, self._is_probed = min_age_ns, False
        found, self._probed = self._probed, Probed()
        return found

    def _was_probed(self, now: Probed) -> None:
        self._probed = Probed((*self._probed.back, *now.back), now.weak)

    def _probe_behind(self, answer: Callable[[], Any]) -> Any:
        """Wait for an answer, and for what :meth:`probe_displaced` will ask as the last time."""
        if self._probes is None:
            return answer()
        probed = self._far.ask("probe_displaced", self._probes)
        try:
            found = answer()
        except RootLockedError:
            self._was_probed(probed())
            raise
        self._was_probed(probed())
        self._is_probed = True
        return found

    def sizes(self) -> Sizes:
        """How much room the engine's own files take there."""
        found: Sizes = self._far("sizes")
        return found

    def watch(self, kind: str, poll_s: float, sink: Sink, ended: Callable[[], None]) -> Coverage:
        """Let the sink hear of changes there, until the connection ends, and of that."""
        self.channel.marked, self.channel.ended = listener(sink), ended
        found: Coverage = self._far("watch", kind, round(poll_s * 1000))
        return found

    def send_token(self, number: int) -> bool:
        """Make a token there."""
        return bool(self._far("token", number))

    def coverage(self) -> Coverage:
        """What the watcher there sees."""
        found: Coverage = self._far("coverage")
        return found

    def rest(self) -> None:
        """Nothing is in hand: whoever waits for the root there may have it."""
        self._far.later("rest")

    def wake(
        self, wait_ms: int | None, spots: set[Spot] | None = None, peers: Peers = _NO_PEERS
    ) -> bool:
        """Go on after a rest.

        Args:
            wait_ms: for another engine that works on the root.
            spots: what the run will :meth:`look` at; it is looked at on this way already, and
                what will be asked for next comes with the answer.
            peers: what will be asked for, too, because of what changed on the other side.

        Returns:
            Whether the root was given away meanwhile, and is opened anew.
        """
        if spots is None or self._pair is None:
            anew = bool(self._far("wake", wait_ms))
        else:
            values = (wait_ms, self._pair, spots, peers)
            answer = self._far.ask("glance", *values, part=self._is_due)
            glance = self._probe_behind(answer)
            anew = glance is None
            if glance is not None:
                self.view.learn(glance.around)
                self.view.learn_at(peers.places, glance.at)
                self._content.learn(glance.contents)
                self._glance, self._more_due = (spots, glance), False
        if anew:
            self._closed()
        return anew

    def _closed(self) -> None:
        """What the other end had said was about a root that it had open then."""
        self._pair, self._holds, self._more_due = None, False, True
        self._is_probed = False
        self._due = array("q")

    def leave(self) -> None:
        """Give the root back, and keep the connection."""
        try:
            while not self.channel.broken:
                try:
                    self._far.hear()
                    break
                except BisyncError as error:  # why it is given back now says more
                    log.info("not-done reason=%s", error)
            if not self.channel.broken:
                self._far("close")
        finally:
            self._closed()

    def close(self) -> None:
        """Give everything back."""
        try:
            self.leave()
        finally:
            self._connection.close()
