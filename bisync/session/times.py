"""Directory times: set when nothing else is to be done in a directory, and then agreed on."""

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from bisync.core.node import SIDES, Agreed, Attributes, NodeId, Side
from bisync.core.plan import DirectoryTime, Update
from bisync.endpoint.interface import Endpoint
from bisync.session.batches import batches
from bisync.session.commit import Ledger

_BATCH = 5000


class DirectoryTimes:
    """Those of one run that wait. What is agreed of them meanwhile is a time that is none.

    Args:
        failed: told what a side's directory did not get, and why.
    """

    def __init__(
        self,
        sides: tuple[Endpoint, Endpoint],
        ledger: Ledger,
        failed: Callable[[Side, NodeId, str], None],
    ) -> None:
        self._sides = sides
        self._ledger = ledger
        self._failed = failed
        self._waiting: dict[int, DirectoryTime] = {}

    def __contains__(self, key: int) -> bool:
        """Whether the directory with this archive number waits for its time."""
        return key in self._waiting

    def note(self, times: Iterable[DirectoryTime]) -> None:
        """These are to be set."""
        for each in times:
            first = self._waiting.get(each.key)
            self._waiting[each.key] = each if first is None else _both(first, each)

    def set_now(self, times: list[DirectoryTime]) -> list[Update]:
        """Set times at once; what cannot be set waits.

        Returns:
            What is to be agreed on, of directories that were agreed on before.
        """
        self.note(times)
        done = self._set([self._waiting[t.key] for t in times], lambda *_: None)
        for update in done:
            del self._waiting[update.key]
        known = self._ledger.lead.nodes(update.key for update in done)
        return self._agreed(done, known)

    def set_all(self) -> None:
        """Set what is left, deepest first, and agree on it."""
        waiting, self._waiting = self._waiting, {}
        for keys in batches(sorted(waiting, reverse=True), _BATCH):
            known = self._ledger.lead.nodes(keys)
            todo = [waiting[key] for key in keys if key in known]
            done = self._set(todo, self._failed)
            self._ledger.commit(self.rows(self._agreed(done, known)))

    def rows(self, updates: list[Update]) -> list[list[object]]:
        """Rows for the archive, of what :meth:`set_now` gave."""
        nodes = [self._sides[s].nodes([u.ids[s] for u in updates if u.ids[s]]) for s in SIDES]
        found = []
        for update in updates:
            a, b = (nodes[s].get(update.ids[s] or 0) for s in SIDES)
            if a is not None and b is not None:
                found.append(self._ledger.row(update, (a.version, b.version)))
        return found

    def _set(
        self, todo: list[DirectoryTime], failed: Callable[[Side, NodeId, str], None]
    ) -> list[Update]:
        """Set times; what both sides now have, without names and contents."""
        held = []
        for side in SIDES:
            found = self._right(side, todo)
            times = [
                (t.ids[side], t.mtime_ns[side], t.ours[side])
                for t in todo
                if t.ids[side] not in found
            ]
            if times:
                fresh, reasons = self._sides[side].set_directory_times(times)
                found.update(fresh)
                for node, reason in reasons.items():
                    failed(side, node, reason)
            held.append(found)
        done = []
        for t in todo:
            a, b = (held[s].get(t.ids[s]) for s in SIDES)
            if a is not None and b is not None:
                done.append(Update(key=t.key, names=frozenset(), ids=t.ids, attributes=(a, b)))
        return done

    def _right(self, side: Side, todo: list[DirectoryTime]) -> dict[NodeId, Attributes]:
        """What directories have that nothing was done in, and that have the right time."""
        times = {t.ids[side]: t.mtime_ns[side] for t in todo if not t.ours[side]}
        nodes = self._sides[side].nodes(times)
        return {
            node: nodes[node].attributes
            for node, time_ns in times.items()
            if node in nodes and nodes[node].attributes.mtime_ns == time_ns
        }

    def _agreed(self, done: list[Update], known: dict[int, Agreed]) -> list[Update]:
        """The rest of what is agreed on with a time: what was."""
        done = [update for update in done if update.key in known]
        names = self._ledger.lead.names_of(update.key for update in done)
        return [
            replace(
                update,
                names=names.get(update.key, frozenset()),
                content=known[update.key].content,
            )
            for update in done
        ]


def _both(first: DirectoryTime, then: DirectoryTime) -> DirectoryTime:
    """The first time counts, before the engine did anything; and what a user did since.

    That shows only on a side where the engine had done nothing until then: on the other one
    the time may be the engine's own, so that what was decided with it counts for nothing.
    """
    fresh = [
        side
        for side in SIDES
        if not first.ours[side] and then.seen_ns[side] not in (None, first.seen_ns[side])
    ]
    mtime_ns, seen = first.mtime_ns, list(first.seen_ns)
    for side in fresh:
        seen[side] = then.seen_ns[side]
    if fresh and not any(first.ours):
        mtime_ns = then.mtime_ns
    elif fresh:
        side = fresh[0]
        now, before = then.seen_ns[side] or 0, first.mtime_ns[side]
        if before != first.seen_ns[side]:
            now = max(now, before)  # the other side's user had set that one
        mtime_ns = now, now
    return DirectoryTime(
        key=first.key,
        ids=then.ids,
        mtime_ns=mtime_ns,
        seen_ns=(seen[0], seen[1]),
        ours=(first.ours[0] or then.ours[0], first.ours[1] or then.ours[1]),
    )
