"""Content digests: what proves across replicas that two files hold the same bytes.

A file is cut into blocks of 128 KiB from its start. block = BLAKE3(bytes), group =
BLAKE3(the digests of up to 1 024 blocks), content = BLAKE3(size as 8 bytes little-endian,
the digests of the groups). One changed block touches one group, so the digest of a huge
file follows from its block list without reading the file. Constants of the format.

Only home of blake3. Source: O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3", 2020.
"""

from collections.abc import Callable, Iterable

from blake3 import blake3

BLOCK_SIZE = 128 * 1024  # bytes
GROUP_BLOCKS = 1024  # block digests per group
DIGEST_SIZE = 32  # bytes


def block_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of one block, at most ``BLOCK_SIZE`` bytes."""
    return blake3(data).digest()


def content_digest(size: int, blocks: Iterable[bytes]) -> bytes:
    """The digest of a file from its block digests, in order."""
    joined = b"".join(blocks)
    step = GROUP_BLOCKS * DIGEST_SIZE
    groups = (joined[start : start + step] for start in range(0, len(joined), step))
    return digest_of_groups(size, groups)


def digest_of_groups(size: int, groups: Iterable[bytes]) -> bytes:
    """The digest of a file from the joined block digests of each of its groups, in order."""
    hasher = blake3(size.to_bytes(8, "little"))
    for group in groups:
        hasher.update(blake3(group).digest() if group != _ZERO_PROOFS else _ZERO_GROUP)
    return hasher.digest()


_ZERO_BLOCK = block_digest(bytes(BLOCK_SIZE))
_ZERO_PROOFS = _ZERO_BLOCK * GROUP_BLOCKS
_ZERO_GROUP = blake3(_ZERO_PROOFS).digest()


class ContentHasher:
    """Digests bytes as they come; chunks must be whole blocks but for the last.

    Holes are hashed as the zeros they read as, a whole group of them at a time, so that a
    huge empty file costs next to nothing.
    """

    def __init__(self, proven: Callable[[int, bytes], None] = lambda _block, _proof: None) -> None:
        """``proven``: told the number and the digest of each block that is not in a hole."""
        self._proven = proven
        self._groups: list[bytes] = []
        self._blocks: list[bytes] = []
        self._size = 0

    def _add(self, digest: bytes) -> None:
        self._blocks.append(digest)
        if len(self._blocks) == GROUP_BLOCKS:
            self._groups.append(blake3(b"".join(self._blocks)).digest())
            self._blocks.clear()

    def _check(self) -> None:
        if self._size % BLOCK_SIZE:
            raise ValueError("a chunk ended within a block and was not the last")

    def update(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            ValueError: an earlier chunk ended within a block.
        """
        self._check()
        for start in range(0, len(data), BLOCK_SIZE):
            digest = blake3(data[start : start + BLOCK_SIZE]).digest()
            self._proven((self._size + start) // BLOCK_SIZE, digest)
            self._add(digest)
        self._size += len(data)

    def update_zeros(self, length: int) -> None:
        """Take ``length`` zero bytes."""
        self._check()
        self._size += length
        while length >= BLOCK_SIZE:
            if not self._blocks and length >= GROUP_BLOCKS * BLOCK_SIZE:
                self._groups.append(_ZERO_GROUP)
                length -= GROUP_BLOCKS * BLOCK_SIZE
            else:
                self._add(_ZERO_BLOCK)
                length -= BLOCK_SIZE
        if length:
            self._add(block_digest(bytes(length)))

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._size

    def digest(self) -> bytes:
        """The content digest of everything taken so far."""
        groups = list(self._groups)
        if self._blocks:
            groups.append(blake3(b"".join(self._blocks)).digest())
        return blake3(self._size.to_bytes(8, "little") + b"".join(groups)).digest()


def digest_of(data: bytes) -> bytes:
    """The content digest of bytes in memory."""
    hasher = ContentHasher()
    hasher.update(memoryview(data))
    return hasher.digest()


def chain_digest(previous: bytes, payload: bytes) -> bytes:
    """The digest of an archive after one more commit."""
    return blake3(previous + payload).digest()
