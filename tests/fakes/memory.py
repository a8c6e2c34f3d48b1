"""A pair of replicas in memory: the same values as the real ones, no disk.

``MemoryReplica`` keeps nodes and names; users change it with the ``do_*`` methods, the
engine with :meth:`MemoryReplica.perform`. Whatever the engine displaces goes to ``kept``.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from bisync.core.closure import close
from bisync.core.diff import join, wanted_digests
from bisync.core.groups import JOURNALS, goes_with, groups_in, stem
from bisync.core.node import (
    ROOT,
    SIDES,
    Agreed,
    Attributes,
    Content,
    Kind,
    Node,
)
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Placements,
    Plan,
    Remove,
    Replace,
    SetAttributes,
    Unlink,
    Update,
    keys_of,
)
from bisync.core.planner import Numbers, make_plan
from bisync.core.reconcile import Outcome, reconcile
from bisync.core.resolve import Rules
from bisync.session.groups import settle


class Stale(Exception):
    """The tree does not hold what the step expected."""


def file_content(text: str) -> Content:
    return Content(Kind.FILE, size=len(text), digest=text.encode().ljust(32, b"."))


class MemoryReplica:
    """One tree. Offers the same lookups as a real index (``View``)."""

    def __init__(self, name: str, first_number: int = 2) -> None:
        self.name = name
        self.count = itertools.count(first_number)
        self.clock = itertools.count(1000)
        attributes = Attributes(0o755, 0, 0, 1)
        self.node = {ROOT: Node(ROOT, Content(Kind.DIR), attributes)}
        self.at_place = {}
        self.hidden = set()
        self.marks = set()
        self.kept = []
        self.parked = {}
        self.halfway = {}
        self.content_moved = 0  # files whose bytes crossed

    # -- lookups -------------------------------------------------------------

    def nodes(self, ids):
        named = set(self.at_place.values()) | {ROOT}
        return {n: self.node[n] for n in ids if n in named}

    def names_of(self, ids):
        wanted = set(ids)
        out = {}
        for place, node in self.at_place.items():
            if node in wanted:
                out.setdefault(node, set()).add(place)
        return {n: frozenset(p) for n, p in out.items()}

    def at(self, places):
        return {p: self.at_place[p] for p in places if p in self.at_place}

    def children(self, ids):
        out = {n: [] for n in ids}
        for (parent, name), node in self.at_place.items():
            if parent in out:
                out[parent].append((name, node))
        return out

    def forgotten(self, ids):
        return self.hidden & set(ids)

    # -- what people do ------------------------------------------------------

    def tick(self):
        return next(self.clock)

    def make(self, parent, name, content):
        assert (parent, name) not in self.at_place
        node = next(self.count)
        mode = 0o755 if content.kind is Kind.DIR else 0o644
        self.node[node] = Node(
            node, content, Attributes(mode, 0, 0, self.tick()), version=self.tick()
        )
        self.at_place[parent, name] = node
        self.marks.add(node)
        return node

    def edit(self, node, content):
        old = self.node[node]
        time = self.tick()
        self.node[node] = replace(
            old,
            content=content,
            version=time,
            ctime_ns=time,
            attributes=replace(old.attributes, mtime_ns=time),
        )
        self.marks.add(node)

    def chmod(self, node, mode):
        old = self.node[node]
        self.node[node] = replace(
            old, ctime_ns=self.tick(), attributes=replace(old.attributes, mode=mode)
        )
        self.marks.add(node)

    def touch(self, node):
        old = self.node[node]
        time = self.tick()
        self.node[node] = replace(
            old, ctime_ns=time, attributes=replace(old.attributes, mtime_ns=time)
        )
        self.marks.add(node)

    def rename(self, old, new):
        """As the system call: replaces what is there, refuses what the kernel refuses."""
        node = self.at_place[old]
        target = self.at_place.get(new)
        if target == node or self.inside(new[0], node):
            return
        if target is not None:
            self.remove(new)
        del self.at_place[old]
        self.at_place[new] = node
        self.marks.add(node)

    def link(self, node, place):
        self.at_place[place] = node
        self.marks.add(node)

    def remove(self, place):
        node = self.at_place.pop(place)
        self.marks.add(node)
        for below in [p for p in self.at_place if p[0] == node]:
            self.remove(below)

    def inside(self, node, ancestor):
        while node != ROOT:
            if node == ancestor:
                return True
            node = next(p[0] for p, n in self.at_place.items() if n == node)
        return node == ancestor

    # -- what the engine does ------------------------------------------------

    def keep(self, node):
        content = self.node[node].content
        if content.kind is not Kind.DIR and node not in self.at_place.values():
            self.kept.append(content)

    def store(self, node):
        """Move a node without a name, and all below it, to the store."""
        below = self._below(node)
        for place, _ in below:
            del self.at_place[place]
        for each in {n for _, n in below} | {node}:
            self.keep(each)

    def inside_dead(self, place):
        return place[0] != ROOT and place[0] not in self.at_place.values()

    def _expect(self, place, node):
        if self.at_place.get(place) != node:
            raise Stale(f"{self.name}: {place} holds {self.at_place.get(place)}, not {node}")

    def _free(self, place):
        if place in self.at_place:
            raise Stale(f"{self.name}: {place} is taken by {self.at_place[place]}")
        if place[0] != ROOT and place[0] not in self.at_place.values():
            raise Stale(f"{self.name}: no directory {place[0]}")
        if self.node[place[0]].content.kind is not Kind.DIR:
            raise Stale(f"{self.name}: {place[0]} is no directory")

    def _outside(self, parent, node):
        if self.inside(parent, node):
            raise Stale(f"{self.name}: a directory below itself")

    def perform(self, step, other: "MemoryReplica"):
        match step:
            case Make():
                if step.displaces is not None:
                    self.perform(step.displaces, other)
                self._free(step.place)
                assert step.node not in self.node, "a node number was used twice"
                if step.content.kind is Kind.FILE:
                    assert other.node[step.source].content == step.content
                    self.content_moved += 1
                self.node[step.node] = Node(
                    step.node, step.content, step.attributes, version=self.tick()
                )
                self.at_place[step.place] = step.node
            case Link():
                if step.node not in self.at_place.values():
                    raise Stale(f"{self.name}: {step.node} is not there")
                if step.displaces is not None:
                    self.perform(step.displaces, other)
                self._free(step.place)
                self.at_place[step.place] = step.node
            case Move(old=None):
                self._free(step.new)
                if step.node not in self.parked:
                    raise Stale(f"{self.name}: {step.node} is not parked")
                del self.parked[step.node]
                self.at_place[step.new] = step.node
            case Move():
                self._expect(step.old, step.node)
                if step.displaces is not None:
                    self.perform(step.displaces, other)
                self._free(step.new)
                self._outside(step.new[0], step.node)
                del self.at_place[step.old]
                self.at_place[step.new] = step.node
            case Exchange():
                self._expect(step.old, step.node)
                self._expect(step.new, step.other)
                self._outside(step.new[0], step.node)
                self._outside(step.old[0], step.other)
                self.at_place[step.old], self.at_place[step.new] = step.other, step.node
            case Park():
                self._expect(step.old, step.node)
                self.parked[step.node] = step.old
                del self.at_place[step.old]
            case Replace():
                for place in step.places:
                    self._expect(place, step.keep_node if step.keep else step.node)
                if step.content.kind is Kind.FILE:
                    assert other.node[step.source].content == step.content
                    self.content_moved += 1
                if step.keep is not None:
                    self._free(step.keep)
                    self.node[step.node] = Node(step.node, step.content, step.attributes)
                    self.at_place[step.keep] = step.keep_node
                    for place in step.places:
                        self.at_place[place] = step.node
                else:
                    self.kept.append(self.node[step.node].content)
                    self.node[step.node] = replace(
                        self.node[step.node],
                        content=step.content,
                        attributes=step.attributes,
                        version=self.tick(),
                    )
            case Unlink():
                self._expect(step.place, step.node)
                del self.at_place[step.place]
            case Remove():
                self._expect(step.place, step.node)
                below = self._below(step.node)
                if {n for _, n in below} != {n for _, n in step.members}:
                    raise Stale(f"{self.name}: unexpected members")
                for place, _ in [*below, (step.place, step.node)]:
                    del self.at_place[place]
                for node in {n for _, n in below} | {step.node}:
                    self.keep(node)
            case SetAttributes():
                if step.node not in self.node:
                    raise Stale(f"{self.name}: {step.node} is not there")
                old = self.node[step.node]
                self.node[step.node] = replace(old, attributes=step.attributes)

    def _below(self, node):
        out = []
        for place, child in self.at_place.items():
            if place[0] == node:
                out.append((place, child))
                out += self._below(child)
        return out

    # -- comparing -----------------------------------------------------------

    def tree(self, node=ROOT, prefix=b"", *, times=True):
        """Path -> everything a user can see, hard-link groups by their smallest path."""
        out = {}
        for path, child in sorted(self._paths(node, prefix)):
            seen = self.node[child]
            group = min(p for p, c in self._paths(ROOT, b"") if c == child)
            attributes = seen.attributes
            if seen.kind is Kind.DIR or not times:
                attributes = replace(attributes, mtime_ns=0)
            out[path] = (seen.content, attributes, group)
        return out

    def _paths(self, node, prefix):
        for (parent, name), child in self.at_place.items():
            if parent == node:
                yield prefix + name, child
                yield from self._paths(child, prefix + name + b"/")


@dataclass
class MemoryArchive:
    """The ancestor in memory, with the lookups a closure needs (``AgreedView``)."""

    rows: dict = field(default_factory=dict)
    at_place: dict = field(default_factory=dict)
    count: Iterable = field(default_factory=lambda: itertools.count(2))

    def nodes(self, keys):
        return {k: self.rows[k] for k in keys if k in self.rows}

    def names_of(self, keys):
        wanted = set(keys)
        out = {}
        for place, key in self.at_place.items():
            if key in wanted:
                out.setdefault(key, set()).add(place)
        return {k: frozenset(p) for k, p in out.items()}

    def at(self, places):
        return {p: self.at_place[p] for p in places if p in self.at_place}

    def children(self, keys):
        out = {k: [] for k in keys}
        for (parent, name), key in self.at_place.items():
            if parent in out:
                out[parent].append((name, key))
        return out

    def by_side(self, side, ids):
        index = {row.ids[side]: key for key, row in self.rows.items()}
        return {n: index[n] for n in ids if n in index}

    def commit(self, update: Update, sides):
        for side in SIDES:
            sides[side].halfway.pop(update.ids[side], None)
        self.at_place = {p: k for p, k in self.at_place.items() if k != update.key}
        if not update.names and update.key != ROOT:
            self.rows.pop(update.key, None)
            return
        for place in update.names:
            # Whoever held the place leaves it with an update of the same batch.
            self.at_place[place] = update.key
        found = [sides[s].nodes([update.ids[s]])[update.ids[s]] for s in SIDES]
        self.rows[update.key] = Agreed(
            update.key,
            found[0].content,
            (found[0].attributes, found[1].attributes),
            update.ids,
            (found[0].version, found[1].version),
            update.presumed,
        )


class MemoryPair:
    """Two replicas and their ancestor; runs cycles."""

    def __init__(self, rules: Rules | None = None, *, databases: bool = False) -> None:
        """``databases``: by their names alone, in the root."""
        self.databases = databases
        self.left = []  # databases that the last plan left alone
        self.sides = (MemoryReplica("alpha"), MemoryReplica("beta", 1_000_000))
        self.archive = MemoryArchive()
        self.rules = rules or Rules(replicas=("A", "B"))
        self.conflicts = []
        self.notes = []
        self.steps_done = 0

    def plan(self, marks=None, *, removals=True) -> tuple[Plan, Outcome]:
        if marks is None:
            marks = tuple(set(s.node) for s in self.sides)
        one_way = self.rules.one_way is not None
        agreed, parts = close(self.archive, self.sides, marks, one_way=one_way)
        for part, replica in zip(parts, self.sides, strict=True):
            part.halfway = dict(replica.halfway)
        joined = join(agreed, parts)
        wanted = wanted_digests(joined)
        assert not wanted[0] and not wanted[1], "in memory every digest is known"

        def taken(side, place):
            parent = joined.local_of[side].get(place[0])
            return parent is not None and (parent, place[1]) in self.sides[side].at_place

        def judge(rules, held):
            return reconcile(joined, rules, held=dict(held), taken=taken)

        outcome, at_once = judge(self.rules, {}), set()
        if self.databases:
            stems = tuple(
                {(p, stem(name)) for p, name in s.at_place if name.endswith(JOURNALS)}
                for s in self.sides
            )
            groups = groups_in(joined, stems)
            outcome, self.left = settle(joined, outcome, groups, self.rules, judge)
            at_once.update(*(goes_with(outcome, group) for group in groups))
        numbers = Numbers((self.sides[0].count, self.sides[1].count), self.archive.count)
        plan = make_plan(joined, outcome, numbers, removals=removals, at_once=at_once)
        return plan, outcome

    def guarded_cycle(self, marks=None) -> None:
        """A cycle as a session runs it: removals wait until the guard has counted them."""
        if marks is None:
            marks = tuple(set(s.node) for s in self.sides)
        plan = self.cycle(marks, removals=False)
        for side in SIDES:
            waiting = set(plan.withheld[side])
            if waiting:
                both = [set(), set()]
                both[side] = waiting
                self.cycle(tuple(both))
        if any(plan.postponed):
            self.cycle(plan.postponed)

    def cycle(
        self,
        marks=None,
        *,
        stop_after: int | None = None,
        fail_at: int | None = None,
        removals: bool = True,
    ) -> Plan:
        """One cycle.

        Args:
            stop_after: end it after that many steps, as a crash would.
            fail_at: the number of a step that fails, with all that needed it.
        """
        plan, _ = self.plan(marks, removals=removals)
        failed, count = set(), 0
        placed = (Placements(), Placements())
        for side in SIDES:
            for step in plan.steps[side]:
                if count == stop_after:
                    self._leave_halfway(placed, None)
                    self._crash(plan)
                    return plan
                count += 1
                try:
                    if failed.intersection(keys_of(step)):
                        raise Stale("it waits with the rest of its node")
                    if count - 1 == fail_at:
                        raise Stale("as the test wants it")
                    self.sides[side].perform(step, self.sides[side.other])
                except Stale:
                    if fail_at is None:
                        raise
                    failed.update(keys_of(step))
                    continue
                self.steps_done += 1
                placed[side].add(step)
        for side in SIDES:
            failed.update(s.key for s in plan.steps[side] if s.node in self.sides[side].parked)
        if failed:
            self._leave_halfway(placed, failed)
            self._bring_back()
        self.conflicts += plan.conflicts
        self.notes += plan.notes
        for update in plan.updates:
            if update.key not in failed and not update.names and update.key != ROOT:
                self.archive.commit(update, self.sides)
        done = {u.key for u in plan.updates} - failed | self.archive.rows.keys() | {ROOT}
        for update in plan.updates:
            named = update.names or update.key == ROOT
            if update.key not in failed and named and all(p in done for p, _ in update.names):
                self.archive.commit(update, self.sides)
        for replica in self.sides:
            assert not replica.parked
            if not failed:
                replica.marks.clear()
        return plan

    def _leave_halfway(self, placed, failed):
        """As the engine does: what was moved from an agreed name and is not agreed on."""
        for side in SIDES:
            names = {
                (ROOT if parent == ROOT else self.archive.rows[parent].ids[side], name): key
                for (parent, name), key in self.archive.at_place.items()
            }
            self.sides[side].halfway |= {
                node: p.last
                for node, p in placed[side].items()
                if (failed is None or p.key in failed) and names.get(p.first) == p.key
            }

    def _crash(self, plan):
        """Nothing was agreed; parked nodes go back, or to the store, as recovery has it."""
        self._bring_back(crashed=True)

    def _bring_back(self, *, crashed=False):
        for side in SIDES:
            replica = self.sides[side]
            for node, place in list(replica.parked.items()):
                target = place
                del replica.parked[node]
                if target in replica.at_place or replica.inside_dead(target):
                    if crashed:
                        replica.store(node)
                        continue
                    target = (ROOT, b"recovered-%d" % node)
                    if node in replica.halfway:
                        replica.halfway[node] = target
                replica.at_place[target] = node
            replica.marks.update(replica.node)
