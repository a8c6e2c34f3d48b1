"""Users and groups by name, for machines where the same person has another number."""

import contextlib
import grp
import os
import pwd

from msgspec.structs import replace

from bisync.core.wish import Wish


def user_name(number: int) -> bytes | None:
    """The name of a user, if it has one here."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name.encode()
    return None


def group_name(number: int) -> bytes | None:
    """The name of a group, if it has one here."""
    with contextlib.suppress(KeyError):
        return grp.getgrgid(number).gr_name.encode()
    return None


def user_number(name: bytes, number: int) -> int:
    """The number of a user here; the number it has there if it is not known, or is root's."""
    with contextlib.suppress(KeyError, UnicodeDecodeError):
        return number if number == 0 else pwd.getpwnam(name.decode()).pw_uid
    return number


def group_number(name: bytes, number: int) -> int:
    """As :func:`user_number`, for a group."""
    with contextlib.suppress(KeyError, UnicodeDecodeError):
        return number if number == 0 else grp.getgrnam(name.decode()).gr_gid
    return number


def as_run_here(wish: Wish) -> Wish:
    """What is asked for, as far as who runs this may give it: owners and devices are root's."""
    root = os.geteuid() == 0
    umask = os.umask(0o077)
    os.umask(umask)
    return replace(
        wish,
        owner=wish.owner and root,
        devices=wish.devices and root,
        groups=None if root else frozenset({*os.getgroups(), os.getegid()}),
        umask=umask,
        user=os.geteuid(),
        user_group=os.getegid(),
    )
