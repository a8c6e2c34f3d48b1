"""Stop a run while it writes into big files: each is its old or its new version afterwards.

Cases 175, 179, 180 and hard point 7. Pages are written over, a file grows, one shrinks, a stretch
becomes a hole. The run is killed on entry to each call that writes, or the power is cut after each
flush; then

* ``bisync recover`` ends with 0, and every file is a complete version that some user wrote;
* one run ends with 0, both trees are equal, nothing is lost;
* without ``recover`` the run does the same.

A sample; every point with ``BISYNC_FULL=1``.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from . import calls, powercut, verdict
from .calls import Call
from .campaign import LANES, TIME_LIMIT, Campaign, Outcome, scratch, spread
from .lane import Lane, cannot_trace, lanes
from .ledger import Ledger
from .place import ImageTemplate, Pair, cannot_mount
from .powercut import Cut
from .user import Mint, User, filled

BIG = (4 << 20) + 5000
WORDS = ("--apply", "in-place")
PAGE = 4096

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.timeout(TIME_LIMIT),
    pytest.mark.skipif(
        bool(cannot_trace() or cannot_mount()), reason=cannot_trace() or cannot_mount()
    ),
]


def prepare(pair: Pair) -> Ledger:
    """Big files that both sides have, each of which then changes at alpha."""
    mint = Mint()
    alpha = User("alpha", pair.alpha, mint)
    ledger = Ledger({"alpha": pair.alpha, "beta": pair.beta})
    for name in ("pages", "grows", "shrinks", "punched"):
        alpha.write(f"{name}.img", BIG)
    ledger.user_changed("alpha")
    pair.agree()
    assert not ledger.engine_ran()
    for name in ("pages", "grows", "shrinks"):
        token = mint.token().encode()
        with alpha.path(f"{name}.img").open("r+b") as file:
            for block in (0, 3, 7, 31):
                file.seek(block * (128 << 10) + 5 * PAGE)
                file.write(filled(token.decode(), 2 * PAGE))
            if name == "grows":
                file.seek(BIG)
                file.write(filled(token.decode(), 3 * PAGE))
            if name == "shrinks":
                file.truncate(BIG - 40_000)
    with alpha.path("punched.img").open("r+b") as file:
        file.seek(256 << 10)
        file.write(bytes(256 << 10))
    ledger.user_changed("alpha")
    return ledger


def _tried(pair: Pair, ledger: Ledger, expected: dict[str, str], *, boot: bool) -> list[str]:
    complaints = []
    if boot:
        found = pair.recover()
        complaints += [] if found.code == 0 else [f"recover: {found}"]
        complaints += verdict.interrupted(ledger)
        undo = pair.beta / ".bisync" / "undo"
        left = os.listdir(undo) if undo.exists() else []
        complaints += [f"left after recover: {left}"] if left else []
    return complaints + verdict.converged(pair, ledger, pair.sync(), expected)


@pytest.fixture(scope="module", name="ways")
def _ways() -> Iterator[list[Lane]]:
    with scratch() as folder:
        yield lanes(folder, LANES, prepare, WORDS)


def test_kill_before_each_call(ways: list[Lane]) -> None:
    """Stop the engine anywhere: no file stays half-written."""
    reference, pair = ways[0].reference(calls.WRITING)
    points = [call for call in calls.points(reference, pair) if "/beta" in call.text]
    assert sum(call.name == "pwrite64" for call in points) >= 20, "nothing was written in place"

    def attempt(lane: Lane, call: Call) -> Outcome:
        expected = lane.expected()
        injection = f"{call.name}:signal=KILL:when={call.nth}"
        with lane.template.copy() as (pair, ledger):
            first = pair.sync(before=calls.tracer(lane.log, calls.WRITING, injection))
            complaints = [] if first.was_killed or first.code == 0 else [f"not killed: {first}"]
            complaints += _tried(pair, ledger, expected, boot=call.nth % 2 == 0)
            context = f"  the last calls before the kill:\n{calls.last_lines(lane.log, pair)}"
        return Outcome(complaints, hit=first.was_killed, context=context)

    Campaign(
        "test_inplace.py::test_kill_before_each_call",
        lanes=ways,
        attempt=attempt,
        key=lambda call: call.point,
        seconds=15,
    ).run(spread(points))


@pytest.mark.powercut
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_cut_after_each_flush(filesystem: str) -> None:
    """What is durable at any moment is enough to make every file whole."""
    with ExitStack() as stack:
        folder = stack.enter_context(powercut.reflink_disk(stack.enter_context(scratch())))
        template = ImageTemplate(folder, prepare, filesystem, words=WORDS)
        expected = Lane(folder, template).expected()
        cuts = powercut.record(template, calls.FLUSHING, commit=False)
        assert len(cuts) >= 20, f"only {len(cuts)} cuts: nothing was written in place"

        def attempt(template: ImageTemplate, cut: Cut) -> Outcome:
            ledger = template.fresh_ledger()
            with template.mounted(cut.images) as pair:
                complaints = _tried(pair, ledger, expected, boot=cut.number % 2 == 0)
            return Outcome(complaints, context=f"  the power was cut after {cut.after}")

        Campaign(
            "test_inplace.py::test_cut_after_each_flush",
            lanes=[template],
            attempt=attempt,
            key=lambda cut: str(cut.number),
            seconds=8,
            least=6,
        ).run(spread(cuts))
