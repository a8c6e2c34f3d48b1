"""Errors across the wire: which they are, and the text for people. Nothing else of them."""

from bisync.errors import (
    BisyncError,
    BusyError,
    EndpointError,
    HaltError,
    HeldSilentlyError,
    HeldTooLongError,
    Interrupted,
    NoSpaceError,
    PathError,
    ProtocolError,
    RootLockedError,
    StaleError,
    StateFormatError,
    TimedOutError,
    UsageError,
)
from bisync.fs.database import StateDamagedError
from bisync.wire.schema import Plain, Text

_TEXT = Text(4096)
_KINDS: dict[int, type[BisyncError]] = {
    1: UsageError,
    2: StateFormatError,
    3: PathError,
    4: StaleError,
    5: BusyError,
    6: EndpointError,
    7: ProtocolError,
    8: TimedOutError,
    9: RootLockedError,
    10: NoSpaceError,
    11: HaltError,
    12: StateDamagedError,
    13: Interrupted,
    14: BisyncError,
    15: HeldTooLongError,
    16: HeldSilentlyError,
}
"""Never renumber. What is not known here is an error of the other end as a whole."""


def number_of(error: BisyncError) -> tuple[int, Plain]:
    """What an error is told as: the nearest kind, and its text."""
    for number, kind in _KINDS.items():
        if type(error) is kind:
            return number, _TEXT.pack(str(error))
    for number, kind in sorted(_KINDS.items(), key=lambda item: -len(item[1].__mro__)):
        if isinstance(error, kind):
            return number, _TEXT.pack(str(error))
    return 14, _TEXT.pack(str(error))


def error_from(number: int, body: Plain) -> BisyncError:
    """The error that the other end told."""
    text = _TEXT.unpack(body)
    kind = _KINDS.get(number, EndpointError)
    if kind is Interrupted:
        return Interrupted(15)
    return kind(text)
