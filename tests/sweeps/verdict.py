"""The questions asked after a run. Each answer is a list of complaints; none is good."""

import re

from . import tree
from .engine import HUNG, Run
from .ledger import Ledger
from .place import Pair

# 12: one side could not go on at all; 1 is judged in `ended_well`.
DOCUMENTED = frozenset({0, 1, 12, 23, 24, 25, 40})


def interrupted(ledger: Ledger) -> list[str]:
    """After a violent end: whatever is visible is a complete version that somebody wrote."""
    return [f"right after the end: {complaint}" for complaint in ledger.engine_ran()]


def converged(
    pair: Pair, ledger: Ledger, run: Run, expected: dict[str, str] | None = None
) -> list[str]:
    """After an undisturbed run: exit code 0, equal trees, nothing torn, nothing lost.

    `expected` is the outcome of the same scenario without any disturbance: a crash or an error must
    not bring a deleted file back, nor turn a clean merge into a conflict.
    """
    complaints = [] if run.code == 0 else [f"the undisturbed run: {run}"]
    complaints += ledger.engine_ran()
    complaints += ledger.lost()
    complaints += ledger.disturbed()
    complaints += agreement(pair)
    if expected is not None and not complaints:
        complaints += _deviations(outcome(pair), expected)
    return complaints


def outcome(pair: Pair) -> dict[str, str]:
    """Return what alpha holds, by path; the time and replica in a conflict name left out."""
    entries = tree.snapshot(pair.alpha)
    return {
        _CONFLICT.sub(".conflict", path): entry.content or entry.kind
        for path, entry in entries.items()
    }


_CONFLICT = re.compile(r"\.conflict-[^/]*")


def _deviations(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return [
        f"not as without disturbance: {path!r} is {found.get(path, 'absent')[:12]}, "
        f"should be {expected.get(path, 'absent')[:12]}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def agreement(pair: Pair) -> list[str]:
    """Whether both trees are equal and free of the engine's temporaries."""
    alpha, beta = tree.snapshot(pair.alpha), tree.snapshot(pair.beta)
    left = [path for path in sorted(alpha.keys() | beta.keys()) if tree.is_temporary(path)]
    complaints = [f"a temporary was left behind: {path!r}" for path in left]
    return complaints + [f"not equal: {text}" for text in tree.differences(alpha, beta)]


def ended_well(pair: Pair, run: Run) -> list[str]:
    """After a run that met errors: it ended by itself, said so, and did not claim success."""
    if run.code == HUNG or run.code < 0:
        return [f"no orderly end: {run}"]
    complaints = []
    if "Traceback (most recent call last)" in run.errors or "Fatal Python" in run.errors:
        complaints.append(f"a traceback on standard error: {run}")
    if run.code not in DOCUMENTED:
        complaints.append(f"an exit code that is not documented: {run}")
    if run.code == 1 and not run.errors.strip():
        complaints.append("an internal error (1) without a word on standard error")
    if run.code == 0:
        complaints += [f"exit code 0, but {text}" for text in agreement(pair)]
    return complaints
