"""The same for `mirror`: killed before every writing call, and every writing call failing.

The pair of the other sweeps, with the work of both users; alpha is the source. However a run ended,

* the source is what it was, to the last attribute;
* everything visible at the destination is a complete version that some user wrote;
* one undisturbed run ends with 0, the destination equals the source in every attribute, and each
  content that was at the destination is there or in its store (see `ledger`).

A sample of the calls in 12 s each; every one with ``BISYNC_FULL=1``.
"""

import random
from collections.abc import Iterator, Sequence

import pytest

from . import calls, scenario, tree, verdict
from .calls import Call
from .campaign import FULL, LANES, ONLY, SEED, TIME_LIMIT, Campaign, Outcome, scratch, spread
from .engine import Run
from .lane import Lane, cannot_trace, lanes
from .ledger import Ledger
from .place import Pair
from .test_faults import Fault, faults_of, injected
from .user import Mint, User

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.timeout(TIME_LIMIT),
    pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace()),
]


def prepare(pair: Pair) -> Ledger:
    """A mirror that was made once; since then both users worked."""
    mint = Mint()
    alpha, beta = User("alpha", pair.alpha, mint), User("beta", pair.beta, mint)
    ledger = Ledger({"alpha": pair.alpha, "beta": pair.beta})
    scenario.base(alpha)
    ledger.user_changed("alpha")
    outcome = pair.mirror()
    assert outcome.code == 0, f"cannot prepare the scenario: {outcome}"
    complaints = ledger.engine_ran()
    assert not complaints, f"the first run of all went wrong: {complaints}"
    scenario.perturb(alpha, beta)
    ledger.user_changed("alpha")
    ledger.user_changed("beta")
    return ledger


@pytest.fixture(scope="module", name="ways")
def _ways() -> Iterator[list[Lane]]:
    with scratch() as folder:
        yield lanes(folder, LANES, prepare)


def test_kill_before_each_call(ways: list[Lane]) -> None:
    """Stop the mirror anywhere: the next one finishes its work."""
    points = _points(ways[0])
    assert len(points) >= 100, f"only {len(points)} calls: the scenario does not do its work"
    campaign = Campaign(
        "test_mirror.py::test_kill_before_each_call",
        lanes=ways,
        attempt=_kill,
        key=lambda call: call.point,
        seconds=12,
    )
    campaign.run(spread(points))


def test_errors_of_writing_calls(ways: list[Lane]) -> None:
    """Any write may fail, once or from then on."""
    reference, points = _reference(ways[0])
    faults = [fault for call in points for fault in faults_of(reference, call)]
    if not FULL and not ONLY:
        chance = random.Random(SEED)
        faults = [chance.choice(faults_of(reference, call)) for call in points]
    campaign = Campaign(
        "test_mirror.py::test_errors_of_writing_calls",
        lanes=ways,
        attempt=_fail,
        key=lambda fault: fault.key,
        seconds=12,
    )
    campaign.run(spread(faults))


def _points(lane: Lane) -> list[Call]:
    return _reference(lane)[1]


def _reference(lane: Lane) -> tuple[list[Call], list[Call]]:
    """All calls of an undisturbed mirror, and those of them that may be stopped."""
    with lane.template.copy() as (pair, ledger):
        source = tree.snapshot(pair.alpha)
        run = pair.mirror(before=calls.tracer(lane.log, calls.WRITING))
        complaints = _finished(pair, ledger, run, source)
        assert not complaints, "\n  - ".join(["it fails undisturbed:", *complaints])
        found = calls.calls(lane.log)
        return found, [call for call in calls.points(found, pair) if call.name != "fcntl"]


def _finished(pair: Pair, ledger: Ledger, run: Run, source: dict[str, tree.Entry]) -> Sequence[str]:
    moved = tree.differences(source, tree.snapshot(pair.alpha))
    return [
        *(f"the source was changed: {text}" for text in moved),
        *verdict.converged(pair, ledger, run),
    ]


def _kill(lane: Lane, call: Call) -> Outcome:
    injection = f"{call.name}:signal=KILL:when={call.nth}"
    with lane.template.copy() as (pair, ledger):
        source = tree.snapshot(pair.alpha)
        first = pair.mirror(before=calls.tracer(lane.log, calls.WRITING, injection))
        complaints = verdict.interrupted(ledger)
        if not first.was_killed and first.code != 0:
            complaints.append(f"neither killed nor well: {first}")
        complaints += _finished(pair, ledger, pair.mirror(), source)
        context = f"  the last calls before the kill:\n{calls.last_lines(lane.log, pair)}"
    return Outcome(complaints, hit=first.was_killed, context=context)


def _fail(lane: Lane, fault: Fault) -> Outcome:
    with lane.template.copy() as (pair, ledger):
        source = tree.snapshot(pair.alpha)
        line = calls.tracer(lane.log, calls.WRITING, *fault.injections, fast=True)
        run = pair.mirror(before=line)
        inside, outside = injected(lane.log, pair)
        complaints = verdict.interrupted(ledger)
        if not outside:
            complaints += verdict.ended_well(pair, run)
        elif run.code < 0:  # the terminal, a pipe or a library failed: it cannot even say so
            complaints.append(f"no orderly end: {run}")
        complaints += _finished(pair, ledger, pair.mirror(), source)
    return Outcome(
        complaints,
        hit=inside > 0,
        context=f"  first at: {fault.call.name}({fault.call.text}\n"
        f"  {inside} errors injected; {run}",
    )
