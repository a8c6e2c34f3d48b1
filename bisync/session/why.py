"""Why a path is as it is: the last decisions about it, and what still waits."""

import os
from typing import Any

from msgspec import Struct, field

from bisync.core.node import Kind
from bisync.core.past import find, path_of
from bisync.core.path import display
from bisync.fs.conflicts import Quarrel
from bisync.session.history import looking_back


class Decision(Struct, frozen=True):
    """One agreed change of a path's node."""

    time_ns: int
    epoch: int
    text: str  # what was decided, where, and by which rule


class Explanation(Struct):
    """What is known of a path."""

    path: bytes
    state: str = "not agreed on"
    decisions: list[Decision] = field(default_factory=list)  # the newest first
    waits: list[str] = field(default_factory=list)  # why the next run looks at it again
    conflicts: list[Quarrel] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "type": "why",
            "path": display(self.path),
            "state": self.state,
            "decisions": [
                {"time_ns": d.time_ns, "epoch": d.epoch, "reason": d.text} for d in self.decisions
            ],
            "waits": self.waits,
            "conflicts": [q.to_json() for q in self.conflicts],
        }


def why(
    root: str | bytes | os.PathLike[str],
    path: str | bytes | os.PathLike[str],
    *,
    state_dir: str | None = None,
) -> Explanation:
    """Explain a path below a root.

    Raises:
        UsageError: it is no root, or it was never synchronised.
    """
    name = os.fsencode(path)
    with looking_back(root, state_dir=state_dir) as past:
        found = Explanation(name)
        key = find(past.present, name)
        if key is not None:
            found.state = _state(past.present[key].content.kind, past.present[key].content.digest)
        keys = set(past.log.ever_named(past.pair, name.rpartition(b"/")[2]))
        keys |= set() if key is None else {key}
        state = dict(past.present)
        for operation in past.log.backwards(past.pair):
            node = operation.key
            involved = node in keys
            here = node == key or (involved and path_of(state, node) == name)
            if operation.before is None:
                state.pop(node, None)
            else:
                state[node] = operation.before
            if here or (involved and path_of(state, node) == name):
                text = operation.reason or "recorded without a reason"
                found.decisions.append(Decision(operation.time_ns, operation.epoch, text))
        replica = past.replica
        there = replica.index.find(name)
        if there is not None:
            rows = replica.database.execute("SELECT reason FROM pending WHERE node=?", (there,))
            found.waits = [row[0] for row in rows.fetchall()]
        found.conflicts = [q for q in replica.conflicts.rows() if q.path == name]
        return found


def _state(kind: Kind, digest: bytes | None) -> str:
    if kind is not Kind.FILE:
        return f"agreed on: {kind.name.lower()}"
    if digest is None:
        return "agreed on: file, presumed equal by size and time, never read"
    return f"agreed on: file, content {digest.hex()[:16]}"
