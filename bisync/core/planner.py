"""Turn verdicts into transitions for both sides and updates for the ancestor."""

from collections import defaultdict
from collections.abc import Collection, Iterator

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.diff import Join, Joined
from bisync.core.merge import fates
from bisync.core.node import ROOT, SIDES, Attributes, Content, Kind, NodeId, Place, Side
from bisync.core.order import Names, Op, order
from bisync.core.plan import (
    DirectoryTime,
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Plan,
    Remove,
    Replace,
    SetAttributes,
    Transition,
    Unlink,
    Update,
)
from bisync.core.reconcile import Outcome, Verdict

HELD_NAME = "its name is held by something that stays"
PENDING_TIME = -1  # an mtime no agreement vouches for yet


class Numbers(Struct, frozen=True):
    """Where new numbers come from: each side's nodes, and the archive's."""

    nodes: tuple[Iterator[NodeId], Iterator[NodeId]]
    archive: Iterator[int]


def make_plan(
    joined: Join,
    outcome: Outcome,
    numbers: Numbers,
    *,
    removals: bool,
    at_once: Collection[int] = (),
) -> Plan:
    """Build the plan of one closure.

    Args:
        joined: the closure.
        outcome: its verdicts.
        numbers: sources of fresh numbers.
        removals: whether removals may be done; else only those that make room for
            something, the others are counted in ``Plan.withheld``.
        at_once: keys whose removal does not wait.
    """
    return _Planner(joined, outcome, numbers, at_once, removals=removals).plan()


