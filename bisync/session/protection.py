"""What may not be deleted at the destination of a mirror."""

import contextlib
import os

from bisync.core.filters import Filters
from bisync.core.wish import Held
from bisync.endpoint.destination import Destination
from bisync.fs.root import OPEN_DIR
from bisync.fs.starts import read_rules


class Protection:
    """The filter at the destination, with the files of rules that lie there."""

    def __init__(self, filters: Filters, side: Destination, complete: dict[bytes, bool]) -> None:
        """``complete``: the directories that the source has, and whether all they hold was seen."""
        self._complete = complete
        self._root = side.side.replica.root.fd
        self._below = side.below
        self._named = not complete.get(b"", False)  # sources go beside what else it holds
        self._base = os.path.realpath(os.path.join(side.side.replica.root.path, side.below))
        self._filters = filters
        self._path = side.side.path
        self._here: dict[bytes, Filters] = {}

    def covers(self, held: Held) -> bool:
        """Whether a node may not be deleted where it is."""
        path = self._path(held.node.id)
        below = self._below + b"/" if self._below else b""
        if path is None or not path.startswith(below):
            return True
        path = path[len(below) :]
        return not self._is_extra(path) or self(path, is_dir=held.is_dir, deleting=False)

    def _is_extra(self, path: bytes) -> bool:
        """Whether a path is where everything that the source has was seen."""
        at = 0
        while self._complete.get(path[: max(at - 1, 0)], False):
            slash = path.find(b"/", at)
            if slash < 0 or path[:slash] not in self._complete:
                return True  # itself, or a directory above it that the source does not have
            at = slash + 1
        return False

    def __call__(self, path: bytes, *, is_dir: bool, deleting: bool) -> bool:
        folder = path.rpartition(b"/")[0]
        return self._within(folder).protects(path, is_dir=is_dir, deleting=deleting)

    def _within(self, folder: bytes) -> Filters:
        known = self._here.get(folder)
        if known is None:
            if folder:
                above = self._within(folder.rpartition(b"/")[0])
            else:
                above = self._filters.under(self._base, read_rules, itself=self._named)
            skipped = self._named and not folder
            known = above if skipped else above.within(folder, self._read)
            self._here[folder] = known
        return known

    def _read(self, path: bytes) -> bytes | None:
        """A file of rules at the destination; links are not followed."""
        *parts, name = [*self._below.split(b"/"), *path.split(b"/")]
        fd = os.dup(self._root)
        try:
            for part in filter(None, parts):
                below = os.open(part, OPEN_DIR, dir_fd=fd)
                os.close(fd)
                fd = below
            return read_rules(name, fd)
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
