"""Reverse deltas: what a file was, from what it is now; and several of them in one."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bisync.delta.blocks import Blocks, Collector, finding
from bisync.delta.digest import BLOCK_SIZE, block_digest
from bisync.delta.reverse import About, ReverseDelta, Writer, joined, read_delta

EDITS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=6)
VERSIONS = st.lists(st.tuples(EDITS, st.integers(0, 40)), min_size=2, max_size=6)


def listed(data: bytes) -> Blocks:
    collector = Collector(3)
    for start in range(0, len(data), BLOCK_SIZE):
        block = data[start : start + BLOCK_SIZE]
        collector.add(start // BLOCK_SIZE, finding(block, 3), block_digest(block))
    return Blocks(0, 3).changed(len(data), collector.entries())


def delta_of(old: bytes, new: bytes, number: int = 0) -> bytes:
    """By its definition: each run of bytes that differ, and the tail that was cut off."""
    out = bytearray()
    writer = Writer(out.extend)
    at = 0
    while at < len(new):
        end = at
        while end < len(new) and (end >= len(old) or new[end] != old[end]):
            end += 1
        if end > at:
            writer.add(at, old[at:end], new[at:end])
        at = end + 1
    if len(old) > len(new):
        writer.add(len(new), old[len(new) :], b"")
    digests = listed(old).digest().hex(), listed(new).digest().hex()
    about = About(
        7, "f\xff", "00", len(old), number, digests[0], len(new), number + 1, digests[1], {"n": 1}
    )
    writer.finish(about, listed(old))
    return bytes(out)


def read(data: bytes) -> ReverseDelta | None:
    return read_delta(lambda at, length: data[at : at + length], len(data))


def laid_back(new: bytes, data: bytes) -> bytes:
    delta = read(data)
    assert delta is not None
    out = bytearray(new)
    for s in delta.stretches:
        out[len(out) : s.offset] = bytes(max(0, s.offset - len(out)))
        out[s.offset : s.offset + s.old] = data[s.at : s.at + s.old]
    del out[delta.about.size :]
    return bytes(out)


def versions(changes: list[tuple[list[tuple[int, int]], int]]) -> list[bytes]:
    """A file as it becomes by edits: bytes at places, and another length."""
    found = [bytes(20)]
    for edits, size in changes:
        data = bytearray(found[-1][:size].ljust(size, b"\0"))
        for at, value in edits:
            if at < size:
                data[at] = value
        found.append(bytes(data))
    return found


@settings(max_examples=300, deadline=None)
@given(VERSIONS)
def test_several_in_one(changes: list[tuple[list[tuple[int, int]], int]]):
    """A delta made of several does what they do one after the other, whatever the sizes."""
    steps = versions(changes)
    deltas = [delta_of(old, new, n) for n, (old, new) in enumerate(pairwise(steps))]
    for number, data in enumerate(deltas):
        assert laid_back(steps[number + 1], data) == steps[number]
    for first in range(len(deltas)):
        for end in range(first + 1, len(deltas) + 1):
            parts = []
            for data in deltas[first:end]:
                delta = read(data)
                assert delta is not None
                parts.append((delta, lambda at, n, data=data: data[at : at + n]))
            out = bytearray()
            joined(parts, out.extend)
            one = read(bytes(out))
            assert one is not None
            assert laid_back(steps[end], bytes(out)) == steps[first]
            assert one.about.digest == parts[0][0].about.digest
            assert one.about.new_digest == parts[-1][0].about.new_digest == one.about.record["base"]
            assert one.blocks.digest().hex() == one.about.digest


def test_a_damaged_delta_is_none():
    """Any byte that is not what was written, and any cut."""
    old = random.Random(1).randbytes(3000)
    new = old[:100] + b"other" + old[105:2500]
    data = delta_of(old, new)
    assert laid_back(new, data) == old
    for at in random.Random(2).sample(range(len(data)), 60):
        assert read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
        assert read(data[:at]) is None
    assert read(b"") is None


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK_SIZE, BLOCK_SIZE + 1])
def test_sizes(size: int):
    """From nothing, and to nothing."""
    data = random.Random(size).randbytes(size)
    assert laid_back(b"", delta_of(data, b"")) == data
    assert laid_back(data, delta_of(b"", data)) == b""
