"""Write a file's next version into it, so that it can be undone at any moment.

The undo holds what will be written over, and is durable before the first byte is. While it lies in
``undo/`` the file counts as torn, and recovery makes it the old or the new version before anything
reads it. Afterwards the undo is what is kept of the old version. A write lease holds off everybody
who opens the file meanwhile: nobody ever reads a mix.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from bisync.core.node import NodeId, Place
from bisync.core.path import display
from bisync.errors import HaltError, StaleError
from bisync.fs.incoming import Staged
from bisync.fs.look import Looker
from bisync.fs.meta import read_xattrs
from bisync.fs.overwriting import LeaseLostError, Overwriting, open_delta
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.lease import Lease, WriteHold, release, take_write_lease

log = logging.getLogger(__name__)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class InPlace:
    """Writes the next versions of one batch's files into them."""

    def __init__(self, look: Looker, stage: Stage, store: Store) -> None:
        self._look, self._stage, self._store = look, stage, store

    def write(self, place: Place, node: NodeId, staged: Staged) -> bytes | None:
        """Write a staged version into the file at a place; where its old version is kept then.

        Returns:
            ``None`` if somebody else has it open, or may not be held off: it was not touched.

        Raises:
            StaleError: the file is not what was observed.
            OSError: it failed; the file is as it was.
            HaltError: it failed, and the file is half-written until the next run.
        """
        assert staged.apart is not None
        path = self._look.index.place_path(place)
        with self._opened(place, node) as opened:
            if opened is None:
                return None
            fd, hold = opened
            source = os.open(staged.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=staged.dir_fd)
            try:
                with self._written(opened, source, staged.apart.undo) as (folder, undo, record):
                    kept = self._store.keep(folder, undo, path, record, copy=False, delta=True)
            finally:
                os.close(source)
            self._stage.discard(staged.name)
            staged.handle = self._look.root.handles.read(fd, b"")
            staged.info, staged.found = os.fstat(fd), read_xattrs(fd, b"")
            if hold.left_s() <= 0:
                # What it looks like now may be somebody else's doing: the next scan tells.
                raise StaleError("somebody opened it while it was flushed")
            return kept.path

    def make_whole(self, place: Place, node: NodeId, staged: Staged) -> None:
        """Give a staged version what stays of the old one, so that it can be exchanged with it.

        Raises:
            StaleError: the file is not what was observed.
        """
        assert staged.apart is not None
        looked = self._look.at(place, node, content=True)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        basis = os.open(looked.name, flags, dir_fd=looked.dir_fd)
        try:
            fd = os.open(staged.name, os.O_RDWR | os.O_CLOEXEC, dir_fd=staged.dir_fd)
            try:
                staged.apart.fill(fd, basis)
                staged.info = os.fstat(fd)
            finally:
                os.close(fd)
        finally:
            os.close(basis)
        self._stage.discard(staged.apart.undo)
        staged.apart = None

    @contextlib.contextmanager
    def _opened(self, place: Place, node: NodeId) -> Iterator[tuple[int, WriteHold] | None]:
        """The file, open for writing, held so that nobody else can open it; ``None``: impossible.

        Raises:
            StaleError: it is not what was observed.
        """
        looked = self._look.at(place, node, content=True)
        try:
            fd = os.open(looked.name, _OPEN, dir_fd=looked.dir_fd)
        except OSError as error:
            log.info("not-in-place node=%d reason=%s", node, error)
            yield None
            return
        try:
            if take_write_lease(fd) is not Lease.GRANTED:
                yield None
                return
            hold = WriteHold(fd)
            try:
                self._look.at(place, node, content=True)
                info = os.fstat(fd)
                if info.st_ino != looked.info.st_ino:
                    raise StaleError("something else has its name")
                yield (fd, hold) if info.st_nlink == 1 else None
            finally:
                release(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _written(
        self, opened: tuple[int, WriteHold], source: int, undo: bytes
    ) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Write a version; if the block fails, or the writing itself, all is as it was.

        Yields the directory and the name of the undo, and what is to be said of it. What is done
        with it there must leave it where it is, or take it away as a last step.

        Args:
            opened: the file, held.
            source: what is new of it.
            undo: its name in the stage.

        Raises:
            StaleError: the file is not what the undo was made for.
            HaltError: it failed, and could not be undone now; the next run does that.
        """
        stage = self._stage
        delta_fd = os.open(undo, os.O_RDONLY | os.O_CLOEXEC, dir_fd=stage.incoming)
        try:
            delta = open_delta(delta_fd)
            if delta is None:
                raise StaleError("its undo cannot be read")
            target = Overwriting(opened[0], delta_fd, delta, opened[1].left_s)
            if not target.is_old():
                raise StaleError("it changed since it was observed")
            if opened[1].left_s() <= 0:
                raise StaleError("somebody opened it before it was written to")
            os.rename(undo, undo, src_dir_fd=stage.incoming, dst_dir_fd=stage.torn)
            os.fsync(stage.torn)
            try:
                target.write_new(source)
                try:
                    target.finish_new()
                except LeaseLostError:
                    if not target.is_new:
                        raise
                    os.fsync(opened[0])
                yield stage.torn, undo, delta.about.record
            except BaseException as error:
                self._undo(target, undo, error)
                raise
        finally:
            os.close(delta_fd)

    def _undo(self, target: Overwriting, undo: bytes, why: BaseException) -> None:
        lost = isinstance(why, LeaseLostError)
        try:
            if target.touched:
                target.write_old()
        except (OSError, LeaseLostError) as error:
            what = "somebody opened it" if lost else str(why)
            then = "he was let in" if isinstance(error, LeaseLostError) else str(error)
            path = self._look.root.path
            # Nothing may look at it as it is: the run ends, and the next one begins with mending.
            raise HaltError(
                f"{display(path)}: a file in it could not be written to the end ({what}; {then}) "
                f"and is half-written now; run again, or 'bisync recover {display(path)}', when "
                "nobody has it open"
            ) from error
        os.unlink(undo, dir_fd=self._stage.torn)
        os.fsync(self._stage.torn)
        if lost:
            raise StaleError("somebody opened it before it was written to") from why
