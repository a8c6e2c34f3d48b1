"""Calls to the other end, and lookups in its index that remember what was said."""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from bisync.core.node import Node, NodeId, Place
from bisync.endpoint.calls import CALLS
from bisync.endpoint.channel import Channel
from bisync.endpoint.glance import AT_A_TIME, MOST_AROUND, Around
from bisync.wire.schema import refuse

# What leaves the index of the other end as it is. After any other call it is asked anew.
_LEAVES_INDEX = frozenset(
    {
        "around", "at", "children", "path", "place_path", "numbers", "companions", "changed",
        "choices", "add_conflicts", "forget_conflicts", "deletions_since", "keep_pending", "moved",
        "finish", "probe_displaced", "rest", "token", "coverage", "drive",
    }
)  # fmt: skip
# What may be asked before it is known that all went well that was asked for :meth:`Far.later`.
_MAY_FOLLOW = frozenset(
    {"around", "changed", "glance", "path", "place_path", "probe_displaced", "rest"}
)
_REMEMBERED = 2 * MOST_AROUND
_FEW = 200  # nodes that are asked about again at once, when something may have changed them


class Far:
    """Calls across a connection, by name."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.index_changes: Callable[[], None] = lambda: None
        """Called around each call that may change the other end's index."""
        self._unheard: deque[int] = deque()  # calls that give nothing, and are on their way

    def later(self, name: str, *values: Any) -> None:
        """Ask for what gives nothing, and go on; if it fails, the next call raises that.

        Raises:
            BisyncError: what an earlier one raised, or the connection ended.
        """
        call = CALLS[name]
        if name not in _MAY_FOLLOW:
            self.hear()
        self._unheard.append(self.channel.ask(call.number, call.takes.pack(values)))

    def hear(self) -> None:
        """Wait until all is done that was asked for :meth:`later`.

        Raises:
            BisyncError: what it raised, or the connection ended.
        """
        while self._unheard:
            self.channel.answer(self._unheard.popleft())

    def __call__(self, name: str, *values: Any, part: Callable[[Any], None] | None = None) -> Any:
        """Call, and wait for what it gives.

        Raises:
            BisyncError: what the other end raised, or the connection ended.
        """
        return self.ask(name, *values, part=part)()

    def ask(
        self, name: str, *values: Any, part: Callable[[Any], None] | None = None
    ) -> Callable[[], Any]:
        """Ask, and go on; see :meth:`Channel.ask` for what may be asked before the answer.

        Args:
            part: takes what of the answer comes before its end, while that is waited for.

        Returns:
            What waits for the answer, and gives it; to be called once.

        Raises:
            BisyncError: what the other end raised, or the connection ended.
        """
        call = CALLS[name]
        leaves = name in _LEAVES_INDEX or name.startswith("agreed.")
        if not leaves:
            self.index_changes()
        if name not in _MAY_FOLLOW:
            self.hear()
        asked = self.channel.ask(call.number, call.takes.pack(values), parts=call.part is not None)

        def take(plain: Any) -> None:
            assert call.part is not None
            if part is not None:
                part(call.part.unpack(plain))

        def answer() -> Any:
            self.hear()
            try:
                found = self.channel.answer(asked, None if call.part is None else take)
            finally:
                if not leaves:
                    self.index_changes()
            return call.gives.unpack(found)

        return answer


