"""How much room the engine's own files take at a root."""

import os
import stat

from msgspec import Struct

from bisync.fs.root import OPEN_DIR

_STAGE = frozenset({b"in", b"out", b"undo"})
_BASES = b"bases"


class Sizes(Struct, frozen=True):
    """Bytes on disk. Blocks that several files share are counted in each."""

    index: int = 0  # what is known and agreed on, with the block lists
    bases: int = 0  # frozen versions of big files
    stage: int = 0  # what arrives, and what undoes a writing
    store: int = 0  # kept versions


def sizes(state_fd: int, store_fd: int | None) -> Sizes:
    """Look at all files of a state folder, and of a store, if there is one."""
    index = bases = stage = 0
    for name in map(os.fsencode, os.listdir(state_fd)):
        taken = _taken(state_fd, name, within=name != _BASES)
        if name in _STAGE:
            stage += taken
        elif name == _BASES:
            bases += taken
        else:
            index += taken
    return Sizes(index, bases, stage, 0 if store_fd is None else _below(store_fd))


def _taken(folder: int, name: bytes, *, within: bool = True) -> int:
    """One entry with all that is below it; ``within`` the folders in a folder, too."""
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(info.st_mode):
            return info.st_blocks * 512
        fd = os.open(name, OPEN_DIR, dir_fd=folder)
    except OSError:
        return 0  # it went meanwhile, or is not to be looked at
    try:
        return info.st_blocks * 512 + _below(fd, within=within)
    finally:
        os.close(fd)


def _below(fd: int, *, within: bool = True) -> int:
    total = 0
    with os.scandir(fd) as entries:
        for entry in entries:
            if within or not entry.is_dir(follow_symlinks=False):  # a snapshot is not walked
                total += _taken(fd, os.fsencode(entry.name))
    return total
