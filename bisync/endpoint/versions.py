"""What two ends say of a version of a file, or that there is none."""

from bisync.endpoint.faults import error_from
from bisync.errors import BisyncError, EndpointError, Interrupted, PathError
from bisync.fs.content import LARGEST, Version
from bisync.wire.letters import Piece
from bisync.wire.schema import Bool, Bytes, Int, Plain, refuse

_SIZE, _DIGEST, _YES = Int(0, LARGEST), Bytes(32, 32), Bool()


def version_from_plain(plain: list[Plain]) -> tuple[int, bytes, bool, bool]:
    """Size, digest, whether it had a writer, whether it is an instant."""
    if len(plain) != 4:
        refuse("a version was due")
    size, digest = _SIZE.unpack(plain[0]), _DIGEST.unpack(plain[1])
    return size, digest, _YES.unpack(plain[2]), _YES.unpack(plain[3])


def version_to_plain(version: Version) -> list[Plain]:
    """What the other end is told of a version that was read."""
    return [version.size, version.digest, version.writer, version.instant]


def fault_in(piece: Piece) -> BisyncError:
    """The error that a piece tells."""
    if len(piece.values) != 2:
        refuse("a fault was due")
    error = error_from(Int(0, 1 << 16).unpack(piece.values[0]), piece.values[1])
    if isinstance(error, PathError | Interrupted):
        return error
    return EndpointError(f"the other end: {error}")
