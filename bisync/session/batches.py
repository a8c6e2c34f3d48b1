"""How much is done at a time."""

from collections.abc import Iterable, Iterator

from bisync.core.node import NodeId
from bisync.core.plan import Make, Park, Replace, Transition

_SLICE = 1 << 30  # bytes of content applied at a time


def batches(nodes: Iterable[NodeId], size: int) -> Iterator[list[NodeId]]:
    """So many nodes at a time."""
    batch: list[NodeId] = []
    for node in nodes:
        batch.append(node)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def slices(steps: list[Transition], *, whole: bool, single: bool) -> Iterator[list[Transition]]:
    """Steps that are applied at a time: so much content that losing its copy is no loss.

    Args:
        whole: all at once: some of them belong together.
        single: a step with content alone, so that what is done stays done.
    """
    if whole or any(isinstance(step, Park) for step in steps):
        yield steps  # a parked node has no name until its next step
        return
    some: list[Transition] = []
    size = 0
    for step in steps:
        some.append(step)
        size += step.content.size if isinstance(step, Make | Replace) else 0
        if size >= _SLICE or single:
            yield some
            some, size = [], 0
    if some:
        yield some
