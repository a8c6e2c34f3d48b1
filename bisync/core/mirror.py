"""destination := source, within what was asked for: pairs become a plan for one side.

The destination is observed, not trusted; what its users changed is displaced into the store
like anything else that is in the way.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.diff import Join, Joined
from bisync.core.items import Item, letters_of, link_letters
from bisync.core.node import (
    ROOT,
    AgreedPart,
    Attributes,
    Kind,
    Node,
    NodeId,
    Part,
    Place,
    Side,
)
from bisync.core.pairing import Pairs, Target
from bisync.core.path import shorten
from bisync.core.plan import Make, Plan, Replace
from bisync.core.planner import Numbers, make_plan
from bisync.core.reconcile import Outcome, Verdict
from bisync.core.wish import Held, Seen, Wish

_BETA = Side.BETA


class Protects(Protocol):
    """The filter's word on what may not be deleted at the destination."""

    def __call__(self, path: bytes, *, is_dir: bool, deleting: bool) -> bool: ...


class Doomed(Struct):
    """One entry of the destination that no entry of the source stands for."""

    key: int
    path: bytes
    node: NodeId
    is_dir: bool
    name: Place | None = None  # only this name of it


class MirrorPlan(Struct):
    """What is to be done, and what it means for people and for the memory."""

    plan: Plan = field(default_factory=Plan)
    items: dict[int, Item] = field(default_factory=dict)  # by key
    nodes: dict[int, NodeId] = field(default_factory=dict)  # what each key will be
    times: list[tuple[int, int]] = field(default_factory=list)  # (key of a directory, mtime)
    problems: list[tuple[bytes, str]] = field(default_factory=list)
    copies: set[int] = field(default_factory=set)  # keys that get content


