"""Which blocks may differ between two files that share extents: a superset, never less.

A stretch is unchanged only if both files have it at one physical place, and it is said for certain
where that is; or if both have zeros there (a hole, or space never written).
"""

import numpy as np
from numpy.typing import NDArray

from bisync.delta.digest import BLOCK_SIZE

_RECORD = np.dtype(
    [("logical", "<u8"), ("physical", "<u8"), ("length", "<u8"), ("r", "V16"), ("flags", "<u4"),
     ("q", "V12")]
)  # fmt: skip
_UNWRITTEN = 0x800
# unknown, delayed, encoded (compressed: only its start is told), encrypted, not aligned, inline
_UNCERTAIN = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_ZERO, _SOMEWHERE = np.int64(-1), np.int64(-2)


def changed_blocks(base: bytes, live: bytes, base_size: int, live_size: int) -> NDArray[np.int64]:
    """The blocks of ``live`` that may differ from ``base``, cut or zero-extended to its size.

    Args:
        base, live: extent records as FIEMAP gives them, both with everything flushed.
    """
    if live_size == 0:
        return np.zeros(0, np.int64)
    maps = [np.frombuffer(raw, _RECORD) for raw in (base, live)]
    edges = [np.array([0, live_size], np.int64)]
    for each in maps:
        start = each["logical"].astype(np.int64)
        edges += [start, start + each["length"].astype(np.int64)]
    bounds = np.unique(np.clip(np.concatenate(edges), 0, live_size))
    starts, ends = bounds[:-1], bounds[1:]
    places = [_place(each, starts) for each in maps]
    places[0] = np.where(starts >= base_size, _ZERO, places[0])
    differ = (places[0] != places[1]) | (places[0] == _SOMEWHERE)
    first, last = starts[differ] // BLOCK_SIZE, (ends[differ] - 1) // BLOCK_SIZE
    marked = np.zeros(-(-live_size // BLOCK_SIZE) + 1, np.int32)
    np.add.at(marked, first, 1)
    np.add.at(marked, last + 1, -1)
    found = np.cumsum(marked[:-1]) > 0
    if base_size != live_size:  # blocks of another length are other blocks
        found[-1] = True
        if 0 < base_size <= live_size and base_size % BLOCK_SIZE:
            found[base_size // BLOCK_SIZE] = True
    return np.flatnonzero(found)


def _place(records: NDArray[np.void], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """For offsets: physical minus logical place, zero, or unknown."""
    if not len(records):
        return np.full(len(at), _ZERO)
    logical = records["logical"].astype(np.int64)
    index = np.searchsorted(logical, at, "right") - 1
    row = np.maximum(index, 0)
    inside = (index >= 0) & (at < logical[row] + records["length"].astype(np.int64)[row])
    flags = records["flags"][row]
    # Two files on one disk: the distance tells the place. It may be negative, so it is shifted.
    distance = records["physical"].astype(np.int64)[row] - logical[row] + (np.int64(1) << 62)
    place = np.where(flags & _UNCERTAIN, _SOMEWHERE, np.where(flags & _UNWRITTEN, _ZERO, distance))
    return np.where(inside, place, _ZERO)
