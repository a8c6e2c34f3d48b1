"""Three-way merge, aspect by aspect: existence and names, content, each attribute.

Every aspect is merged alone, so a move meets an edit and a chmod without a conflict. The
result says per node what both sides should become; :mod:`bisync.core.plan` turns it into
transitions.
"""

from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.conflict import Conflict, ConflictKind
from bisync.core.diff import (
    Join,
    Joined,
    presumed_equal,
    same_content,
    same_version,
    unchanged,
    untouched,
)
from bisync.core.merge import merge_attributes, merge_places
from bisync.core.node import ROOT, SIDES, Attributes, Content, Node, Place, Side
from bisync.core.resolve import OneWay, Policy, Rules, conflict_name, rank, winner

Taken = Callable[[Side, Place], bool]
"""Whether a side holds anything at a place (in keys); used to find free conflict names."""


HIDDEN = "a filter hid it on alpha, so nobody can say whether it was deleted there; it stays"


class Verdict(Struct):
    """What one node should become on both sides.

    ``content`` comes from ``source`` (``None``: both sides hold it). ``attributes`` are
    what each side should hold; ``None`` for a side where nothing is known to change.
    ``held`` means: touch nothing, agree on nothing, try again later.
    """

    key: int
    alive: bool = False
    names: frozenset[Place] = frozenset()
    content: Content | None = None
    source: Side | None = None
    attributes: list[Attributes | None] = field(default_factory=lambda: [None, None])
    presumed: bool = False
    forget: bool = False
    hidden: bool = False  # a filter hides it on both sides: agreed things stay agreed
    held: str = ""  # why nothing may be done
    reason: str = ""
    conflict: bool = False  # the displaced version is a conflict's loser
    twin: list[int | None] = field(default_factory=lambda: [None, None])
    # per side: the key of the node whose present object holds this node's content


class Outcome(Struct):
    """The verdicts of one closure."""

    verdicts: dict[int, Verdict]
    conflicts: list[Conflict]
    notes: list[tuple[int, bytes, str]]  # key, path, what a person should hear
    strays: list[tuple[bytes, str]]  # path and why: beta's own edits that stay