class RemoteView:
    """Lookups in the index of the other end. What was said holds until that may have changed."""

    def __init__(self, far: Far) -> None:
        self._far = far
        self._nodes: dict[NodeId, Node | None] = {}
        self._names: dict[NodeId, frozenset[Place]] = {}  # empty: none
        self._forgotten: set[NodeId] = set()
        self._at: dict[Place, NodeId | None] = {}  # nothing: it is free

    def few(self) -> list[NodeId]:
        """The nodes of which something is known, if they are few."""
        return list(self._nodes) if len(self._nodes) <= _FEW else []

    def forget(self) -> None:
        """What was said may not hold any more."""
        self._nodes.clear()
        self._names.clear()
        self._forgotten.clear()
        self._at.clear()

    def learn(self, said: Around) -> None:
        """Remember what the other end says of some nodes."""
        if max(len(said.nodes), len(said.names_of), len(said.without)) > MOST_AROUND:
            refuse("more around some nodes than fits")
        for node, names in said.names_of.items():
            self._names[node] = names
            self._nodes[node] = said.nodes.get(node)
            self._at.update(dict.fromkeys(names, node))
        for node in said.without:
            self._names[node] = frozenset()
            self._nodes[node] = said.nodes.get(node)
        self._forgotten |= said.forgotten

    def learn_at(self, places: list[Place], answer: dict[Place, NodeId]) -> None:
        """Remember what is at some places, and which of them are free."""
        if not answer.keys() <= set(places):
            refuse("an answer to what nobody asked")
        self._at.update((place, answer.get(place)) for place in places)

    def learn_nodes(self, nodes: dict[NodeId, Node]) -> None:
        """Remember what nodes have become; of their names nothing is said."""
        self._nodes.update(nodes)

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """The nodes that have a name."""
        found: dict[NodeId, Node] = {}
        for some in in_messages(ids):
            self._ask(some, self._nodes)
            for node in some:
                if (known := self._nodes.get(node)) is not None:
                    found[node] = known
        return found

    def names_of(self, ids: Iterable[NodeId]) -> dict[NodeId, frozenset[Place]]:
        """All names of each node."""
        found: dict[NodeId, frozenset[Place]] = {}
        for some in in_messages(ids):
            self._ask(some, self._names)
            for node in some:
                if names := self._names.get(node):
                    found[node] = names
        return found

    def at(self, places: Iterable[Place]) -> dict[Place, NodeId]:
        """What is at each place."""
        found: dict[Place, NodeId] = {}
        for some in in_messages(places):
            if len(self._at) > _REMEMBERED:
                self.forget()
            unknown = [place for place in some if place not in self._at]
            if unknown:
                answer: dict[Place, NodeId]
                answer, said = self._far("at", unknown)
                self.learn(said)
                self.learn_at(unknown, answer)
            for place in some:
                if (node := self._at[place]) is not None:
                    found[place] = node
        return found

    def children(self, ids: Iterable[NodeId]) -> dict[NodeId, list[tuple[bytes, NodeId]]]:
        """What each directory holds."""
        found: dict[NodeId, list[tuple[bytes, NodeId]]] = {}

        def take(part: dict[NodeId, list[tuple[bytes, NodeId]]]) -> None:
            for node, entries in part.items():
                if node not in asked:
                    refuse("what is in a directory that nobody asked for")
                found.setdefault(node, []).extend(entries)

        asked: set[NodeId] = set()
        for some in in_messages(ids):
            asked.update(some)
            self._far("children", some, part=take)
        return found

    def forgotten(self, ids: Iterable[NodeId]) -> set[NodeId]:
        """Those that a filter now hides."""
        found: set[NodeId] = set()
        for some in in_messages(ids):
            self._ask(some, self._names)
            found.update(node for node in some if node in self._forgotten)
        return found

    def _ask(self, ids: list[NodeId], known: Container[NodeId]) -> None:
        """See to it that something is known of each."""
        if len(self._names) > _REMEMBERED:
            self.forget()
        unknown = [node for node in ids if node not in known]
        if unknown:
            said: Around = self._far("around", unknown)
            if not all(node in said.names_of or node in said.without for node in unknown):
                refuse("no answer to what was asked")
            self.learn(said)


def in_messages(values: Iterable[Any]) -> Iterator[list[Any]]:
    """What is asked about, in lists that fit one message."""
    todo = list(values)
    for at in range(0, len(todo), AT_A_TIME):
        yield todo[at : at + AT_A_TIME]
