"""What moved within a file is found, cheaply; what is found is proven."""

import os
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisync.core.method import Apply
from bisync.delta import backend as definitions
from bisync.delta.backend import BACKEND, SumTable
from bisync.delta.blocks import Blocks
from bisync.delta.changes import Moved, Pieces, send_changes
from bisync.delta.digest import BLOCK_SIZE
from bisync.delta.search import Anchors, Search
from bisync.fs.bigfile import BasisError, Patch, Reader, list_blocks

SEED = int(os.environ.get("BISYNC_SEED", "1"))
ROUNDS = int(os.environ.get("BISYNC_ROUNDS", "0"))
BOX = 10.0  # seconds of edits that CI draws
MIB = 1 << 20


def anchors_of(data: bytes) -> list[int]:
    """The definition."""
    word = [int.from_bytes(data[i : i + 4], "little") for i in range(len(data) - 31)]
    factor, limit = definitions.ANCHOR_FACTOR, definitions.ANCHOR_LIMIT
    return [i for i, w in enumerate(word) if w * factor % 2**32 > limit]


def print_of(data: bytes) -> int:
    """The definition, of the 32 bytes from an anchor on."""
    total = 0
    for number, factor in enumerate(definitions.PRINT_FACTORS):
        word = int.from_bytes(data[8 * number : 8 * number + 8], "little")
        mixed = (word ^ word >> 29) * factor % 2**64
        total ^= mixed ^ mixed >> 32
    return total


def sum_of(block: bytes) -> int:
    """The definition."""
    total = 0
    for byte in reversed(block):
        total = (total * definitions.SUM_FACTOR + byte) % 2**64
    return total >> definitions.SUM_SHIFT << definitions.SUM_SHIFT


def buffer(data: bytes) -> definitions.Bytes:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 34, 35, 36, 100_000, 3 * MIB // 2 + 3])
def test_anchors(size: int):
    """Every offset is looked at, those at the ends of a step too."""
    data = random.Random(size).randbytes(size)
    found = BACKEND.anchors(buffer(data))
    assert found.tolist() == anchors_of(data)
    wanted = [print_of(data[at : at + 32]) for at in found.tolist()]
    assert BACKEND.prints(buffer(data), found).tolist() == wanted


@given(st.binary(max_size=40), st.integers(0, 50), st.integers(0, 40))
def test_anchors_of_dense_data(unit: bytes, times: int, zeros: int):
    """Repeated and empty content."""
    data = bytes(zeros) + unit * times + bytes(zeros)
    assert BACKEND.anchors(buffer(data)).tolist() == anchors_of(data)


def test_zeros_have_no_anchor():
    assert len(BACKEND.anchors(np.zeros(MIB, np.uint8))) == 0


def test_rolling_sums():
    """The sum at each offset is the sum of the block there, in every step and at the last one."""
    chance = random.Random(SEED)
    data = chance.randbytes(definitions._TILE + 2 * BLOCK_SIZE)
    places = [0, 1, 77_777, definitions._TILE - 1, definitions._TILE, len(data) - BLOCK_SIZE]
    blocks = {at: data[at : at + BLOCK_SIZE] for at in places}
    assert BACKEND.block_sums(buffer(data)).tolist() == [
        sum_of(data[at : at + BLOCK_SIZE])
        for at in range(0, len(data) - BLOCK_SIZE + 1, BLOCK_SIZE)
    ]
    sums = {at: sum_of(block) for at, block in blocks.items()}
    table = SumTable.of(np.array([*sums.values(), 256, 2**64 - 256], np.uint64))
    at, found = BACKEND.find(buffer(data), table)
    assert at.tolist() == sorted(places)
    assert found.tolist() == [sums[place] for place in sorted(places)]


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1])
def test_too_short_for_a_sum(size: int):
    at, found = BACKEND.find(np.zeros(size, np.uint8), SumTable.of(np.zeros(1, np.uint64)))
    assert (len(at), len(found)) == (0, 0)


class _Counted:
    """Reads, and counts what is read."""

    def __init__(self, fd: int) -> None:
        self.read = Reader(fd)
        self.bytes = 0

    def __call__(self, offset: int, length: int) -> memoryview:
        self.bytes += length
        return self.read(offset, length)


