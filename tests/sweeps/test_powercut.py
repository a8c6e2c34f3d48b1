"""Cut the power anywhere: the trees hold complete versions, and the next run converges.

Case 156, hard points 1 and 22. The disks of the scenario's run are cloned after each flush, and
after each name operation while a stranger's flush commits the journal (see `powercut`). Each clone
is mounted, which replays its journal; then

* no file in either tree is empty or torn: each is a complete version that some user wrote;
* one run ends with 0, both trees are equal, names and contents are those of an undisturbed run, and
  each content that no user threw away is live or in a store. (All of them were durable before the
  run, so a cut excuses nothing.)

On ext4 and XFS, with both roots on one disk, and on two. A sample in about 60 s for all together;
every cut with ``BISYNC_FULL=1``.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from . import calls, powercut, scenario, verdict
from .campaign import TIME_LIMIT, Campaign, Outcome, scratch, spread
from .lane import Lane, cannot_trace
from .place import ImageTemplate, cannot_mount
from .powercut import Cut

_CANNOT = cannot_mount() or cannot_trace()
pytestmark = [
    pytest.mark.powercut,
    pytest.mark.timeout(TIME_LIMIT),
    pytest.mark.skipif(bool(_CANNOT), reason=_CANNOT),
]
_SECONDS = 5  # per test


@dataclass(frozen=True, slots=True)
class Machine:
    """A prepared pair on disks that can be cloned."""

    template: ImageTemplate
    lane: Lane


@pytest.fixture(
    scope="module",
    name="machine",
    params=[("ext4", 1), ("ext4", 2), ("xfs", 1), ("xfs", 2)],
    ids=["ext4-one_disk", "ext4-two_disks", "xfs-one_disk", "xfs-two_disks"],
)
def _machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    filesystem, disks = request.param
    with ExitStack() as stack:
        folder = stack.enter_context(powercut.reflink_disk(stack.enter_context(scratch())))
        template = ImageTemplate(folder, scenario.prepare, filesystem, disks)
        yield Machine(template, Lane(folder, template))


def test_cut_after_each_flush(machine: Machine, request: pytest.FixtureRequest) -> None:
    """What was flushed so far is enough to go on."""
    cuts = powercut.record(machine.template, calls.FLUSHING, commit=False)
    _try(machine, cuts, request)


def test_cut_after_each_name(machine: Machine, request: pytest.FixtureRequest) -> None:
    """A name is never durable before what it names."""
    cuts = powercut.record(machine.template, calls.NAMING, commit=True)
    _try(machine, cuts, request)


def _try(machine: Machine, cuts: list[Cut], request: pytest.FixtureRequest) -> None:
    assert len(cuts) >= 4, f"only {len(cuts)} cuts: nothing was flushed or named"
    expected = machine.lane.expected()

    def attempt(template: ImageTemplate, cut: Cut) -> Outcome:
        ledger = template.fresh_ledger()
        with template.mounted(cut.images) as pair:
            complaints = verdict.interrupted(ledger)
            complaints += verdict.converged(pair, ledger, pair.sync(), expected)
        for image in cut.images:
            image.unlink()
        return Outcome(complaints, context=f"  the power was cut after {cut.after}")

    campaign = Campaign(
        f"test_powercut.py::{request.node.name}",
        lanes=[machine.template],
        attempt=attempt,
        key=lambda cut: str(cut.number),
        seconds=_SECONDS,
        least=4,
    )
    try:
        campaign.run(spread(cuts))
    finally:
        for cut in cuts:
            for image in cut.images:
                image.unlink(missing_ok=True)
