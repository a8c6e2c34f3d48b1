"""Databases in several files, in one run: read at one instant, decided and applied together."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec.structs import replace

from bisync.core.declared import Declared
from bisync.core.diff import Join, same_version
from bisync.core.groups import (
    Group,
    Inside,
    Stems,
    Together,
    changed,
    choose,
    gone_from,
    groups_in,
    is_whole,
    latest,
    names_of_group,
    not_at_once,
    only_side,
    stem,
)
from bisync.core.node import ROOT, SIDES, Kind, NodeId, Part, Side
from bisync.core.path import display
from bisync.core.plan import Plan
from bisync.core.reconcile import Outcome
from bisync.core.resolve import Policy, Rules
from bisync.endpoint.interface import Endpoint, Read
from bisync.session.config import Config
from bisync.session.report import Met

_SIDES = {Policy.ALPHA: Side.ALPHA, Policy.BETA: Side.BETA}
_ADVICE = "while nothing works with it, synchronise once without declaring it"
ABSENT = "a group that neither side has: nothing is kept together"
MIXED = "both sides wrote to one database: say which with --conflict alpha, beta or newest"


class Groups:
    """The databases of one run."""

    def __init__(
        self, sides: tuple[Endpoint, Endpoint], declared: tuple[Declared, ...] = ()
    ) -> None:
        self._sides = sides
        self._stems: Stems = (set(), set())
        self._declared: list[tuple[Declared, tuple[Inside, Inside]]] = [
            (rule, ({}, {})) for rule in declared
        ]

    def look(self) -> None:
        """Where there are any; after each scan."""
        for side in SIDES:
            places = self._sides[side].companions()
            self._stems[side].clear()
            self._stems[side].update((parent, stem(name)) for parent, name in places)
        self._declared = [
            (rule, (self._inside(rule, Side.ALPHA), self._inside(rule, Side.BETA)))
            for rule, _ in self._declared
        ]

    def absent(self) -> list[bytes]:
        """Declared directories that neither side has: their names may be wrong."""
        return [rule.path for rule, inside in self._declared if not any(inside)]

    def _inside(self, rule: Declared, side: Side) -> Inside:
        """The directories of a declared one."""
        view, top = self._sides[side].view, ROOT
        for name in rule.path.split(b"/"):
            found = view.at([(top, name)]).get((top, name))
            if found is None:
                return {}
            top = found
        paths = {top: b""} if self._directories_of(side, [top]) else {}
        new = list(paths)
        while new:
            below = {
                node: (paths[parent] + b"/" if paths[parent] else b"") + name
                for parent, entries in view.children(new).items()
                for name, node in entries
            }
            new = [n for n in self._directories_of(side, below) if n not in paths]
            paths.update((node, below[node]) for node in new)
        return paths

    def _directories_of(self, side: Side, nodes: Iterable[NodeId]) -> list[NodeId]:
        view = self._sides[side].view
        return [id_ for id_, n in view.nodes(nodes).items() if n.kind is Kind.DIR]

    def missing(self, parts: tuple[Part, Part]) -> tuple[set[NodeId], set[NodeId]]:
        """Files of databases that a closure has others of."""
        found: tuple[set[NodeId], set[NodeId]] = (set(), set())
        for side in SIDES:
            places = {
                (parent, other)
                for parent, name in parts[side].names
                for base in (name, stem(name))
                if (parent, base) in self._stems[side]
                for other in names_of_group(base)
            }
            if places:
                there = self._sides[side].view.at(places).values()
                found[side].update(node for node in there if node not in parts[side].nodes)
        for _, inside in self._declared:
            if any(parent in inside[side] for side in SIDES for parent, _ in parts[side].names):
                for side in SIDES:
                    below = self._sides[side].view.children(inside[side]).values()
                    every = {*inside[side], *(node for names in below for _, node in names)}
                    found[side].update(every - parts[side].nodes.keys())
        return found

    def among(self, joined: Join) -> list[Group]:
        """All databases of a closure."""
        if not any(self._stems) and not self._declared:
            return []
        return groups_in(joined, self._stems, self._declared)

    def hold(self, joined: Join, groups: list[Group]) -> list[tuple[Side, Group, Read]]:
        """Hold the databases that a side changed, there; what came of it."""
        found = []
        for group in groups:
            for side in SIDES:
                parent = joined.local_of[side].get(group.place[0])
                if parent is None or not changed(joined, group, side):
                    continue
                if group.declared is not None and not group.members[side]:
                    continue  # all of it is gone
                if group.declared is not None:
                    read = self._hold_declared(joined, group, group.declared, side)
                else:
                    names = names_of_group(group.place[1])
                    read = self._sides[side].hold(parent, names, group.members[side])
                found.append((side, group, read))
        return found

    def _hold_declared(self, joined: Join, group: Group, rule: Declared, side: Side) -> Read:
        agreed = set()
        for key in group.keys:
            known, node = joined.nodes[key].agreed, joined.nodes[key].seen[side]
            if known is not None and node is not None and same_version(node, known, side):
                agreed.add(node.id)
        inside = next(both[side] for each, both in self._declared if each == rule)
        top = joined.local_of[side].get(group.top)
        if top not in inside:
            return Read(ROOT, "problem", f"{display(rule.path)} is not at its place here any more")
        return self._sides[side].hold_declared(top, rule, group.members[side], agreed)

    def around(self, nodes: Sequence[Collection[NodeId]]) -> tuple[list[set[NodeId]], bool]:
        """Where nodes of each side have names; all of the declared directories if one is in any.

        And whether one is: what came into them is found by looking there.
        """
        found, is_declared = [], False
        for side in SIDES:
            names = self._sides[side].view.names_of(nodes[side])
            parents = {parent for places in names.values() for parent, _ in places}
            inside = {node for _, below in self._declared for node in below[side]}
            if not parents.isdisjoint(inside):
                parents, is_declared = parents | inside, True
            found.append(parents)
        return found, is_declared

    def release(self) -> list[tuple[Side, str]]:
        """Let go of what was held; what went wrong with that."""
        return [(side, text) for side in SIDES for text in self._sides[side].release()]


def together(plan: Plan, joined: Join, groups: list[Group], side: Side) -> list[Together]:
    """What a side has to apply as one."""
    return [
        Together(
            frozenset(plan.archived.get(key, key) for key in group.keys),
            tuple(group.members[side.other].values()),
            tuple(group.members[side].values()) if group.declared is not None else (),
            joined.local_of[side].get(group.top) if group.declared is not None else None,
        )
        for group in groups
    ]


def settle(
    joined: Join,
    outcome: Outcome,
    groups: list[Group],
    rules: Rules,
    again: Callable[[Rules, Mapping[int, str]], Outcome],
) -> tuple[Outcome, list[Group]]:
    """See to it that no database becomes half of one side's and half of the other's.

    Args:
        outcome: what each file should become, judged alone.
        again: judges once more, with other rules, and keys that are left alone.

    Returns:
        The new outcome, and the databases that are left alone: a person has to decide.
    """
    mixed = [group for group in groups if not is_whole(joined, outcome, group)]
    if not mixed:
        return outcome, []
    decisions: dict[bytes, Side | None] = dict(rules.decisions)
    held: dict[int, str] = {}
    winners = []
    for group in mixed:
        side = only_side(group)
        if side is None and rules.policy in (Policy.MANUAL, Policy.KEEP_BOTH):
            held |= dict.fromkeys(group.keys, MIXED)
            continue
        if side is None:
            side = _SIDES.get(rules.policy)
        if side is None:
            side = latest(joined, group)
            side = side.other if rules.policy is Policy.OLDEST else side
        winners.append((group, side))
        for key in group.keys:
            for side in SIDES:
                for place in joined.nodes[key].names[side] | joined.nodes[key].base:
                    decisions.setdefault(joined.path(side, place), winners[-1][1])
    forced = replace(rules, decisions=decisions)
    while True:
        outcome = again(forced, held)
        for group, winner in winners:
            choose(joined, outcome, group, winner)
        left = [group for group, _ in winners if not is_whole(joined, outcome, group)]
        if not left:
            return outcome, [group for group in mixed if group.keys & held.keys()]
        for group in left:
            held |= dict.fromkeys(group.keys, MIXED)
        winners = [(group, winner) for group, winner in winners if group not in left]


def whole_or_not(
    joined: Join,
    outcome: Outcome,
    plan: Plan,
    groups: list[Group],
    config: Config,
    approved: Mapping[bytes, int],
) -> list[tuple[Group, Met, int]]:
    """Declared directories that have to wait, why, and how many deletions wait with them.

    They would lose too much, or a crash could leave them done in part.

    Args:
        approved: deletions that a person approved in such directories, by path.
    """
    found = []
    for group in groups:
        if group.declared is None:
            continue
        gone = 0 if config.yes else gone_from(joined, outcome, group)
        too_many = gone != approved.get(group.declared.path, 0)
        if gone and too_many and config.max_delete.exceeded(gone, len(group.keys)):
            text = f"{gone} of its {len(group.keys)} entries would be deleted; approve with --yes"
            found.append((group, Met("", "withheld", group.declared.path, text), gone))
            continue
        keys = {plan.archived.get(key, key) for key in group.keys}
        directories = {plan.archived.get(key, key) for key in group.directories}
        steps = (not_at_once(plan.steps[side], keys, directories) for side in SIDES)
        step = next((step for step in steps if step is not None), None)
        if step is not None:
            what = type(step).__name__.lower()
            text = f"not applied: its changes ({what}) cannot be made good after a crash; {_ADVICE}"
            found.append((group, Met("", "problem", group.declared.path, text), 0))
    return found


def with_the_rest(held: dict[int, str], groups: list[Group]) -> dict[int, str]:
    """What has to wait, with the databases that some of it is part of."""
    found: dict[int, str] = {}
    for group in groups:
        reason = next((held[key] for key in sorted(group.keys & held.keys())), None)
        if reason is not None:
            found |= dict.fromkeys(group.keys, reason)
    return found | held
