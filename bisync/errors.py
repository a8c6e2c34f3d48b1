"""Every error bisync raises on purpose, sorted by what the caller does next.

* ``BisyncError``
    * ``UsageError``           the command line or the configuration is wrong (exit 2)
        * ``StateFormatError`` the state folder was written by a newer bisync
    * ``PathError``            skip this path, report a problem, go on (exit 23)
        * ``StaleError``       the path no longer holds what the plan expected: look again
        * ``BusyError``        somebody is writing to it: come back later (exit 24)
    * ``EndpointError``        this side cannot go on; nothing was torn (exit 12)
        * ``ProtocolError``    the peer does not speak as agreed; the session ends
        * ``TimedOutError``    the peer said nothing for too long (exit 30)
        * ``RootLockedError``  another engine holds the root and does not answer (exit 3)
            * ``HeldTooLongError`` it answered, and did not give it away in time (exit 30)
        * ``NoSpaceError``     the side has no room left: stop applying, keep state (exit 23)
    * ``HaltError``            stop until a person says otherwise (exit 25)
    * ``Interrupted``          a signal asked for a clean stop (exit 130 or 143)
"""

from typing import ClassVar


class BisyncError(Exception):
    """Base class; ``exit_code`` is what the command line exits with."""

    exit_code: ClassVar[int] = 1


class UsageError(BisyncError):
    """The request makes no sense; nothing was touched."""

    exit_code = 2


class StateFormatError(UsageError):
    """The state folder has a format or a feature that this version does not know."""


class PathError(BisyncError):
    """One path could not be handled; the rest of the tree still can."""

    exit_code = 23

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StaleError(PathError):
    """The path does not hold what the plan expected; it must be observed again."""


class BusyError(PathError):
    """Somebody can write to the file; it is left alone for now."""

    exit_code = 24


class EndpointError(BisyncError):
    """One side cannot go on at all."""

    exit_code = 12


class ProtocolError(EndpointError):
    """The other end of a connection said what it must not, or nothing that is understood."""


class TimedOutError(EndpointError):
    """The other end of a connection said nothing for too long."""

    exit_code = 30


class RootLockedError(EndpointError):
    """Another engine works on this root, and does not say when it will be done."""

    exit_code = 3


class HeldTooLongError(RootLockedError):
    """Another engine works on this root for longer than we were to wait."""

    exit_code = 30


class HeldSilentlyError(HeldTooLongError):
    """And it did not even say who it is."""


class DrivenError(RootLockedError):
    """Another session watches this pair and carries everything."""


class NoSpaceError(EndpointError):
    """The side is full or read-only; what was done stands, the rest follows later."""

    exit_code = 23


class HaltError(BisyncError):
    """A guard speaks: a lost mount is likelier than a wish."""

    exit_code = 25


class Interrupted(BisyncError):  # noqa: N818 - a request, not a fault
    """A signal asked for a stop; the operation in hand was finished."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class UnwrittenError(Exception):
    """Standard output does not take what a command has to say; the text is why.

    No error of the system for those who handle such errors of files: nobody but the command does.
    """