class _Planner:
    def __init__(
        self,
        joined: Join,
        outcome: Outcome,
        numbers: Numbers,
        at_once: Collection[int],
        *,
        removals: bool,
    ) -> None:
        self.join = joined
        self.verdicts = outcome.verdicts
        self.numbers = numbers
        self.removals = removals
        self.at_once = at_once
        self.result = Plan(conflicts=outcome.conflicts, notes=outcome.notes, strays=outcome.strays)
        self.archive = {ROOT: ROOT}
        self.busy_keys: set[int] = set()  # keys with steps on a side
        self.unfinished: set[int] = set()  # keys whose names could not all be placed
        self.touched: tuple[set[int], set[int]] = (set(), set())
        self.locals: tuple[dict[int, NodeId], dict[int, NodeId]] = (
            dict(joined.local_of[0]),
            dict(joined.local_of[1]),
        )

    def plan(self) -> Plan:
        for key in self.verdicts:
            self.archive[key] = key if key > 0 else next(self.numbers.archive)
        self.result.archived = self.archive
        for side in SIDES:
            self._side(side)
        for key in self.verdicts:  # also what is made only now: it may be all that is left
            both = [self.locals[s].get(key) for s in SIDES]
            self.result.ids[self.archive[key]] = (both[0], both[1])
        self._updates()
        self._directory_times()
        for key, verdict in self.verdicts.items():
            if verdict.held:
                self.result.held[key] = verdict.held
                for side in SIDES:
                    node = self.join.nodes[key].seen[side]
                    if node is not None:
                        self.result.held_nodes[side].add(node.id)
        return self.result

    # -- one side ------------------------------------------------------------

    def _side(self, side: Side) -> None:
        local = self.locals[side]
        names = Names(
            at={p: k for k, j in self.join.nodes.items() for p in j.names[side]},
            parent={ROOT: ROOT},
            local=local,
        )
        for key, joined in self.join.nodes.items():
            if joined.is_dir and joined.names[side]:
                names.parent[key] = next(iter(joined.names[side]))[0]
        ops = self._ops(side)
        before = dict(names.at)
        ordered = order(ops, names)
        steps = [self._translate(side, step) for step in ordered.steps]
        for op in ordered.failed:
            self.unfinished.add(op.key)
            seen = self.join.nodes[op.key].seen
            nodes = tuple(None if node is None else node.id for node in seen)
            self.result.blocked.append((side, (nodes[0], nodes[1]), HELD_NAME))
        for op in ordered.skipped:
            self._withhold(side, op)
        self._touch(side, before, names.at)
        where: dict[int, list[Place]] = defaultdict(list)
        for place, key in names.at.items():
            where[key].append(place)
        steps += self._contents_and_attributes(side, where, ordered.steps)
        for step in steps:
            self.busy_keys.update(self._keys(step))
        self.result.steps[side].extend(self._archived(step) for step in steps)

    def _keys(self, step: Transition) -> list[int]:
        keys = [step.key]
        if isinstance(step, Exchange):
            keys.append(step.other_key)
        if isinstance(step, Replace) and step.keep is not None:
            keys.append(step.keep_key)
        return keys

    def _ops(self, side: Side) -> list[Op]:
        makes: list[Op] = []
        moves: list[Op] = []
        leaves: list[Op] = []
        whole = self._whole_removals(side)
        # Known nodes by number, so that the same knot of names is always untied the same way.
        for key, verdict in sorted(self.verdicts.items(), key=lambda item: (item[0] < 0, item[0])):
            joined = self.join.nodes[key]
            if key == ROOT or verdict.held or (verdict.forget and not verdict.alive):
                continue
            has = joined.names[side]
            wants = verdict.names if verdict.alive else frozenset()
            if has == wants:
                continue
            if not wants:
                leaves += self._removal_ops(side, joined, verdict, whole)
            elif not has:
                makes += self._make_ops(side, joined, verdict)
            else:
                fate, extra = fates(has, wants, lambda p: (p[1], b"%d" % p[0]))
                for old, new in fate.items():
                    if new is None:
                        leaves.append(Op("unlink", key, src=old))
                    elif new != old:
                        moves.append(Op("move", key, src=old, dst=new, is_dir=joined.is_dir))
                moves += [Op("link", key, dst=place) for place in sorted(extra)]
        # An old object is kept before it moves on; directories come first, so that what is one
        # thing with others needs none that is still to be made.
        makes.sort(key=lambda op: (op.kind != "keep", not op.is_dir))
        return makes + moves + leaves

    def _make_ops(self, side: Side, joined: Joined, verdict: Verdict) -> list[Op]:
        first, *rest = sorted(verdict.names, key=lambda p: (p[1], p[0]))
        key = joined.key
        twin = verdict.twin[side]
        if twin is not None and self._replaced_on(side, twin):
            kept = self._replace_step(side, twin, [], keep=first, keep_key=key)
            ops = [Op("keep", key, dst=first, emit=lambda: kept, origin=twin)]
        else:
            assert verdict.content is not None
            attributes = verdict.attributes[side]
            assert attributes is not None
            source = self.join.local_of[side.other].get(key)
            if source is None and joined.seen[side.other] is not None:
                source = joined.node(side.other).id
            if source is None and joined.seen[side] is not None:
                return []  # keep-both, but this side's version stays where it is
            node = next(self.numbers.nodes[side])
            if joined.is_dir:
                self.locals[side][key] = node  # what goes into it needs its number
            made = Make(
                key=key,
                node=node,
                reason=verdict.reason or "new on " + side.other.label,
                place=first,
                content=verdict.content,
                attributes=attributes,
                source=source if verdict.content.kind is Kind.FILE else None,
            )
            ops = [Op("make", key, dst=first, is_dir=joined.is_dir, emit=lambda: made)]
        return ops + [Op("link", key, dst=place) for place in rest]

    def _removal_ops(
        self, side: Side, joined: Joined, verdict: Verdict, whole: dict[int, list[int] | None]
    ) -> list[Op]:
        key = joined.key
        if key in whole and whole[key] is None:
            return []
        *extra, last = sorted(joined.names[side], key=lambda p: (p[1], p[0]))
        members = whole.get(key) or []
        dirs = frozenset(k for k in members if self.join.nodes[k].is_dir)
        needed = self.removals or key in self.at_once
        op = Op("remove", key, src=last, is_dir=joined.is_dir, needed=needed, inside=dirs)

        def emit() -> Remove:
            assert op.src is not None
            return Remove(
                key=key,
                node=self.locals[side][key],
                reason=verdict.reason,
                place=op.src,
                members=tuple((k, self.locals[side][k]) for k in members),
                conflict=verdict.conflict,
            )

        op.emit = emit
        return [Op("unlink", key, src=place, needed=needed) for place in extra] + [op]

    def _whole_removals(self, side: Side) -> dict[int, list[int] | None]:
        """Dead directories that can go by one rename, with everything below them.

        Whatever is below such a directory maps to ``None``: it needs no step of its own.
        """
        children: dict[int, list[int]] = defaultdict(list)
        for key, joined in self.join.nodes.items():
            for parent, _ in joined.names[side]:
                children[parent].append(key)

        def dead(key: int) -> bool:
            v = self.verdicts.get(key)
            return v is not None and not v.alive and not v.held and not v.forget

        whole: dict[int, bool] = {}
        order_: list[int] = []
        stack = [k for k, j in self.join.nodes.items() if j.is_dir and dead(k)]
        seen = set()
        while stack:
            key = stack.pop()
            if key in seen:
                continue
            seen.add(key)
            order_.append(key)
            stack += [c for c in children[key] if self.join.nodes[c].is_dir and dead(c)]
        # Deepest first: sort by depth on this side.
        depth: dict[int, int] = {}

        def depth_of(key: int) -> int:
            trail = []
            while key not in depth and key != ROOT and self.join.nodes[key].names[side]:
                trail.append(key)
                key = next(iter(self.join.nodes[key].names[side]))[0]
            base = depth.get(key, 0)
            for k in reversed(trail):
                base += 1
                depth[k] = base
            return base

        for key in sorted(order_, key=depth_of, reverse=True):
            joined = self.join.nodes[key]
            node = joined.seen[side]
            ok = node is not None and not node.foreign
            for child in children[key]:
                other = self.join.nodes[child]
                if not dead(child):
                    continue  # it moves out first
                if other.is_dir:
                    ok = ok and whole.get(child, False)
                else:
                    ok = ok and len(other.names[side]) == 1 and other.node(side).nlink == 1
            whole[key] = ok
        result: dict[int, list[int] | None] = {}
        tops = [
            k
            for k, ok in whole.items()
            if ok and not whole.get(next(iter(self.join.nodes[k].names[side]))[0], False)
        ]
        for top in tops:
            members: list[int] = []
            stack = [top]
            while stack:
                for child in children[stack.pop()]:
                    if dead(child):
                        members.append(child)
                        if self.join.nodes[child].is_dir:
                            stack.append(child)
            result[top] = members
            for key in members:
                result[key] = None
        return result

    def _replaced_on(self, side: Side, key: int) -> bool:
        verdict = self.verdicts[key]
        return (
            verdict.alive
            and not verdict.held
            and verdict.source is side.other
            and self.join.nodes[key].seen[side] is not None
        )

    def _replace_step(
        self,
        side: Side,
        key: int,
        places: list[Place],
        *,
        keep: Place | None = None,
        keep_key: int = 0,
    ) -> Replace:
        verdict, joined = self.verdicts[key], self.join.nodes[key]
        attributes = verdict.attributes[side]
        assert verdict.content is not None
        assert attributes is not None
        old = joined.node(side).id
        kept = keep is not None
        return Replace(
            key=key,
            node=next(self.numbers.nodes[side]) if kept else old,
            reason=verdict.reason,
            places=tuple(places),
            content=verdict.content,
            attributes=attributes,
            source=joined.node(side.other).id,
            conflict=verdict.conflict,
            keep=keep,
            keep_node=old if kept else 0,
            keep_key=keep_key,
        )

    def _contents_and_attributes(
        self, side: Side, where: dict[int, list[Place]], ordered: list[Transition]
    ) -> list[Transition]:
        kept = {s.key for s in ordered if isinstance(s, Replace)}
        steps: list[Transition] = [
            dressed
            for s in ordered
            if isinstance(s, Replace) and (dressed := self._dress(side, s)) is not None
        ]
        made = {s.key for s in ordered if isinstance(s, Make)}
        for key, verdict in self.verdicts.items():
            if (
                not verdict.alive
                or verdict.held
                or key in made
                or (key not in where and key != ROOT)
            ):
                continue
            joined = self.join.nodes[key]
            node, wanted = joined.seen[side], verdict.attributes[side]
            if node is None or wanted is None or (not joined.names[side] and key != ROOT):
                continue
            if key in kept:
                continue
            if verdict.source is side.other and node.kind is not Kind.DIR:
                step: Transition = self._replace_step(side, key, sorted(where[key]))
                steps.append(self._translate(side, step))
                for place in where[key]:
                    self.touched[side].add(place[0])
            elif _settable(wanted, node.attributes, is_dir=joined.is_dir):
                attributes = wanted
                if joined.is_dir:
                    attributes = replace(wanted, mtime_ns=node.attributes.mtime_ns)
                steps.append(
                    SetAttributes(
                        key=key, node=node.id, attributes=attributes, reason=verdict.reason
                    )
                )
        return steps

    def _dress(self, side: Side, step: Replace) -> Transition | None:
        """The kept object of a save by backup takes the attributes it has where it was made."""
        wanted = self.verdicts[step.keep_key].attributes[side]
        assert wanted is not None
        if wanted == self.join.nodes[step.key].node(side).attributes:
            return None
        return SetAttributes(
            key=step.keep_key, node=step.keep_node, attributes=wanted, successor=step.key
        )

    # -- keys to the side's own numbers --------------------------------------

    def _translate(self, side: Side, step: Transition) -> Transition:
        local = self.locals[side]

        def at(place: Place) -> Place:
            return (local[place[0]], place[1])

        match step:
            case Make() | Link():
                displaced = step.displaces
                if displaced is not None:
                    displaced = replace(displaced, place=at(displaced.place))
                return replace(step, place=at(step.place), displaces=displaced)
            case Remove() | Unlink():
                return replace(step, place=at(step.place))
            case Move():
                displaced = step.displaces
                if displaced is not None:
                    displaced = replace(displaced, place=at(displaced.place))
                old = at(step.old) if step.old else None
                return replace(step, old=old, new=at(step.new), displaces=displaced)
            case Exchange():
                return replace(step, old=at(step.old), new=at(step.new))
            case Park():
                return replace(step, old=at(step.old))
            case Replace():
                places = tuple(at(p) for p in step.places)
                return replace(step, places=places, keep=at(step.keep) if step.keep else None)
            case SetAttributes():
                return step

    def _archived(self, step: Transition) -> Transition:
        """The same step with archive numbers instead of keys."""
        key = self.archive[step.key]
        match step:
            case Exchange():
                return replace(step, key=key, other_key=self.archive[step.other_key])
            case Replace() if step.keep is not None:
                return replace(step, key=key, keep_key=self.archive[step.keep_key])
            case SetAttributes() if step.successor is not None:
                return replace(step, key=key, successor=self.archive[step.successor])
            case Remove():
                members = tuple((self.archive[k], node) for k, node in step.members)
                return replace(step, key=key, members=members)
            case Make() | Link() | Move() if step.displaces is not None:
                displaced = self._archived(step.displaces)
                assert isinstance(displaced, Remove)
                return replace(step, key=key, displaces=displaced)
            case _:
                return step if step.key == key else replace(step, key=key)

    # -- what it adds up to --------------------------------------------------

    def _withhold(self, side: Side, op: Op) -> None:
        self.unfinished.update((op.key, *op.inside))
        if op.kind == "remove" and op.emit is not None:
            step = op.emit()
            assert isinstance(step, Remove)
            self.unfinished.update(k for k, _ in step.members)
            self.result.withheld[side][step.node] = 1 + len(step.members)
            return
        for s, seen in zip(SIDES, self.join.nodes[op.key].seen, strict=True):
            if seen is not None:
                self.result.postponed[s].add(seen.id)

    def _touch(self, side: Side, before: dict[Place, int], after: dict[Place, int]) -> None:
        for place in before.keys() | after.keys():
            if before.get(place) != after.get(place):
                self.touched[side].add(place[0])

    def _updates(self) -> None:
        for key, verdict in self.verdicts.items():
            joined = self.join.nodes[key]
            if verdict.held or key in self.unfinished:
                continue
            if key == ROOT:
                self._root_update(verdict, joined)
            elif not verdict.alive:
                if joined.agreed is not None and not self._stays_hidden(verdict, joined):
                    self.result.updates.append(Update(key=key, names=frozenset()))
            elif key in self.busy_keys or self._differs(verdict, joined):
                ids = tuple(self.locals[s].get(key, 0) for s in SIDES)
                if 0 in ids or verdict.content is None:
                    continue
                self.result.updates.append(
                    Update(
                        key=self.archive[key],
                        names=frozenset((self.archive[p], n) for p, n in verdict.names),
                        content=verdict.content,
                        ids=(ids[0], ids[1]),
                        attributes=(verdict.attributes[0], verdict.attributes[1]),
                        presumed=verdict.presumed,
                    )
                )

    def _stays_hidden(self, verdict: Verdict, joined: Joined) -> bool:
        """Whether it may come back when the filter changes again: its directory still stands."""
        parents = [self.verdicts.get(parent) for parent, _ in joined.base]
        return verdict.hidden and all(p is None or p.alive or p.hidden for p in parents)

    def _root_update(self, verdict: Verdict, joined: Joined) -> None:
        if joined.agreed is None or ROOT in self.busy_keys or self._differs(verdict, joined):
            self.result.updates.append(
                Update(
                    key=ROOT,
                    names=frozenset(),
                    content=Content(Kind.DIR),
                    ids=(ROOT, ROOT),
                    attributes=(verdict.attributes[0], verdict.attributes[1]),
                )
            )

    def _differs(self, verdict: Verdict, joined: Joined) -> bool:
        agreed = joined.agreed
        if agreed is None or verdict.names != joined.base or verdict.presumed != agreed.presumed:
            return True
        if not joined.is_dir and verdict.content != agreed.content:
            return True
        for side in SIDES:
            node = joined.seen[side]
            column = agreed.attributes[side]
            if node is None or agreed.ids[side] != node.id or column is None:
                return True
            if not joined.is_dir and agreed.versions[side] != node.version:
                return True
            if _settable(node.attributes, column, is_dir=joined.is_dir):
                return True
        return False

    def _directory_times(self) -> None:
        for key, verdict in self.verdicts.items():
            joined = self.join.nodes[key]
            if key == ROOT or not verdict.alive or verdict.held or not joined.is_dir:
                continue  # state and store touch the root's own time: it does not travel
            a, b = verdict.attributes
            if a is None or b is None:
                continue
            a_ours, b_ours = (key in self.touched[s] or joined.seen[s] is None for s in SIDES)
            differ = any(
                (node := joined.seen[s]) is None
                or node.attributes.mtime_ns != wanted.mtime_ns
                or (joined.agreed is None)
                or (column := joined.agreed.attributes[s]) is None
                or column.mtime_ns != node.attributes.mtime_ns
                for s, wanted in zip(SIDES, (a, b), strict=True)
            )
            if a_ours or b_ours or differ:
                ids = (self.locals[0].get(key, 0), self.locals[1].get(key, 0))
                if 0 not in ids:
                    seen = [None if n is None else n.attributes.mtime_ns for n in joined.seen]
                    self.result.directory_times.append(
                        DirectoryTime(
                            self.archive[key],
                            ids,
                            (a.mtime_ns, b.mtime_ns),
                            (seen[0], seen[1]),
                            (a_ours, b_ours),
                        )
                    )


def _settable(wanted: Attributes, now: Attributes, *, is_dir: bool) -> bool:
    """Whether there is something to set; a directory's time is set at the end of a run."""
    if is_dir:
        return replace(wanted, mtime_ns=0) != replace(now, mtime_ns=0)
    return wanted != now
