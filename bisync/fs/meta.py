"""Attributes of one object: read them all, set those that differ.

Always through a descriptor or a name in a held directory, never through a link.
"""

import errno
import os
import stat
from collections.abc import Callable

from bisync.core.node import ACL_NAMES, Attributes, Kind, XAttrs
from bisync.errors import PathError

_KINDS = {
    stat.S_IFDIR: Kind.DIR,
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}
# What belongs to one machine or one file system and never travels.
_LOCAL_XATTRS = (b"system.", b"btrfs.", b"security.selinux", b"security.ima", b"security.evm")
_NO_XATTRS = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENODATA)
_BROKEN = (errno.EROFS, errno.EIO)
_NOT_NOW = (*_BROKEN, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)  # it may work later: a problem


def kind_of(mode: int) -> Kind:
    """The kind in a ``st_mode``."""
    return _KINDS[stat.S_IFMT(mode)]


def proc_path(fd: int, name: bytes = b"") -> bytes:
    """A path that leads to a descriptor's object, or to a name in its directory."""
    return b"/proc/self/fd/%d/%s" % (fd, name) if name else b"/proc/self/fd/%d" % fd


def read_xattrs(dir_fd: int, name: bytes) -> tuple[XAttrs, XAttrs]:
    """Extended attributes that travel, and the ACLs, of a name in a directory.

    ``name`` empty: of the directory itself. Links are not followed. A mode that an ACL
    merely repeats has no ACL.
    """
    path = proc_path(dir_fd, name)
    follow = not name
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return (), ()
        raise
    if not names:
        return (), ()
    xattrs: list[tuple[bytes, bytes]] = []
    acl: list[tuple[bytes, bytes]] = []
    for text in names:
        attribute = os.fsencode(text)
        is_acl = attribute in ACL_NAMES
        if not is_acl and attribute.startswith(_LOCAL_XATTRS):
            continue
        try:
            value = os.getxattr(path, attribute, follow_symlinks=follow)
        except OSError as error:
            if error.errno in _NO_XATTRS:
                continue
            raise
        (acl if is_acl else xattrs).append((attribute, value))
    return tuple(sorted(xattrs)), tuple(sorted(acl))


def owned_like(fd: int, model: int) -> None:
    """Give what root made in a user's state or store to that user, who goes on with it."""
    if os.geteuid() == 0:
        info = os.fstat(model)
        if info.st_uid:
            os.fchown(fd, info.st_uid, info.st_gid)


def attributes_of(info: os.stat_result, xattrs: XAttrs, acl: XAttrs) -> Attributes:
    """Attributes from a stat result and what :func:`read_xattrs` returned."""
    return Attributes(
        stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns, xattrs, acl
    )


def apply_attributes(
    dir_fd: int, name: bytes, kind: Kind, now: Attributes, wanted: Attributes
) -> list[str]:
    """Set what differs; return what could not be set, in words.

    Owner first (it clears set-id bits), then extended attributes and ACLs, then the mode,
    the time last. ``name`` empty means the directory ``dir_fd`` itself.

    Raises:
        PathError: nothing can be set at all (immutable, read-only).
    """
    if now == wanted:
        return []
    if kind is Kind.SYMLINK:
        return _apply_to_symlink(dir_fd, name, now, wanted)
    if not name:
        return _apply(proc_path(dir_fd), now, wanted)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if kind_of(os.fstat(fd).st_mode) is not kind:
            raise PathError("its kind changed")
        return _apply(proc_path(fd), now, wanted)
    finally:
        os.close(fd)


def _try(
    missed: list[str], what: str, call: Callable[[], None], fatal: tuple[int, ...] = _NOT_NOW
) -> None:
    try:
        call()
    except OSError as error:
        if error.errno in fatal:
            raise
        missed.append(f"{what}: {error.strerror}")


def _apply(path: bytes, now: Attributes, wanted: Attributes) -> list[str]:
    missed: list[str] = []
    mode_known = now.mode
    if now.uid != wanted.uid:
        _try(missed, "owner", lambda: os.chown(path, wanted.uid, -1))
        mode_known = -1
    if now.gid != wanted.gid:
        _try(missed, "group", lambda: os.chown(path, -1, wanted.gid))
        mode_known = -1
    _apply_xattrs(missed, path, now.xattrs, wanted.xattrs)
    if now.acl != wanted.acl:
        _apply_xattrs(missed, path, now.acl, wanted.acl)
        mode_known = -1
    if mode_known != wanted.mode:
        _try(missed, "mode", lambda: os.chmod(path, wanted.mode))
    times = (wanted.mtime_ns, wanted.mtime_ns)
    _try(missed, "time", lambda: os.utime(path, ns=times))
    return missed


def _apply_xattrs(missed: list[str], path: bytes, now: XAttrs, wanted: XAttrs) -> None:
    have, want = dict(now), dict(wanted)
    for name in sorted(have.keys() - want.keys()):
        _try(missed, name.decode("utf-8", "replace"), lambda n=name: os.removexattr(path, n))  # type: ignore[misc]
    for name, value in sorted(want.items()):
        if have.get(name) != value:
            _try(
                missed,
                name.decode("utf-8", "replace"),
                lambda n=name, v=value: os.setxattr(path, n, v),  # type: ignore[misc]
                fatal=_BROKEN,  # "no space" also says that it is too large for this file system
            )


def _apply_to_symlink(dir_fd: int, name: bytes, now: Attributes, wanted: Attributes) -> list[str]:
    missed: list[str] = []
    if (now.uid, now.gid) != (wanted.uid, wanted.gid):
        owner = (wanted.uid, wanted.gid)
        _try(
            missed,
            "owner",
            lambda: os.chown(name, *owner, dir_fd=dir_fd, follow_symlinks=False),
        )
    times = (wanted.mtime_ns, wanted.mtime_ns)
    _try(missed, "time", lambda: os.utime(name, ns=times, dir_fd=dir_fd, follow_symlinks=False))
    return missed
