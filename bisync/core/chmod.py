"""rsync's ``--chmod``: changes of permission bits, for files or directories only if so marked."""

import re

from msgspec import Struct

from bisync.errors import UsageError

_WHO = {"u": 0o700, "g": 0o070, "o": 0o007, "a": 0o777}
_SPECIAL = {"u": 0o4000, "g": 0o2000, "o": 0, "a": 0o6000}
_STEP = re.compile(r"([DF]?)(?:([0-7]{1,4})|([ugoa]*)([-+=])([rwxXst]*))\Z")


class ChmodStep(Struct, frozen=True):
    dirs: bool
    files: bool
    clear: int  # bits that go
    bits: int  # bits that come
    search: int  # of them those of X: where it is a directory or executable by somebody


class Chmod(Struct, frozen=True):
    """A list of changes, applied in order."""

    steps: tuple[ChmodStep, ...] = ()

    def apply(self, mode: int, *, is_dir: bool) -> int:
        """The mode that an entry gets."""
        for step in self.steps:
            if not (step.dirs if is_dir else step.files):
                continue
            executable = is_dir or bool(mode & 0o111)
            mode = (mode & ~step.clear) | step.bits | (step.search if executable else 0)
        return mode


def parse_chmod(texts: list[str], umask: int) -> Chmod:
    """Several ``--chmod`` values add up.

    Raises:
        UsageError: a change cannot be understood.
    """
    steps = []
    for text in texts:
        for part in text.split(","):
            found = _STEP.match(part)
            if found is None or not part:
                raise UsageError(f"--chmod {text}: {part!r} is not understood")
            kind, octal, who, sign, what = found.groups()
            steps.append(_step(kind, octal, who, sign, what, umask))
    return Chmod(tuple(steps))


def _step(
    kind: str, octal: str | None, who: str | None, sign: str | None, what: str | None, umask: int
) -> ChmodStep:
    dirs, files = kind != "F", kind != "D"
    if octal is not None:
        return ChmodStep(dirs, files, 0o7777, int(octal, 8), 0)
    mask = special = 0
    for letter in who or "a":
        mask |= _WHO[letter]
        special |= _SPECIAL[letter]
    if not who:
        mask &= ~umask
    bits = search = top = 0
    for letter in what or "":
        match letter:
            case "r":
                bits |= 0o444
            case "w":
                bits |= 0o222
            case "x":
                bits |= 0o111
            case "X":
                search |= 0o111
            case "s":
                top |= special
            case _:
                top |= 0o1000
    mask |= top  # set-id and sticky bits change only where they are named
    bits, search = (bits | top) & mask, search & mask
    if sign == "-":
        return ChmodStep(dirs, files, bits | search, 0, 0)
    return ChmodStep(dirs, files, mask if sign == "=" else 0, bits, search)
