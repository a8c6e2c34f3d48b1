"""Block lists against their definition: a digest of each block, whatever way the list was made."""

import os
import random
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bisync.delta.backend import BACKEND
from bisync.delta.blocks import Blocks, Collector, Entries, apart, differing
from bisync.delta.changes import send_changes
from bisync.delta.digest import BLOCK_SIZE, GROUP_BLOCKS, block_digest, digest_of
from bisync.delta.listfile import header, parse, record
from bisync.delta.pages import PAGE_SIZE, differing_pages, page_digests
from bisync.fs.bigfile import Patch, Reader, list_blocks

SEED = 7
KINDS = st.lists(st.integers(0, 5), max_size=12)  # what a block holds: 0 is zeros
TAILS = st.sampled_from([0, 1, PAGE_SIZE, BLOCK_SIZE - 1])


def content(kinds: list[int], tail: int) -> bytes:
    """A file of blocks of each kind, and a last short one."""
    blocks = [random.Random(k).randbytes(BLOCK_SIZE) if k else bytes(BLOCK_SIZE) for k in kinds]
    return b"".join(blocks) + b"\x05" * tail


def definition(data: bytes) -> list[tuple[bytes, bytes]]:
    """A list in four lines."""
    return [
        (xxhash.xxh3_128_digest(block, SEED), block_digest(block))
        for block in (data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE))
    ]


def listed(data: bytes) -> Blocks:
    collector = Collector(SEED)
    for number, digests in enumerate(definition(data)):
        collector.add(number, *digests)
    return Blocks(0, SEED).changed(len(data), collector.entries())


def rows(blocks: Blocks) -> list[tuple[bytes, bytes]]:
    return [(blocks.find(n), blocks.prove(n)) for n in range(blocks.count)]


@settings(max_examples=60, deadline=None)
@given(KINDS, TAILS, KINDS, TAILS)
def test_versions(kinds: list[int], tail: int, others: list[int], end: int):
    """Any version's list follows from any other's and the blocks in which they differ."""
    old, new = content(kinds, tail), content(others, end)
    one, two = listed(old), listed(new)
    assert rows(one) == definition(old)
    assert one.digest() == digest_of(old)
    found = list(differing(one, two))
    padded = old[: len(new)].ljust(len(new), b"\0")
    must = {
        at // BLOCK_SIZE
        for at in range(0, len(new), BLOCK_SIZE)
        if padded[at : at + BLOCK_SIZE] != new[at : at + BLOCK_SIZE]
    }
    assert must <= set(found) <= must | {min(one.count, two.count) - 1}
    assert found == sorted(found)
    three = one.changed(two.size, apart(one, two))
    assert rows(three) == rows(two) and three.digest() == digest_of(new)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(KINDS, TAILS), min_size=1, max_size=4), st.integers(0, 400))
def test_list_file(versions: list[tuple[list[int], int]], cut: int):
    """A list is read back up to the last record that is whole."""
    data, known, ends = b"", Blocks(0, SEED), []
    for kinds, tail in versions:
        new = listed(content(kinds, tail))
        data = data or header(new)
        data += record(new.size, new.digest(), apart(known, new))
        known = new
        ends.append((len(data), new))
    whole = parse(data)
    assert whole is not None
    assert (rows(whole.blocks), whole.digest, whole.end) == (rows(known), known.digest(), len(data))
    torn = parse(data[: len(data) - cut])
    left = [new for end, new in ends if end <= len(data) - cut]
    assert (torn is None) == (not left)
    if torn is not None:
        assert rows(torn.blocks) == rows(left[-1])


@pytest.mark.parametrize("at", [0, 9, 16, 24, 32, 100, -1])
def test_damaged_list(at: int):
    """One wrong bit anywhere: nothing wrong is believed."""
    new = listed(content([1, 2, 0, 3], 5))
    data = bytearray(header(new) + record(new.size, new.digest(), new.entries()))
    data[at] ^= 4
    found = parse(bytes(data))
    assert found is None or (at == 9 and rows(found.blocks)[0][1] == rows(new)[0][1])