class Mirror:
    """Builds the plan; deletions are counted first, so that a guard can speak."""

    def __init__(
        self,
        wish: Wish,
        pairs: Pairs,
        target: Target,
        protects: Protects,
        reads: tuple[Callable[[Seen], bytes | None], Callable[[Held], bytes | None]],
        now_ns: int,
    ) -> None:
        """``reads`` learn the digest of a file of the source, and of the destination."""
        self.wish = wish
        self.pairs = pairs
        self.target = target
        self.protects = protects
        self.reads = reads
        self.now_ns = now_ns
        self.out = MirrorPlan()
        self.join = Join(AgreedPart(), (Part(), Part()))
        self.verdicts: dict[int, Verdict] = {}
        self.planned: dict[int, Attributes] = {}
        self.doomed: list[Doomed] = []
        self._keys = itertools.count(max(pairs.seen, default=ROOT) + 1)
        self._key_of = dict(pairs.key_of)
        self._node_of = {key: node for node, key in pairs.key_of.items()}
        self._base = self._node_of[ROOT]
        self._split: dict[NodeId, int] = {}  # nodes that an entry left, by a number of their own
        self._dressed: dict[int, Attributes] = {}  # of files that get an object of their own
        self._lost: dict[NodeId, set[Place]] = {}  # extra names that go
        self._written: set[NodeId] = set()  # nodes whose entries were looked at
        self._aside: list[Doomed] = []  # what is kept beside its name instead
        self._stays: set[int] = set()  # extra directories that must stay for what is in them

    # -- what goes -----------------------------------------------------------

    def deletions(self) -> list[Doomed]:
        """What is extra and may go, children before their directory."""
        if self.wish.delete:
            for place, held in sorted(self.pairs.extra.items()):
                self._doom(place, held)
            for place, held in sorted(self.pairs.extra_names.items()):
                name = (self._key_for(place[0]), place[1])
                path = self.path(name)
                if not self.protects(path, is_dir=False, deleting=False):
                    self.doomed.append(Doomed(next(self._keys), path, held.node.id, False, name))
        if self.wish.backup_suffix:
            self._aside = [d for d in self.doomed if not d.is_dir and d.name is None]
            self.spare({d.key for d in self._aside})
        return [*self._aside, *self.doomed]

    def _doom(self, place: Place, held: Held) -> bool:
        """Mark a subtree; ``False`` if something in it has to stay."""
        path = self.path((self._key_for(place[0]), place[1]))
        if self.protects(path, is_dir=held.is_dir, deleting=False):
            return False
        return self._doom_tree(path, held, place[0])

    def _doom_tree(self, path: bytes, held: Held, parent: NodeId) -> bool:
        stack: list[tuple[bytes, Held, bool]] = [(path, held, False)]
        above = {path: parent}
        blocked: set[bytes] = set()
        while stack:
            here, one, entered = stack.pop()
            if one.is_dir and not entered:
                stack.append((here, one, True))
                for name, child in sorted(self.target.listing(one.node.id).items(), reverse=True):
                    below = here + b"/" + name
                    above[below] = one.node.id
                    if child.node.id in self.pairs.key_of:
                        self._doom_name(child, (self._key_for(one.node.id), name), below)
                        continue
                    if self.protects(below, is_dir=child.is_dir, deleting=True):
                        blocked.add(here)
                    else:
                        stack.append((below, child, False))
                continue
            if here in blocked or (one.is_dir and one.node.foreign):
                blocked.add(here.rsplit(b"/", 1)[0])
                self._stays.add(self._key_for(one.node.id))
                continue
            node = one.node.id
            if not one.is_dir and one.node.nlink > 1 and len(self.target.names(node)) > 1:
                at = (self._key_for(above[here]), here.rpartition(b"/")[2])
                self.doomed.append(Doomed(next(self._keys), here, node, False, at))
                continue
            self.doomed.append(Doomed(self._key_for(node), here, node, one.is_dir))
        return path not in blocked

    def _doom_name(self, held: Held, place: Place, path: bytes) -> None:
        """A node of the source's moves out of what goes, or loses one of several names there."""
        key = self.pairs.key_of[held.node.id]
        wanted = self.pairs.places.get(key, set())
        if len(self.target.names(held.node.id)) > 1 and place not in wanted:
            self.doomed.append(Doomed(next(self._keys), path, held.node.id, False, place))

    def spare(self, keys: set[int]) -> None:
        """Leave these where they are, and the directories above them."""
        by_key = {d.key: d for d in self.doomed}
        for key in list(keys):
            while key in by_key and key not in self._stays:
                self._stays.add(key)
                places = self.target.names(by_key[key].node)
                key = self._key_for(min(places)[0]) if places else ROOT
        self.doomed = [d for d in self.doomed if d.key not in self._stays]

    # -- the plan ------------------------------------------------------------

    def plan(self, numbers: Iterator[NodeId], root: Seen | None = None) -> MirrorPlan:
        """Build the plan with what may go by now.

        Args:
            numbers: of new nodes.
            root: the directory whose attributes the destination itself gets.
        """
        self._make_room()
        for doomed in self.doomed:
            if doomed.name is not None:
                self._lost.setdefault(doomed.node, set()).add(doomed.name)
        if root is not None:
            self._root(root)
        for key, seen in self.pairs.seen.items():
            self._entry(key, seen)
        for node, places in self._lost.items():
            for place in places if node not in self._written else ():
                self._lose_name(node, place)
        self._keep_old_objects()
        for doomed in self._aside:
            self._set_aside(doomed)
        for doomed in self.doomed:
            if doomed.name is None:
                self._dead(doomed.key, doomed.node, "not in the source")
        self._add_surroundings()
        for key, verdict in self.verdicts.items():  # the source has what is to be
            names = verdict.names if verdict.alive else frozenset()
            self.join.nodes[key].names[Side.ALPHA] = names
        outcome = Outcome(self.verdicts, [], [], [])
        two = Numbers((iter(()), numbers), self._keys)
        self.out.plan = make_plan(self.join, outcome, two, removals=True)
        for key in self.out.plan.withheld[_BETA]:
            self.out.problems.append((self._path_of(key), "it cannot go: something in it stays"))
        self._number()
        return self.out

    def _path_of(self, node: NodeId) -> bytes:
        names = self.target.names(node)
        if not names:
            return b""
        parent, name = min(names, key=lambda p: p[1])
        return self.path((self._key_for(parent), name))

    def _root(self, seen: Seen) -> None:
        held = self.target.held(self._base)
        now = held.node.attributes
        wanted = self.wish.attributes(seen, held, now, copied=False, now_ns=self.now_ns)
        self.planned[ROOT] = wanted
        self._directory_time(ROOT, wanted)
        letters = letters_of(self.wish, seen, held, copied=False, wanted=wanted)
        if letters[2:].strip("."):
            self.out.items[ROOT] = Item(letters, b"", is_dir=True)
        self._joined(ROOT, held, frozenset())
        self.verdicts[ROOT].alive = True
        if not self._same(seen, held, wanted):
            self.verdicts[ROOT].attributes[_BETA] = wanted

    def _make_room(self) -> None:
        """What sits where something else must go, goes; what may not, blocks that."""
        doomed = {d.node for d in self.doomed if d.name is None}
        for place, held in list(self.pairs.displaced.items()):
            node = held.node.id
            if node in doomed:
                continue
            if node in self.pairs.key_of:
                if len(self.target.names(node)) > 1:
                    self._lost.setdefault(node, set()).add(place)
                continue
            if not held.is_dir and len(self.target.names(node)) > 1:
                self._lose_name(node, place)
                continue
            path = self.path(place)
            if held.is_dir and not self._may_go(path, held, self._node_of[place[0]]):
                self.out.problems.append((path, "a directory that is not empty is in its way"))
                self._drop(place)
                continue
            if self.wish.backup_suffix and not held.is_dir:
                self._aside.append(Doomed(self._key_for(node), path, node, is_dir=False))
            else:
                self._dead(self._key_for(node), node, "something else took its name")

    def _may_go(self, path: bytes, held: Held, parent: NodeId) -> bool:
        if not self.target.listing(held.node.id) and not held.node.foreign:
            return True
        if not (self.wish.force or self.wish.delete):
            return False
        before = len(self.doomed)
        if self._doom_tree(path, held, parent):
            self.doomed.pop()  # the directory itself is displaced
            return True
        del self.doomed[before:]
        return False

    def _drop(self, place: Place) -> None:
        """An entry cannot get its name."""
        for key, places in self.pairs.places.items():
            if place in places:
                places.discard(place)
                if not places:
                    del self.pairs.seen[key], self.pairs.held[key], self.pairs.places[key]
                return

    def _lose_name(self, node: NodeId, place: Place) -> None:
        """A node with several names loses one; with the last one it goes."""
        verdict = self.verdicts[self._own_key(node)]
        verdict.names -= {place}
        verdict.alive = bool(verdict.names)
        verdict.reason = "something else took its name"

    def _own_key(self, node: NodeId) -> int:
        """The number of a node of the destination that is not simply one entry's."""
        key = self._split.get(node) or self._key_for(node)
        if key in self.pairs.seen:  # its number is an entry's, which gets an object of its own
            key = self._split[node] = next(self._keys)
        if key not in self.verdicts:
            self._present(key, self.target.held(node))
        return key

    def _shared_entry(self, key: int, seen: Seen) -> bool:
        """A separate file that is one of several names of a node; whether that will do."""
        if self.wish.ignore_existing:
            return True
        held = self.pairs.held[key]
        assert held is not None
        parent = self._attributes_of_parent(seen.parent)
        copied = self._needs_content(seen, held)
        wanted = self.wish.attributes(seen, held, parent, copied=copied, now_ns=self.now_ns)
        place = (seen.parent, seen.name)
        if not copied:
            if wanted != held.node.attributes:
                other = self._own_key(held.node.id)
                self.verdicts[other].attributes[_BETA] = wanted
                now = frozenset({place})
                self._itemize(key, seen, held, copied=False, attributes=wanted, now=now)
            return True
        self._lose_name(held.node.id, place)
        self.pairs.held[key] = None
        self._dressed[key] = wanted
        return False

    def _entry(self, key: int, seen: Seen) -> None:
        if key in self.pairs.shared and self._shared_entry(key, seen):
            return
        held = self.pairs.held[key]
        names = frozenset(self.pairs.places[key])
        copied = held is None or self._needs_content(seen, held)
        if held is not None and not copied and self._is_twin(key, seen, held, names):
            return
        parent = self._attributes_of_parent(seen.parent)
        attributes = self._dressed.get(key) or self.wish.attributes(
            seen, held, parent, copied=copied, now_ns=self.now_ns
        )
        if held is not None and self.wish.ignore_existing and not seen.is_dir:
            attributes = held.node.attributes
        self.planned[key] = attributes
        now = self._names_in_keys(held)
        if held is not None and not seen.is_dir:
            self._written.add(held.node.id)
            if len(now) > 1 and not copied:
                names |= now - names - self._lost.get(held.node.id, set())
        if seen.is_dir:
            self._directory_time(key, attributes)
        self._itemize(key, seen, held, copied=copied, attributes=attributes, now=now)
        if held is not None and not copied and now == names and self._same(seen, held, attributes):
            return
        if held is not None and copied and len(now) > 1 and now != names:
            for place in sorted(now & (names | self._lost.get(held.node.id, set()))):
                self._lose_name(held.node.id, place)
            held, now = None, frozenset()
        joined = self._joined(key, held, now)
        joined.seen[Side.ALPHA] = Node(key, seen.content, seen.attributes)
        verdict = self.verdicts[key]
        verdict.alive, verdict.names, verdict.content = True, names, seen.content
        verdict.attributes[_BETA] = attributes
        verdict.reason = "new" if held is None else ""
        self.join.bind(Side.ALPHA, key, key)
        if copied and held is not None and self.wish.backup_suffix:
            self._back_up(key, held, now)
        if copied:
            verdict.source = Side.ALPHA
            if not seen.is_dir:
                self.out.copies.add(key)

    def _is_twin(self, key: int, seen: Seen, held: Held, names: frozenset[Place]) -> bool:
        """Whether a node is in everything what its entry is, as nearly all are."""
        attributes = held.node.attributes
        if attributes != seen.attributes or self.wish.chmod.steps or key in self._dressed:
            return False
        if self._names_in_keys(held) != names:
            return False
        self.planned[key] = attributes
        if seen.is_dir:
            self._directory_time(key, attributes)
        else:
            self._written.add(held.node.id)
        return True

    def _needs_content(self, seen: Seen, held: Held) -> bool:
        if seen.is_dir:
            return False
        return self.wish.needs_content(seen, held, *self.reads)

    def _same(self, seen: Seen, held: Held, wanted: Attributes) -> bool:
        now = held.node.attributes
        return wanted == (replace(now, mtime_ns=wanted.mtime_ns) if seen.is_dir else now)

    def _keep_old_objects(self) -> None:
        """A save by backup: the old object moved aside and a new one took its name.

        Then the new content is exchanged in and the old object gets its new name in the same
        step, so that the name is never missing.
        """
        at: dict[Place, int] = {}
        for key, verdict in self.verdicts.items():
            joined = self.join.nodes[key]
            if joined.seen[_BETA] is None and verdict.alive and len(verdict.names) == 1:
                at[next(iter(verdict.names))] = key
        for key in list(self.verdicts):
            verdict, joined = self.verdicts[key], self.join.nodes[key]
            node = joined.seen[_BETA]
            has = joined.names[_BETA]
            if node is None or node.kind is not Kind.FILE or len(has) != 1 or not verdict.alive:
                continue
            new = at.get(next(iter(has)))
            if new is None or verdict.source is not None or len(verdict.names) != 1:
                continue
            fresh = self.verdicts[new]
            if fresh.content is None or fresh.content.kind is not Kind.FILE or has & verdict.names:
                continue
            taker = self.join.nodes[new]
            taker.seen[_BETA], joined.seen[_BETA] = node, None
            taker.names[_BETA], joined.names[_BETA] = has, frozenset()
            self.join.bind(_BETA, node.id, new)
            del self.join.local_of[_BETA][key]
            verdict.twin[_BETA] = new
            verdict.content = node.content

    # -- backups beside their names -------------------------------------------

    def _back_up(self, key: int, held: Held, now: frozenset[Place]) -> None:
        """The old object of a file gets the name with the suffix, in the step that replaces it."""
        if held.is_dir or len(now) != 1:
            return  # the store has it
        ((parent, name),) = now
        place = (parent, shorten(name, self.wish.backup_suffix))
        if not self._clear(place):
            return
        other = next(self._keys)
        self._joined(other, None, frozenset())
        verdict = self.verdicts[other]
        verdict.alive, verdict.names, verdict.content = True, frozenset({place}), held.node.content
        verdict.attributes[_BETA] = held.node.attributes
        verdict.twin[_BETA] = key

    def _set_aside(self, doomed: Doomed) -> None:
        """What would be deleted gets the name with the suffix."""
        if doomed.key in self.verdicts:
            return
        self._present(doomed.key, self.target.held(doomed.node))
        verdict = self.verdicts[doomed.key]
        ((parent, name),) = verdict.names
        place = (parent, shorten(name, self.wish.backup_suffix))
        if name.endswith(self.wish.backup_suffix) or not self._clear(place):
            self._dead(doomed.key, doomed.node, "not in the source")
        else:
            verdict.names = frozenset({place})

    def _clear(self, place: Place) -> bool:
        """Whether a name for a backup is free, or an older backup there can go to the store."""
        if any(place in v.names for v in self.verdicts.values() if v.alive):
            return False
        parent = self._node_of.get(place[0])
        there = None if parent is None else self.target.listing(parent).get(place[1])
        if there is None:
            return True
        node = there.node.id
        if there.is_dir or node in self.pairs.key_of or len(self.target.names(node)) > 1:
            return False
        self._dead(self._key_for(node), node, "an older backup")
        return True

    # -- nodes and names -----------------------------------------------------

    def _dead(self, key: int, node: NodeId, reason: str) -> None:
        if key not in self.verdicts:
            self._present(key, self.target.held(node))
        verdict = self.verdicts[key]
        verdict.alive, verdict.names, verdict.reason = False, frozenset(), reason

    def _present(self, key: int, held: Held) -> None:
        """An entry of the destination that stays as it is, until something else is said."""
        names = self._names_in_keys(held)
        self._joined(key, held, names)
        verdict = self.verdicts[key]
        verdict.alive, verdict.names, verdict.content = True, names, held.node.content

    def _joined(self, key: int, held: Held | None, names: frozenset[Place]) -> Joined:
        joined = Joined(key)
        if held is not None:
            joined.seen[_BETA] = held.node
            joined.names[_BETA] = names
            self.join.bind(_BETA, held.node.id, key)
        self.join.nodes[key] = joined
        self.verdicts[key] = Verdict(key)
        return joined

    def _add_surroundings(self) -> None:
        """Every directory above something that is named in the plan is part of it."""
        waiting = [p for j in self.join.nodes.values() for n in j.names for p, _ in n]
        waiting += [p for v in self.verdicts.values() for p, _ in v.names]
        while waiting:
            key = waiting.pop()
            if key in self.join.nodes:
                continue
            held = self.target.held(self._node_of[key])
            if key == ROOT:
                self._joined(key, held, frozenset())
                self.verdicts[key].alive = True
                continue
            self._present(key, held)
            waiting += [p for p, _ in self.join.nodes[key].names[_BETA]]

    def _key_for(self, node: NodeId) -> int:
        key = self._key_of.get(node)
        if key is None:
            key = self._key_of[node] = next(self._keys)
            self._node_of[key] = node
        return key

    def _names_in_keys(self, held: Held | None) -> frozenset[Place]:
        if held is None or held.node.id == self._base:
            return frozenset()
        names = self.target.names(held.node.id)
        return frozenset((self._key_for(parent), name) for parent, name in names)

    def path(self, place: Place) -> bytes:
        """The path of a place below the destination, for filters and people."""
        parts, key = [place[1]], place[0]
        while key != ROOT:
            if key in self.pairs.seen and (self.pairs.places[key]):
                key, name = min(self.pairs.places[key], key=lambda p: p[1])
            else:
                names = self.target.names(self._node_of[key])
                parent, name = min(names, key=lambda p: p[1])
                key = self._key_for(parent)
            parts.append(name)
        return b"/".join(reversed(parts))

    def _attributes_of_parent(self, key: int) -> Attributes:
        if key in self.planned:
            return self.planned[key]
        return self.target.held(self._node_of[key]).node.attributes

    # -- for people, and for the end -----------------------------------------

    def _directory_time(self, key: int, wanted: Attributes) -> None:
        if self.wish.times and self.wish.dir_times:
            self.out.times.append((key, wanted.mtime_ns))

    def _itemize(
        self,
        key: int,
        seen: Seen,
        held: Held | None,
        *,
        copied: bool,
        attributes: Attributes,
        now: frozenset[Place],
    ) -> None:
        if held is not None and self.wish.ignore_existing and not seen.is_dir:
            return
        place = min(self.pairs.places[key], key=lambda p: p[1])
        path = self.path(place)
        target = seen.content.target if seen.kind is Kind.SYMLINK else None
        letters = letters_of(self.wish, seen, held, copied=copied, wanted=attributes)
        old = None
        if held is not None and now and place not in now:
            old = self.path(min(now, key=lambda p: p[1]))
            if letters.strip("." + letters[:2]) == "" and not copied:
                letters = "c" + letters[1:]
        if held is None or copied or old is not None or letters[2:].strip("."):
            size = seen.content.size
            self.out.items[key] = Item(letters, path, seen.is_dir, target, None, old, size)
        others = self.pairs.places[key] - {place}
        for other in sorted(others if copied else others - now):  # a copy is linked anew
            own = other in now
            there = held if own else self.pairs.displaced.get(other)
            text = link_letters(self.wish, seen, there, attributes, copied=own)
            item = Item(text, self.path(other), is_dir=False, linked=path)
            self.out.items[-len(self.out.items) - 1] = item

    def _number(self) -> None:
        """Which node each key will be."""
        nodes = {key: node for key, node in self.join.local_of[_BETA].items() if node}
        for step in self.out.plan.steps[_BETA]:
            if isinstance(step, Make):
                nodes[step.key] = step.node
            elif isinstance(step, Replace) and step.keep is not None:
                nodes[step.key], nodes[step.keep_key] = step.node, step.keep_node
        for key, held in self.pairs.held.items():
            if key not in self.join.nodes and held is not None:
                nodes[key] = held.node.id
        self.out.nodes = nodes
