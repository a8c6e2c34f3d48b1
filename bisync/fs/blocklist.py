"""The block lists of a replica's big files: ``.bisync/blocks/NODE``.

Records are only appended; when those behind the first outweigh a quarter of it, all is written
anew. A list is a cache: one that is damaged, or ends in a record that was torn, costs one reading
of the file. What it says of a block is true whatever became of the file since: a block with this
finding digest has that proving digest.
"""

import contextlib
import logging
import os
import secrets

from bisync.core.node import NodeId
from bisync.delta.blocks import Blocks, apart
from bisync.delta.listfile import Listed, header, parse, record
from bisync.fs.stage import subfolder

log = logging.getLogger(__name__)
_COMPACT = 4  # what was appended may be this part of the first record


class BlockLists:
    """All lists of one replica."""

    def __init__(self, state_fd: int | None) -> None:
        """
        Args:
            state_fd: the state folder; ``None``: nothing is known, and nothing remembered.
        """
        self._dir = -1
        if state_fd is None:
            return
        try:
            self._dir = subfolder(state_fd, b"blocks")
        except OSError as error:
            log.info("no-block-lists reason=%s", error)

    def load(self, node: NodeId) -> Listed | None:
        """A node's list; ``None`` if there is none, or none that can be read."""
        if self._dir < 0:
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(_name(node), flags, dir_fd=self._dir), "rb") as file:
                return parse(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            log.info("block-list-not-read node=%d reason=%s", node, error)
            return None

    def known(self, node: NodeId) -> Blocks:
        """A node's list of whatever version, or an empty one with a seed of its own."""
        listed = self.load(node)
        return listed.blocks if listed is not None else Blocks(0, secrets.randbits(64))

    def of(self, node: NodeId, digest: bytes | None) -> Blocks | None:
        """A node's list, if it is that of a content."""
        listed = self.load(node) if digest is not None else None
        return listed.blocks if listed is not None and listed.digest == digest else None

    def save(self, node: NodeId, blocks: Blocks) -> None:
        """Take a node's list one version further, or begin a new one.

        A list that cannot be written costs one reading more, and is no failure.
        """
        if self._dir < 0:
            return
        try:
            self._save(node, blocks)
        except OSError as error:
            log.info("block-list-not-written node=%d reason=%s", node, error)

    def _save(self, node: NodeId, blocks: Blocks) -> None:
        digest, old = blocks.digest(), self.load(node)
        if old is not None and old.blocks.seed == blocks.seed:
            if old.digest == digest:
                return
            more = record(blocks.size, digest, apart(old.blocks, blocks))
            end = old.end + len(more)
            if end - old.first <= old.first // _COMPACT:
                flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(_name(node), flags, dir_fd=self._dir), "wb") as file:
                    file.truncate(old.end)  # a torn record may be behind it
                    file.seek(old.end)
                    file.write(more)
                return
        whole = header(blocks) + record(blocks.size, digest, blocks.entries())
        temp = _name(node) + b"." + secrets.token_hex(8).encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temp, flags, 0o600, dir_fd=self._dir), "wb") as file:
                file.write(whole)
            os.rename(temp, _name(node), src_dir_fd=self._dir, dst_dir_fd=self._dir)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=self._dir)
            raise

    def close(self) -> None:
        """Give the descriptor back."""
        if self._dir >= 0:
            os.close(self._dir)


def _name(node: NodeId) -> bytes:
    return b"%d" % node