def transfer(folder: Path, old: bytes, new: bytes, apply: Apply = Apply.REPLACE) -> tuple[int, int]:
    """Make the new version of the old one; bytes that crossed, and that the source read for it."""
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    with (
        (folder / "old").open("rb") as a,
        (folder / "new").open("rb") as b,
        (folder / "made").open("w+b") as made,
    ):
        lists = [
            list_blocks(file.fileno(), len(data), Blocks(0, SEED))
            for file, data in ((a, old), (b, new))
        ]
        assert lists[0] is not None and lists[1] is not None
        patch = Patch(made.fileno(), a.fileno(), lists[0], apply=apply)
        read = _Counted(b.fileno())
        send_changes(lists[1], patch, read, lambda _length: None, BACKEND)
        assert patch.blocks().digest() == lists[1].digest()
        assert patch.apart or apply is not Apply.IN_PLACE
        if patch.apart:
            patch.fill(made.fileno(), a.fileno())
    assert (folder / "made").read_bytes() == new
    return patch.literal, read.bytes


PAGES = 2 * 4096
DATA = random.Random(2).randbytes(12 * MIB)


@pytest.mark.parametrize(
    ("old", "new", "most"),
    [
        (DATA, b"7 bytes" + DATA, PAGES),
        (DATA, DATA[7:], PAGES),
        (DATA, DATA[: 5 * MIB] + b"!" + DATA[5 * MIB :], PAGES),
        (DATA, DATA[: 5 * MIB] + DATA[5 * MIB + 300_000 :], PAGES),
        (DATA, DATA[6 * MIB + 5 :] + DATA[: 6 * MIB + 5], 2 * PAGES),
        (DATA, DATA + DATA[: 3 * MIB], 3 * MIB),  # what grew is not searched
        (DATA, DATA[:100] + b"x" + DATA[100 : 8 * MIB] + b"y" + DATA[8 * MIB :], 3 * PAGES),
        (DATA, bytes(range(256)) * 8 * 1024 + DATA, 2 * MIB + PAGES),
        (bytes(3 * MIB) + DATA, DATA, PAGES),
        (DATA, bytes(3 * MIB + 1) + DATA, BLOCK_SIZE + PAGES),
        (b"one line\n" * MIB, b"a line\n" + b"one line\n" * MIB, PAGES),
        (b"\1" * 9 * MIB, b"\2" + b"\1" * 9 * MIB, PAGES),
    ],
    ids=range(12),
)
def test_what_crosses(tmp_path: Path, old: bytes, new: bytes, most: int):
    """About the size of the edit."""
    assert transfer(tmp_path, old, new)[0] <= most


def edited(chance: random.Random, old: bytes) -> tuple[bytes, int]:
    """Some edits, and how many bytes at most should cross for them."""
    data, cost = bytearray(old), 0
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data) + 1)
        length = min(chance.choice([1, 100, 4096, 70_000, 400_000]), len(data))
        kind = chance.choice(["insert", "delete", "move", "write", "cut", "punch", "copy"])
        match kind:
            case "insert":
                data[at:at] = chance.randbytes(length)
                cost += length
            case "delete":
                del data[at : at + length]
            case "move":
                piece = data[at : at + length]
                del data[at : at + length]
                to = chance.randrange(len(data) + 1)
                data[to:to] = piece
                cost += length
            case "write":
                data[at : at + length] = chance.randbytes(length)
                cost += length
            case "cut":
                del data[max(at, len(data) - length) :]
            case "punch":
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "copy":
                data += data[at : at + length]
                cost += length
        # Each edit may cost the blocks at its ends, and moved content less than SHORTEST_RUN
        # blocks from an end or another edit.
        cost += 6 * BLOCK_SIZE
    return bytes(data), cost


