"""Order one side's name operations: parents first, chains and knots of names untied.

The order is found by playing the operations on a copy of the closure's names. An
operation first runs what blocks it: the directory it needs, whoever sits at its target,
whatever must leave a directory before it goes. Where two wait for each other, an exchange
swaps them in one step, so that no name is ever missing; only knots that an exchange
cannot break (a directory and its own ancestor) go through a parking place.
"""

from collections import defaultdict
from collections.abc import Callable

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.node import NodeId, Place
from bisync.core.plan import Exchange, Link, Make, Move, Park, Remove, Replace, Transition, Unlink

NEW, VISITING, DONE, FAILED, POSTPONED = range(5)
_OPEN = (NEW, VISITING, POSTPONED)


class Op(Struct, eq=False):
    """One wanted change of names, not yet ordered. ``src``/``dst`` are places in keys."""

    kind: str  # make | link | keep | move | unlink | remove
    key: int
    src: Place | None = None
    dst: Place | None = None
    is_dir: bool = False
    needed: bool = True  # False: only run when something else needs it
    parked: bool = False
    inside: frozenset[int] = frozenset()  # remove: keys of the directories that go with it
    state: int = NEW
    emit: Callable[[], Transition] | None = None  # make, keep and remove know their own values
    origin: int | None = None  # keep: the key whose object is kept under the new name


class Names(Struct):
    """A side's names in keys, as they stand after the operations emitted so far."""

    at: dict[Place, int]
    parent: dict[int, int]  # of directories present
    local: dict[int, NodeId]

    def inside(self, key: int, ancestor: int) -> bool:
        seen = set()
        while key not in seen:
            if key == ancestor:
                return True
            seen.add(key)
            if key not in self.parent:
                return False
            key = self.parent[key]
        return False


class Ordered(Struct):
    """The transitions in order, and the operations that could not be placed."""

    steps: list[Transition] = field(default_factory=list)
    failed: list[Op] = field(default_factory=list)
    skipped: list[Op] = field(default_factory=list)


