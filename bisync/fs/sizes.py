"""How much room the engine's own files take at a root."""

import os
import stat
import time

from msgspec import Struct

from bisync.fs.root import OPEN_DIR

_STAGE = frozenset({b"in", b"out", b"undo"})
_BASES = b"bases"
_PATIENCE_S = 1.0


class Sizes(Struct, frozen=True):
    """Bytes on disk. Blocks that several files share are counted in each."""

    index: int = 0  # what is known and agreed on, with the block lists
    bases: int = 0  # frozen versions of big files
    stage: int = 0  # what arrives, and what undoes a writing
    store: int = 0  # kept versions
    whole: bool = True  # else there was no time to look at all of them


class _Count:
    """Adds up files for as long as there is time; what cannot be looked at counts nothing."""

    def __init__(self, patience_s: float) -> None:
        self._end = time.monotonic() + patience_s
        self.whole = True

    def below(self, top: int, *, within: bool = True) -> int:
        """All files below a directory; ``within`` directories in it, too, however deep."""
        total = 0
        stack = [(os.dup(top), self._names(top))]
        try:
            while stack and self.whole:
                fd, names = stack[-1]
                if not names:
                    os.close(stack.pop()[0])
                    continue
                name = names.pop()
                size, is_directory = self._look(fd, name)
                total += size
                if is_directory and within:
                    try:
                        child = os.open(name, OPEN_DIR, dir_fd=fd)
                    except OSError:
                        continue
                    stack.append((child, self._names(child)))
        finally:
            for fd, _ in stack:
                os.close(fd)
        return total

    def entry(self, folder: int, name: bytes, *, within: bool = True) -> int:
        """One entry, with all that is below it."""
        size, is_directory = self._look(folder, name)
        if not is_directory:
            return size
        try:
            fd = os.open(name, OPEN_DIR, dir_fd=folder)
        except OSError:
            return size
        try:
            return size + self.below(fd, within=within)
        finally:
            os.close(fd)

    def _look(self, folder: int, name: bytes) -> tuple[int, bool]:
        if time.monotonic() > self._end:
            self.whole = False
            return 0, False
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return 0, False  # it went meanwhile
        return info.st_blocks * 512, stat.S_ISDIR(info.st_mode)

    @staticmethod
    def _names(fd: int) -> list[bytes]:
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        except OSError:
            return []


def sizes(state_fd: int, store_fd: int | None, patience_s: float = _PATIENCE_S) -> Sizes:
    """Look at all files of a state folder, and of a store, if there is one."""
    count = _Count(patience_s)
    found = dict.fromkeys(("index", "bases", "stage"), 0)
    for name in map(os.fsencode, os.listdir(state_fd)):
        part = "stage" if name in _STAGE else "bases" if name == _BASES else "index"
        found[part] += count.entry(state_fd, name, within=name != _BASES)  # no snapshot is walked
    store = 0 if store_fd is None else count.below(store_fd)
    return Sizes(**found, store=store, whole=count.whole)