def test_edits(tmp_path: Path):
    """Random edits of files of all sizes: exactly right, and what crosses is bounded."""
    chance = random.Random(SEED)
    until = time.monotonic() + BOX
    done = 0
    while done < ROUNDS or (not ROUNDS and time.monotonic() < until):
        size = chance.choice([0, 1, 5000, BLOCK_SIZE, 3 * BLOCK_SIZE + 7, 2 * MIB, 9 * MIB + 1])
        kind = chance.choice(["random", "text", "zeros", "sparse"])
        match kind:
            case "random":
                old = chance.randbytes(size)
            case "text":
                line = b"%d a line of text that repeats\n"
                old = b"".join(line % n for n in range(size // 30))
            case "zeros":
                old = bytes(size)
            case _:
                half = size // 2
                old = bytes(half) + chance.randbytes(size - half)
        new, most = edited(chance, old)
        literal, _ = transfer(tmp_path, old, new, chance.choice(list(Apply)))
        assert literal <= most, (SEED, done, kind, size, len(new))
        done += 1
    print(f"{done} rounds of edits")
    assert done >= 20


def test_decoy(tmp_path: Path):
    """One repeated block, and a version full of blocks with its sum that are not it: linear.

    The signs of the Thue-Morse sequence, 2 048 of them, are a polynomial that has every odd number
    for a root modulo 2**64: so two blocks that swap them have equal sums.
    """
    signs = bytes(n.bit_count() % 2 for n in range(2048))
    rest = random.Random(3).randbytes(BLOCK_SIZE - 2048)
    block, decoy = signs + rest, bytes(1 - sign for sign in signs) + rest
    assert sum_of(block) == sum_of(decoy)
    read = []
    for count in (16, 32, 64):
        new = b"!" + decoy * count
        literal, spent = transfer(tmp_path, block * count, new)
        assert literal <= len(new)
        read.append(spent)
    for small, large in pairwise(read):
        assert large <= 2.2 * small
    assert read[-1] <= 8 * 64 * BLOCK_SIZE


class _Mute:
    """A holder whose anchors and sums lead nowhere."""

    def __init__(self, old: Blocks, chance: random.Random) -> None:
        self.old, self.chance = old, chance

    def anchors(self, near: Sequence[int], most: int) -> Anchors:
        offsets = [self.chance.randrange(-(2**40), 2**40) for _ in range(100)]
        return Anchors(np.array(offsets), np.array([print_of(DATA[a : a + 32]) for a in ANCHORS]))

    def sums(self, blocks: Sequence[int]) -> definitions.Sums:
        return np.array([sum_of(DATA[:BLOCK_SIZE])] * len(blocks), np.uint64)


ANCHORS = BACKEND.anchors(buffer(DATA))[:100].tolist()


def test_a_holder_that_lies(tmp_path: Path):
    """What it says is tried, and nothing of it believed."""
    path = tmp_path / "new"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        new = list_blocks(file.fileno(), len(DATA), Blocks(0, SEED))
        assert new is not None
        old = Blocks(len(DATA), SEED)
        search = Search(new, old, Reader(file.fileno()), BACKEND)
        assert search.run([range(new.count)], _Mute(old, random.Random(SEED))) == []


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, memoryview(DATA)[:10]), (5, memoryview(DATA)[5:10])],
        [(-5, memoryview(DATA)[:5])],
        [(BLOCK_SIZE - 1, memoryview(DATA)[:2])],
        [(0, Moved(len(DATA) - 1, 2))],
        [(0, Moved(-1, 2))],
        [(0, Moved(0, -1))],
        [(0, memoryview(DATA)[1:2])],
    ],
)
def test_pieces_that_make_no_block(tmp_path: Path, pieces: Pieces):
    """Refused, whatever a sender says; nothing is written."""
    (tmp_path / "old").write_bytes(DATA)
    with (tmp_path / "old").open("rb") as old, (tmp_path / "made").open("w+b") as made:
        blocks = list_blocks(old.fileno(), len(DATA), Blocks(0, SEED))
        assert blocks is not None
        patch = Patch(made.fileno(), old.fileno(), blocks)
        patch.begin(len(DATA), np.array([3, 4]))
        with pytest.raises(BasisError):
            patch.put(3, blocks.prove(3), pieces)
        with pytest.raises(BasisError):
            patch.put(4, blocks.prove(5), [])
        made.seek(3 * BLOCK_SIZE)
        assert made.read(BLOCK_SIZE) == bytes(BLOCK_SIZE)
