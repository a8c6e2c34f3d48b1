"""Take an exchange of two names back, whoever was at one of them meanwhile.

An exchange puts a new object at a name of the tree, and what was there into the stage. Before it
is taken back somebody may have saved another file at that name: that is the newest, keeps the name,
and what it is not waits for the store.
"""

import logging
import os
from collections.abc import Sequence

from bisync.core.node import NodeId, Place
from bisync.core.path import display
from bisync.errors import StaleError
from bisync.fs.incoming import Staged, link_beside
from bisync.fs.log import NOBODYS, ResultLog, place_to_row
from bisync.fs.look import Looked, Looker
from bisync.fs.stage import Stage
from bisync.linux.handle import HandleReader
from bisync.linux.rename import swap

log = logging.getLogger(__name__)
Spot = tuple[int, bytes]
"""A held directory and a name in it."""
_MOST_SAVES = 100  # in the moment of one exchange


def swap_back(handles: HandleReader, spot: Spot, target: Spot, ours: bytes) -> bool:
    """Exchange two names again, unless somebody put something else at ``target``.

    Args:
        spot: has what came out of the tree.
        target: the name in the tree.
        ours: the handle of the new object that was put there.

    Returns:
        Whether the new object is back at ``spot``. Else what is newest has the name, and what is
        at ``spot`` is somebody's.

    Raises:
        OSError: the names could not be exchanged.
    """
    try:
        if handles.read(*target) != ours:
            return False
        last = handles.read(*spot)
        swap(*spot, *target)
        out = handles.read(*spot)
        if out == ours:
            return True
        for _ in range(_MOST_SAVES):  # what came out was saved after ours: it goes back
            swap(*spot, *target)
            last, out, put = out, handles.read(*spot), last
            if out == put:
                break
    except FileNotFoundError:
        pass  # somebody removed it
    return False


class TakeBack:
    """What undoes steps of one batch, and loses nothing by it."""

    def __init__(self, look: Looker, stage: Stage, log: ResultLog) -> None:
        self.look = look
        self.stage = stage
        self.log = log

    def exchange(self, spot: Spot, place: Place, ours: bytes) -> None:
        """Undo the exchange of a staged object with a name.

        Raises:
            StaleError: somebody put something else there; what is at ``spot`` is not ours.
        """
        target = self.look.directories.at(place)
        if not swap_back(self.look.root.handles, spot, target, ours):
            raise StaleError("somebody changed it at the same moment")

    def group(self, staged: Staged, places: Sequence[Place]) -> None:
        """The old version could not be kept: it takes its names again.

        Raises:
            StaleError: somebody put something else at the first of them.
        """
        first, *rest = places
        old = self.look.handle(*staged.spot)
        for number, place in enumerate(rest, 1):
            temp = staged.dir_fd, link_beside(staged.name, number)
            link(staged.spot, temp)
            try:
                swap_back(
                    self.look.root.handles, temp, self.look.directories.at(place), staged.handle
                )
            finally:
                self.drop_link(temp, place, first, old, staged.handle)
        self.exchange(staged.spot, first, staged.handle)

    def names(self, one: Looked, two: Looked) -> None:
        """Two names of the tree that were exchanged take their objects back.

        Raises:
            StaleError: somebody put something else at the second, where the first's object went.
        """
        if self.look.handle(two.dir_fd, two.name) != one.handle:
            raise StaleError("somebody changed it at the same moment")
        swap(one.dir_fd, one.name, two.dir_fd, two.name)

    def drop_link(self, temp: Spot, place: Place, first: Place, *known: bytes) -> None:
        """Remove a link beside a staged object; what somebody had at ``place`` is kept.

        Args:
            first: of the group; what is not in the stage is beside that.
            known: handles of objects that have another name.
        """
        try:
            if self.look.handle(*temp) in known:
                os.unlink(temp[1], dir_fd=temp[0])
            else:
                self.let_wait(temp, self.look.index.place_path(place), first[0])
        except StaleError:
            return  # it is gone
        except OSError as error:
            log.info("stage-not-emptied name=%s reason=%s", temp[1], error)

    def let_wait(self, spot: Spot, path: bytes, parent: NodeId) -> None:
        """What is somebody's, and has no name and no place in the store yet, waits for that.

        Args:
            path: where it was.
            parent: the directory of that, which it is in if it is not in the stage.
        """
        dir_fd, name = spot
        if dir_fd == self.stage.incoming:
            try:
                self.stage.set_aside(name)
                dir_fd = self.stage.displaced
            except OSError as error:
                log.info("stage-entry-stays name=%s reason=%s", name, error)
        log.warning("not-kept-yet path=%s name=%s", display(path), name)
        if dir_fd == self.stage.displaced:
            self.log.stuck(path, {"out": name.decode("latin-1")})
        elif dir_fd == self.stage.incoming:
            self.log.stuck(path, {"in": name.decode("latin-1"), "handle": NOBODYS})
        else:
            self.log.stuck(path, {"near": place_to_row((parent, name))})


def link(source: Spot, target: Spot) -> None:
    """One more name for an object; a symlink itself, never what it leads to."""
    os.link(
        source[1],
        target[1],
        src_dir_fd=source[0],
        dst_dir_fd=target[0],
        follow_symlinks=False,
    )