class Orderer:
    """Plays the operations of one side; use :func:`order`."""

    def __init__(self, ops: list[Op], names: Names) -> None:
        self.ops = ops
        self.names = names
        self.result = Ordered()
        self.leaver = {op.src: op for op in ops if op.src is not None}
        self.maker = {op.key: op for op in ops if op.kind in ("make", "keep")}  # or parked movers
        self.unlinks: dict[int, list[Op]] = defaultdict(list)
        for op in ops:
            if op.kind == "unlink":
                self.unlinks[op.key].append(op)
        self.leaving: dict[int, list[Op]] = defaultdict(list)
        for op in ops:
            if op.src is not None:
                self.leaving[op.src[0]].append(op)
        # A keep links the old object from where its node is just then, so it must have a place.
        self.keeper = {op.origin: op for op in ops if op.origin is not None}
        self.origin_at: dict[int, set[Place]] = {key: set() for key in self.keeper}
        for place, key in names.at.items():
            if key in self.origin_at:
                self.origin_at[key].add(place)

    def run(self) -> Ordered:
        pending = [op for op in self.ops if op.needed]
        while pending:
            before = len(self.result.steps)
            for op in pending:
                if op.state == NEW:
                    self._visit(op)
            pending = [op for op in pending if op.state == NEW]
            if len(self.result.steps) == before:
                for op in pending:
                    op.state = FAILED
                break
        self.result.failed = [op for op in self.ops if op.state == FAILED]
        self.result.skipped = [op for op in self.ops if op.state in (NEW, POSTPONED)]
        return self.result

    def _visit(self, first: Op) -> None:
        stack = [first]
        while stack:
            op = stack[-1]
            if op.state in (DONE, FAILED, POSTPONED):
                stack.pop()
                continue
            op.state = VISITING
            ready, blocker = self._blocker(op)
            if blocker is not None and self._has_to_wait(op, blocker):
                op.state = POSTPONED
            elif not ready and blocker is None:
                op.state = FAILED
            elif blocker is None:
                self._perform(op)
            elif blocker.state == VISITING:
                if not self._untie(stack, blocker):
                    op.state = FAILED
            else:
                stack.append(blocker)

    @staticmethod
    def _has_to_wait(op: Op, blocker: Op) -> bool:
        """Whether an operation waits for a removal that the guard has to see first.

        A directory in its way goes with all it holds: that is a deletion like any other.
        """
        if blocker.state == POSTPONED:
            return True
        return op.kind != "remove" and blocker.kind == "remove" and not blocker.needed

    def _blocker(self, op: Op) -> tuple[bool, Op | None]:
        """(ready, who must go first). Not ready and nobody to wait for: it cannot be done."""
        if op.kind in ("remove", "unlink"):
            return self._blocker_of_removal(op)
        assert op.dst is not None
        parent = op.dst[0]
        if parent not in self.names.parent:
            maker = self.maker.get(parent)
            return False, maker if maker is not None and maker.state in _OPEN else None
        if op.kind == "link" and op.key not in self.names.local:
            maker = self.maker.get(op.key)
            return False, maker if maker is not None and maker.state in _OPEN else None
        if op.kind == "move" and op.is_dir and self.names.inside(parent, op.key):
            return False, self._way_out(parent, op.key)
        occupant = self.names.at.get(op.dst)
        if occupant is not None:
            leaver = self.leaver.get(op.dst)
            if leaver is None or leaver.state in (DONE, FAILED):
                return False, None
            if leaver.kind == "remove" and leaver.is_dir and not leaver.needed:
                return False, leaver
            if leaver.kind == "remove":
                ready, blocker = self._blocker_of_removal(leaver)
                return (ready, blocker) if not ready else (True, None)
            return False, leaver
        return True, None

    def _blocker_of_removal(self, op: Op) -> tuple[bool, Op | None]:
        if op.kind == "remove":
            # The name that goes last takes the node to the store.
            other_name = next((u for u in self.unlinks[op.key] if u.state == NEW), None)
            if other_name is not None:
                return False, other_name
        if not op.is_dir:
            return True, None
        for key in (op.key, *sorted(op.inside)):
            for other in self.leaving[key]:
                if other is op or other.src is None or other.src[0] != key:
                    continue
                if other.state == FAILED:
                    return False, None
                if other.state != DONE:
                    return False, other
        return True, None

    def _way_out(self, key: int, ancestor: int) -> Op | None:
        """Of the directories between ``key`` and ``ancestor``, one that is to leave."""
        while key != ancestor:
            for op in self.leaving[self.names.parent[key]]:
                if op.key == key and op.kind == "move" and op.state in _OPEN:
                    return op
            key = self.names.parent[key]
        return None

    def _untie(self, stack: list[Op], blocker: Op) -> bool:
        """Break a circle of operations that wait for each other: the last of ``stack`` for
        ``blocker``, which is further down in it. Exchange if two names swap, else park one.
        """
        op = stack[-1]
        if (
            op.kind == blocker.kind == "move"
            and op.src is not None
            and blocker.src is not None
            and blocker.src == op.dst
            and not self.names.inside(op.key, blocker.key)
            and not self.names.inside(blocker.key, op.key)
            and not self.names.inside(op.dst[0], op.key)
            and not self.names.inside(op.src[0], blocker.key)
        ):
            self._exchange(op, blocker)
            return True
        circle = stack[stack.index(blocker) :]
        for mover in sorted((blocker, op, *circle[1:-1]), key=lambda each: each.is_dir):
            if mover.kind != "move" or mover.src is None or self._is_kept_from(mover):
                continue
            self._step(Park(key=mover.key, node=self.names.local[mover.key], old=mover.src))
            self._vacate(mover)
            mover.parked = True
            self.maker[mover.key] = mover  # what goes into it has to wait for its new place
            if mover is not blocker:
                # Whoever waited for it goes on; those above wait again in their turn.
                while stack[-1] is not mover:
                    stack.pop().state = NEW
                stack.pop().state = NEW
            return True
        return False

    def _is_kept_from(self, mover: Op) -> bool:
        """Whether a keep still needs this node in its place."""
        keeper = self.keeper.get(mover.key)
        return keeper is not None and keeper.state in (NEW, VISITING)

    # -- playing -------------------------------------------------------------

    def _step(self, step: Transition) -> None:
        self.result.steps.append(step)

    def _vacate(self, op: Op) -> None:
        assert op.src is not None
        del self.names.at[op.src]
        if op.key in self.origin_at:
            self.origin_at[op.key].discard(op.src)
        if self.leaver.get(op.src) is op:
            del self.leaver[op.src]
        if op.is_dir:
            self.names.parent.pop(op.key, None)
        op.src = None

    def _arrive(self, op: Op) -> None:
        assert op.dst is not None
        self.names.at[op.dst] = op.key
        if op.key in self.origin_at:
            self.origin_at[op.key].add(op.dst)
        if op.is_dir:
            self.names.parent[op.key] = op.dst[0]
        op.state = DONE

    def _exchange(self, op: Op, other: Op) -> None:
        """``op`` takes its place; ``other`` goes on from where ``op`` was."""
        assert op.src is not None
        assert op.dst is not None
        old, new = op.src, op.dst
        self._step(
            Exchange(
                key=op.key,
                node=self.names.local[op.key],
                old=old,
                new=new,
                other=self.names.local[other.key],
                other_key=other.key,
            )
        )
        self._vacate(op)
        self._vacate(other)
        self._arrive(op)
        other.src = old
        self.names.at[old] = other.key
        if other.key in self.origin_at:
            self.origin_at[other.key].add(old)
        self.leaver[old] = other
        self.leaving[old[0]].append(other)
        if other.is_dir:
            self.names.parent[other.key] = old[0]
        if other.kind == "move" and other.dst == old:
            other.state = DONE
            del self.leaver[old]

    def _removal(self, op: Op) -> Remove:
        assert op.emit is not None
        step = op.emit()
        assert isinstance(step, Remove)
        self._vacate(op)
        op.state = DONE
        return step

    def _perform(self, op: Op) -> None:
        if op.kind == "remove":
            self._step(self._removal(op))
            return
        if op.kind == "unlink":
            assert op.src is not None
            self._step(Unlink(key=op.key, node=self.names.local[op.key], place=op.src))
            self._vacate(op)
            op.state = DONE
            return
        assert op.dst is not None
        displaces: Remove | None = None
        if op.dst in self.names.at:
            leaver = self.leaver[op.dst]
            in_one = op.kind == "move" and op.src is not None and not op.is_dir
            if op.kind in ("make", "link") or (in_one and not leaver.is_dir):
                displaces = self._removal(leaver)
            else:
                self._step(self._removal(leaver))
        match op.kind:
            case "move":
                node = self.names.local[op.key]
                self._step(Move(key=op.key, node=node, old=op.src, new=op.dst, displaces=displaces))
                if op.src is not None:
                    self._vacate(op)
            case "link":
                node = self.names.local[op.key]
                self._step(Link(key=op.key, node=node, place=op.dst, displaces=displaces))
            case _:
                assert op.emit is not None
                step = op.emit()
                assert isinstance(step, Make | Replace)
                if isinstance(step, Make):
                    if displaces is not None:
                        step = replace(step, displaces=displaces)
                    self.names.local[op.key] = step.node
                else:
                    step = replace(step, places=tuple(sorted(self.origin_at[step.key])))
                    self.names.local[op.key] = step.keep_node
                    self.names.local[step.key] = step.node
                self._step(step)
        self._arrive(op)


def order(ops: list[Op], names: Names) -> Ordered:
    """Put the operations of one side into an order in which each can be done.

    Args:
        ops: what is wanted; those not ``needed`` run only if another needs them.
        names: the side's names now; left as they will be.

    Cost: linear in the operations, but for directories moved below one another.
    """
    return Orderer(ops, names).run()
