"""SIGKILL before every system call that writes: the next run converges, nothing lost or torn.

Case 155. The run is killed on entry to one call of the scenario's run; then

* everything visible is a complete version that some user wrote;
* one undisturbed run ends with 0, both trees are equal in every attribute, names and contents are
  those of a run that was never killed, and each content that no user threw away is live or in a
  store (see `ledger`).

A sample of the calls in 25 s; every one with ``BISYNC_FULL=1``.
"""

from collections.abc import Iterator

import pytest

from . import calls, verdict
from .calls import Call
from .campaign import LANES, TIME_LIMIT, Campaign, Outcome, scratch, spread
from .lane import Lane, cannot_trace, lanes

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.timeout(TIME_LIMIT),
    pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace()),
]


@pytest.fixture(scope="module", name="ways")
def _ways() -> Iterator[list[Lane]]:
    with scratch() as folder:
        yield lanes(folder, LANES)


def test_kill_before_each_call(ways: list[Lane]) -> None:
    """Stop the engine anywhere: it gets up again."""
    reference, pair = ways[0].reference(calls.WRITING)
    points = calls.points(reference, pair)
    assert len(points) >= 100, f"only {len(points)} calls: the scenario does not do its work"
    campaign = Campaign(
        "test_kill.py::test_kill_before_each_call",
        lanes=ways,
        attempt=_kill,
        key=lambda call: call.point,
        seconds=25,
    )
    campaign.run(spread(points))


def _kill(lane: Lane, call: Call) -> Outcome:
    expected = lane.expected()
    injection = f"{call.name}:signal=KILL:when={call.nth}"
    with lane.template.copy() as (pair, ledger):
        first = pair.sync(before=calls.tracer(lane.log, calls.WRITING, injection))
        complaints = verdict.interrupted(ledger)
        if not first.was_killed and first.code != 0:
            complaints.append(f"neither killed nor well: {first}")
        complaints += verdict.converged(pair, ledger, pair.sync(), expected)
        context = f"  the last calls before the kill:\n{calls.last_lines(lane.log, pair)}"
    return Outcome(complaints, hit=first.was_killed, context=context)