def test_holes_take_no_room():
    """A list of a TiB of zeros is empty, and has the digest of a TiB of zeros."""
    size = 1 << 40
    huge = Blocks(size, SEED)
    assert len(huge.entries().block) == 0
    collector = Collector(SEED)
    collector.add(GROUP_BLOCKS * 5 + 3, b"f" * 16, b"p" * 32)
    other = huge.changed(size, collector.entries())
    assert list(differing(huge, other)) == [GROUP_BLOCKS * 5 + 3]
    assert len(other.groups) == 1
    assert other.changed(size, apart(other, huge)).groups == {}
    assert list(differing(Blocks(0, SEED), huge)) == []
    assert list(differing(huge, Blocks(10, SEED).changed(10, Entries.none()))) == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, BLOCK_SIZE), st.integers(0, BLOCK_SIZE), st.sets(st.integers(0, 40)))
def test_pages(length: int, before: int, changed: set[int]):
    """The stretches that differ, written into the old block, make the new one."""
    old = random.Random(1).randbytes(before)
    new = bytearray(random.Random(1).randbytes(length))
    for page in changed:
        if page * PAGE_SIZE < length:
            new[page * PAGE_SIZE] ^= 1
    pieces = differing_pages(memoryview(new), page_digests(memoryview(old), 3), 3)
    made = bytearray(old[:length].ljust(length, b"\0"))
    for start, piece in pieces:
        made[start : start + len(piece)] = piece
    assert made == new
    same = [p for p in range(min(before, length) // PAGE_SIZE) if p not in changed]
    sent = sum(len(piece) for _, piece in pieces)
    assert sent <= length - len(same) * PAGE_SIZE


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 5, BLOCK_SIZE, 40 << 20, (40 << 20) + 1])
def test_reading(tmp_path: Path, size: int, workers: int):
    """A file read by any number of threads, with holes, and with a list of an older version."""
    path = tmp_path / "f"
    chance = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(9):
            file.seek(chance.randrange(max(size, 1)))
            file.write(chance.randbytes(min(70_000, size - file.tell())))
    data = path.read_bytes()
    with path.open("r+b") as file:
        fresh = list_blocks(file.fileno(), size, Blocks(0, SEED), workers=workers)
        assert fresh is not None and rows(fresh) == definition(data)
        if size:
            file.seek(size // 2)
            file.write(b"!")
            file.flush()
            again = list_blocks(file.fileno(), size, fresh, workers=workers)
            assert again is not None and rows(again) == definition(path.read_bytes())


@settings(max_examples=40, deadline=None)
@given(KINDS, TAILS, KINDS, TAILS, st.lists(st.integers(0, 1 << 20), max_size=4))
def test_patch(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[int],
    tail: int,
    others: list[int],
    end: int,
    writes: list[int],
):
    """What is sent makes the new version of the old one; of a block only pages that differ."""
    folder = tmp_path_factory.mktemp("patch")
    old, new = content(kinds, tail), bytearray(content(others, end))
    for at in writes:
        if at < len(new):
            new[at] ^= 255
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    with (
        (folder / "old").open("rb") as a,
        (folder / "new").open("rb") as b,
        (folder / "made").open("w+b") as made,
    ):
        patch = Patch(made.fileno(), a.fileno(), listed(old))
        target = listed(bytes(new))
        for _ in range(2):  # it may begin again
            send_changes(target, patch, Reader(b.fileno()), lambda _length: None, BACKEND)
        assert (folder / "made").read_bytes() == new
        assert rows(patch.blocks()) == rows(target)
        assert patch.literal <= sum(target.length(n) for n in differing(listed(old), target))
    for name in ("old", "new", "made"):
        os.unlink(folder / name)