class _Merge:
    def __init__(self, joined: Join, rules: Rules, held: dict[int, str], taken: Taken) -> None:
        self.join = joined
        self.rules = rules
        self.held = held
        self.taken = taken
        self.verdicts: dict[int, Verdict] = {}
        self.conflicts: list[Conflict] = []
        self.notes: list[tuple[int, bytes, str]] = []
        self.strays: list[tuple[bytes, str]] = []
        self.place_order = self._order_of_places()

    def _order_of_places(self) -> Callable[[Place], tuple[bytes, bytes]]:
        def order(place: Place) -> tuple[bytes, bytes]:
            paths = [self.join.path(side, place) for side in SIDES]
            return (place[1], min(paths))

        return order

    def path(self, joined: Joined) -> bytes:
        """Where people find a node: its ancestor path's successor on a side that has it."""
        for side in SIDES:
            if joined.names[side]:
                place = min(joined.names[side], key=lambda p: (p[1], p[0]))
                return self.join.path(side, place)
        if joined.base:
            return self.join.path(Side.ALPHA, min(joined.base, key=lambda p: (p[1], p[0])))
        return b"."

    # -- existence and names -------------------------------------------------

    def existence(self) -> None:
        for key, joined in self.join.nodes.items():
            verdict = self.verdicts[key] = Verdict(key)
            if key == ROOT:
                verdict.alive = True
                continue
            if key in self.held:
                self._hold(joined, verdict, self.held[key])
                continue
            present = [bool(joined.names[side]) for side in SIDES]
            if self.rules.one_way is not None and any(present):
                self._as_on_alpha(joined, verdict)
            elif all(present) or joined.agreed is None:
                self._merge_names(joined, verdict)
            elif any(present):
                self._present_once(joined, verdict, Side.ALPHA if present[0] else Side.BETA)
            else:
                verdict.forget = True
                verdict.hidden = any(joined.forgotten)
                verdict.reason = "deleted on both sides"

    def _as_on_alpha(self, joined: Joined, verdict: Verdict) -> None:
        """Only alpha counts; what a filter hides there is not known, and waits."""
        edit = self._beta_edit(joined)
        if joined.forgotten[Side.ALPHA] and joined.names[Side.BETA]:
            self._hold(joined, verdict, HIDDEN)
            self.strays.append((self.path(joined), HIDDEN))
        elif edit and self.rules.one_way is OneWay.REPORT:
            self._hold(joined, verdict, edit)
            self.strays.append((self.path(joined), f"{edit}; it stays"))
        elif joined.names[Side.ALPHA]:
            verdict.alive = True
            verdict.names = joined.claims(Side.ALPHA) or joined.names[Side.ALPHA]
            verdict.reason = edit
        else:
            verdict.names = joined.names[Side.BETA]
            verdict.conflict = bool(edit)
            verdict.reason = edit if joined.agreed is None else "deleted on alpha"

    def _beta_edit(self, joined: Joined) -> str:
        """What beta's users did to a node that alpha does not have like that; empty: nothing."""
        here, there = joined.names[Side.ALPHA], joined.names[Side.BETA]
        a, b = joined.seen
        equal = presumed = False
        if a is not None and b is not None:
            equal = joined.is_dir or same_content(a.content, b.content)
            presumed = self.rules.presume and presumed_equal(a, b)
        if joined.agreed is None:
            return "made on beta" if there and not (equal or presumed) else ""
        if not there:
            return "deleted on beta" if here and not self.rules.amnesia[Side.BETA] else ""
        if not joined.is_dir and not unchanged(joined, Side.BETA):
            return "" if equal else "edited on beta"
        if joined.claims(Side.BETA) not in (joined.base, here):
            return "renamed on beta"
        return ""

    def _hold(self, joined: Joined, verdict: Verdict, reason: str) -> None:
        verdict.held = reason
        verdict.alive = True
        verdict.names = joined.claims(Side.ALPHA) or joined.claims(Side.BETA) or joined.base

    def _merge_names(self, joined: Joined, verdict: Verdict) -> None:
        claims = joined.claims(Side.ALPHA), joined.claims(Side.BETA)
        merged = merge_places(joined.base, *claims, order=self.place_order)
        verdict.alive = True
        verdict.names = merged.places or joined.names[0] or joined.names[1]
        for kept, dropped in merged.disputes:
            side = Side.ALPHA if kept in claims[0] else Side.BETA
            self.conflicts.append(
                Conflict(
                    ConflictKind.NAME,
                    joined.key,
                    self.join.path(side, kept),
                    side,
                    "renamed on both sides: the name whose bytes sort first",
                    detail=f"other name: {dropped[1].decode('utf-8', 'backslashreplace')}",
                )
            )

    def _present_once(self, joined: Joined, verdict: Verdict, side: Side) -> None:
        """The other side deleted it, or a filter hides it there."""
        names = joined.claims(side) or joined.names[side]
        if joined.forgotten[side.other]:
            # Hidden there when last seen, so nobody can say that it was deleted: it merges.
            verdict.alive, verdict.names = True, names
            verdict.reason = f"a filter hid it on {side.other.label}"
            return
        gained = names - joined.base
        edited = not joined.is_dir and not unchanged(joined, side)
        verdict.names = names
        if self.rules.amnesia[side.other]:
            verdict.alive = True
            verdict.reason = f"missing on {side.other.label}, which was moved or restored"
        elif edited or gained or self._moved_as_a_whole(joined, side):
            verdict.alive = True
            verdict.reason = "edit beats delete" if edited else "move beats delete"
            self.notes.append(
                (joined.key, self.path(joined), f"deleted on {side.other.label}: {verdict.reason}")
            )
        else:
            verdict.reason = f"deleted on {side.other.label}"

    def _moved_as_a_whole(self, joined: Joined, side: Side) -> bool:
        """Whether a directory above was deleted there but moved here with all it holds."""
        seen: set[int] = set()
        names = joined.names[side]
        while names:
            parent = next(iter(names))[0]
            if parent == ROOT or parent in seen:
                return False
            seen.add(parent)
            above = self.join.nodes[parent]
            names = above.claims(side)
            if above.agreed and not above.names[side.other] and names != above.base:
                return not above.forgotten[side.other]
        return False

    # -- the tree must stay a tree -------------------------------------------

    def settle_tree(self) -> None:
        flipped: set[int] = set()
        while self._revive_parents() or self._break_cycle(flipped):
            pass

    def _revive_parents(self) -> bool:
        """A surviving name needs its directory: only the needed parents come back."""
        queue = [v for v in self.verdicts.values() if v.alive]
        revived = False
        while queue:
            verdict = queue.pop()
            for parent, _ in verdict.names:
                above = self.verdicts[parent]
                if above.alive:
                    continue
                joined = self.join.nodes[parent]
                if verdict.held:
                    # Undecided is no reason to bring anything back: its directory waits too.
                    self._hold(joined, above, verdict.held)
                    above.forget = False
                    queue.append(above)
                    revived = True
                    continue
                above.alive, above.forget = True, False
                above.names = joined.claims(Side.ALPHA) or joined.claims(Side.BETA) or joined.base
                above.reason = "needed by what survives in it"
                queue.append(above)
                revived = True
        return revived

    def _break_cycle(self, flipped: set[int]) -> bool:
        """Two moves, each into the other: skip the one whose new path sorts last."""
        cycle = self._find_cycle()
        if not cycle:
            return False
        candidates = []
        for key in cycle:
            joined = self.join.nodes[key]
            verdict = self.verdicts[key]
            for side in SIDES:
                names = joined.claims(side.other)
                if joined.claims(side) == verdict.names != names and names and key not in flipped:
                    place = next(iter(verdict.names))
                    candidates.append((self.join.path(side, place), key, side))
        if not candidates:
            for key in cycle:
                if self.join.nodes[key].base:
                    self.verdicts[key].names = self.join.nodes[key].base
            if self._find_cycle() == cycle:
                raise AssertionError("the ancestor holds a cycle")
            return True
        path, key, side = max(candidates)
        flipped.add(key)
        self.verdicts[key].names = self.join.nodes[key].claims(side.other)
        self.conflicts.append(
            Conflict(
                ConflictKind.CYCLE,
                key,
                path,
                side.other,
                "two directories moved into each other: the move that sorts last is undone",
            )
        )
        return True

    def _find_cycle(self) -> list[int]:
        safe: set[int] = {ROOT}
        for key, verdict in self.verdicts.items():
            trail: list[int] = []
            on_trail: set[int] = set()
            while key not in safe and verdict.alive and verdict.names:
                if not self.join.nodes[key].is_dir:
                    break
                if key in on_trail:
                    return trail[trail.index(key) :]
                trail.append(key)
                on_trail.add(key)
                key = next(iter(verdict.names))[0]
                verdict = self.verdicts[key]
            safe.update(trail)
        return []

    # -- one name, one node --------------------------------------------------

    def collisions(self) -> None:
        wanted: dict[Place, list[int]] = {}
        for key, verdict in self.verdicts.items():
            if verdict.alive and key != ROOT:
                for place in verdict.names:
                    wanted.setdefault(place, []).append(key)
        contested = [place for place, keys in wanted.items() if len(keys) > 1]
        for place in sorted(contested, key=self.place_order):
            keys = [k for k in wanted[place] if place in self.verdicts[k].names]
            while len(keys) > 1:
                best = min(keys, key=self._claim)
                loser = max(keys, key=self._claim)
                if self._was_chosen(place, best, loser):
                    best, loser = loser, best
                keys.remove(loser)
                self._yield_name(place, best, loser)

    def _claim(self, key: int) -> tuple[bool, bool, tuple[int, bytes], bytes]:
        """The better claim to a name sorts first: directories, then the policy's order."""
        joined = self.join.nodes[key]
        nodes = [n for n in joined.seen if n is not None]
        sides = [side for side in SIDES if joined.seen[side] is not None]
        best = min(map(rank, nodes))
        by_side = False
        match self.rules.policy:
            case Policy.ALPHA:
                by_side = Side.ALPHA not in sides
            case Policy.BETA:
                by_side = Side.BETA not in sides
            case Policy.OLDEST:
                best = (-best[0], best[1])
        return (not joined.is_dir, by_side, best, self.path(joined))

    def _was_chosen(self, place: Place, best: int, loser: int) -> bool:
        """Whether a person wants the name for the node that would lose it."""
        for side in SIDES:
            chosen = self.rules.decisions.get(self.join.path(side, place))
            if chosen is not None:
                names = [self.join.nodes[key].claims(chosen) for key in (best, loser)]
                return place in names[1] and place not in names[0]
        return False

    def hold_below(self) -> None:
        """What is to go into a directory that waits, waits with it."""
        waiting = True
        while waiting:
            waiting = False
            for key, verdict in self.verdicts.items():
                if not verdict.alive or verdict.held or key == ROOT:
                    continue
                for parent, _ in verdict.names:
                    above = self.verdicts[parent]
                    if above.held and None in self.join.nodes[parent].seen:
                        self._hold(self.join.nodes[key], verdict, "its directory waits")
                        waiting = True
                        break

    def _yield_name(self, place: Place, best: int, loser: int) -> None:
        joined, winning = self.join.nodes[loser], self.join.nodes[best]
        verdict = self.verdicts[loser]
        side = next(
            (s for s in SIDES if joined.seen[s] is not None and place in joined.claims(s)),
            Side.ALPHA if joined.seen[0] is not None else Side.BETA,
        )
        if self._equal(joined, winning):
            verdict.names -= {place}
            if not verdict.names:
                verdict.alive = False
                verdict.reason = "equal content is at the name"
                verdict.forget = joined.agreed is not None and not any(joined.names)
            return
        if self.verdicts[loser].held or self.verdicts[best].held:
            for key in (loser, best):
                self._hold(self.join.nodes[key], self.verdicts[key], "waits for its name")
            return
        if len(verdict.names) > 1 and place not in joined.base and place in winning.base:
            # A new link met an edit of what it replaced: the file keeps its name.
            verdict.names -= {place}
            self.conflicts.append(
                Conflict(
                    ConflictKind.NAME,
                    loser,
                    self.join.path(side, place),
                    side.other,
                    "a new link met a changed file: the file keeps the name",
                )
            )
            return
        path = self.join.path(side, place)
        decided = path in self.rules.decisions
        policy = self.rules.policy
        if decided:
            both = self.rules.decisions[path] is None
            policy = Policy.KEEP_BOTH if both else Policy.NEWEST
        was_there = place in joined.base and not joined.is_dir and winning.is_dir
        kind = ConflictKind.TYPE if winning.is_dir != joined.is_dir else ConflictKind.NAME
        if policy is Policy.MANUAL:
            for key in (loser, best):
                self._hold(self.join.nodes[key], self.verdicts[key], "conflict")
            self.conflicts.append(
                Conflict(kind, loser, self.join.path(side, place), None, "two nodes want one name")
            )
            return
        node = joined.node(side)
        if was_there and policy is not Policy.KEEP_BOTH:
            verdict.names -= {place}
            verdict.alive = bool(verdict.names)
            verdict.conflict = True
            verdict.reason = "a directory took its name"
            copy = None
        else:
            free = self._free_name(place, side, node)
            verdict.names = (verdict.names - {place}) | {free}
            verdict.reason = "its name was taken"
            copy = self.join.path(side, free)
        self.conflicts.append(
            Conflict(
                kind,
                loser,
                self.join.path(side, place),
                side.other,
                "a directory against something else" if was_there else "two nodes want one name",
                loser=node.content,
                loser_mtime_ns=node.attributes.mtime_ns,
                kept_as=copy,
            )
        )

    def _equal(self, a: Joined, b: Joined) -> bool:
        nodes = [next(n for n in j.seen if n is not None) for j in (a, b)]
        if a.is_dir or b.is_dir:
            return False
        return same_content(nodes[0].content, nodes[1].content)

    def _free_name(self, place: Place, side: Side, node: Node) -> Place:
        mine = {p for v in self.verdicts.values() if v.alive for p in v.names}
        attempt = 0
        while True:
            name = conflict_name(
                place[1], self.rules.replicas[side], node.attributes.mtime_ns, attempt
            )
            free = (place[0], name)
            if free not in mine and not any(self.taken(s, free) for s in SIDES):
                return free
            attempt += 1

    # -- content and attributes ----------------------------------------------

    def contents(self) -> None:
        for key in list(self.verdicts):
            verdict = self.verdicts[key]
            if verdict.alive and not verdict.held:
                self._content(self.join.nodes[key], verdict)

    def _content(self, joined: Joined, verdict: Verdict) -> None:
        a, b = joined.seen
        if a is None or b is None:
            side = Side.ALPHA if b is None else Side.BETA
            node = joined.node(side)
            verdict.content, verdict.source = node.content, side
            verdict.attributes = [node.attributes, node.attributes]
            if joined.origin is not None:
                self._split(joined, verdict, side)
            return
        leader: Side | None = None
        if joined.is_dir or same_content(a.content, b.content):
            verdict.content = a.content
        elif joined.agreed is None and self.rules.presume and presumed_equal(a, b):
            verdict.content, verdict.presumed = replace(a.content, digest=None), True
        else:
            same = [unchanged(joined, side) for side in SIDES]
            found_out = joined.agreed is not None and joined.agreed.presumed
            known = a.content.known and b.content.known
            if found_out and known and all(untouched(joined, side) for side in SIDES):
                # Taken for equal, and they never were.
                if self.rules.one_way is not None:
                    leader, verdict.conflict = Side.ALPHA, True
                elif (leader := self._conflict(joined, verdict)) is None:
                    return
            elif same[0] and same[1]:
                verdict.content = a.content if a.content.known else b.content
                if found_out:  # what one side is known to have, says nothing of the other
                    verdict.content, verdict.presumed = replace(a.content, digest=None), True
            elif self.rules.one_way is not None:
                leader = Side.ALPHA
                verdict.conflict = not same[1]
                verdict.reason = verdict.reason or "edited on alpha"
            elif same[0] or same[1]:
                leader = Side.BETA if same[0] else Side.ALPHA
                verdict.reason = f"edited on {leader.label}"
            elif (leader := self._conflict(joined, verdict)) is None:
                return
        if leader is not None:
            verdict.content, verdict.source = joined.node(leader).content, leader
        self._attributes(joined, verdict, leader)

    def _split(self, joined: Joined, verdict: Verdict, side: Side) -> None:
        """The old object of a save by backup: the other side still has it under the node."""
        assert joined.origin is not None
        origin = self.join.nodes[joined.origin]
        theirs = origin.seen[side.other]
        if (theirs is not None and same_content(theirs.content, joined.node(side).content)) or (
            theirs is not None
            and origin.agreed
            and unchanged(origin, side.other)
            and same_version(joined.node(side), origin.agreed, side)
        ):
            verdict.twin[side.other] = joined.origin

    def _conflict(self, joined: Joined, verdict: Verdict) -> Side | None:
        a, b = joined.node(Side.ALPHA), joined.node(Side.BETA)
        path = self.path(joined)
        both = path in self.rules.decisions and self.rules.decisions[path] is None
        chosen = self.rules.decisions.get(path)
        if chosen is None:
            chosen = winner(Policy.NEWEST if both else self.rules.policy, a, b)
        leader = chosen
        if leader is None:
            self._hold(joined, verdict, "conflict")
            self.conflicts.append(
                Conflict(ConflictKind.CONTENT, joined.key, path, None, "edited on both sides")
            )
            return None
        verdict.conflict = True
        verdict.reason = f"conflict: {self.rules.policy.value}"
        loser = joined.node(leader.other)
        copy = None
        if (both or self.rules.policy is Policy.KEEP_BOTH) and joined.names[leader.other]:
            place = min(verdict.names, key=self.place_order)
            free = self._free_name(place, leader.other, loser)
            copy = self.join.path(leader, free)
            self._keep_beside(joined, loser, leader.other, free)
        self.conflicts.append(
            Conflict(
                ConflictKind.CONTENT,
                joined.key,
                path,
                leader,
                "edited on both sides" if joined.agreed else "made on both sides",
                loser=loser.content,
                loser_mtime_ns=loser.attributes.mtime_ns,
                kept_as=copy,
            )
        )
        return leader

    def _keep_beside(self, joined: Joined, loser: Node, side: Side, place: Place) -> None:
        """A new node that carries the loser's content under a conflict name."""
        key = self.join.fresh_key()
        copy = Joined(key, origin=joined.key)
        copy.seen[side] = loser
        self.join.nodes[key] = copy
        self.verdicts[key] = verdict = Verdict(key, alive=True, names=frozenset({place}))
        verdict.content, verdict.source = loser.content, side
        verdict.attributes = [loser.attributes, loser.attributes]
        verdict.twin[side] = joined.key
        verdict.reason = "conflict: keep-both"

    def _columns(self, joined: Joined) -> tuple[Attributes | None, Attributes | None]:
        """What each side's attributes were when they were agreed on.

        The old object of a save by backup has a new number, and was the node until then.
        """
        if joined.agreed is not None:
            return joined.agreed.attributes
        before = self.join.nodes[joined.origin].agreed if joined.origin is not None else None
        if before is None:
            return (None, None)
        alpha, beta = (
            old if joined.node(side).id == before.ids[side] else None
            for side, old in zip(SIDES, before.attributes, strict=True)
        )
        return alpha, beta

    def _attributes(self, joined: Joined, verdict: Verdict, leader: Side | None) -> None:
        a, b = joined.node(Side.ALPHA), joined.node(Side.BETA)
        columns = self._columns(joined)
        master = None if self.rules.one_way is None else Side.ALPHA
        merged = merge_attributes(columns, (a, b), leader, master)
        verdict.attributes = [merged.alpha, merged.beta]
        if merged.disputes and joined.key != ROOT:
            self.conflicts.append(
                Conflict(
                    ConflictKind.ATTRIBUTES,
                    joined.key,
                    self.path(joined),
                    merged.leader,
                    "attributes set on both sides: " + ", ".join(merged.disputes),
                )
            )


def reconcile(joined: Join, rules: Rules, *, held: dict[int, str], taken: Taken) -> Outcome:
    """Merge one closure.

    Args:
        joined: the closure, joined by identity.
        rules: policy and names of the replicas.
        held: keys that must not be touched now, with the reason (busy, unreadable, frozen).
        taken: whether a side holds something at a place; only asked for conflict names.
    """
    merge = _Merge(joined, rules, held, taken)
    merge.existence()
    merge.settle_tree()
    merge.collisions()
    merge.hold_below()
    merge.settle_tree()
    merge.contents()
    return Outcome(merge.verdicts, merge.conflicts, merge.notes, merge.strays)
