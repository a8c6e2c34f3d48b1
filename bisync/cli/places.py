"""Paths on the command line as paths below a root."""

import os

from bisync.core.path import parse
from bisync.errors import UsageError
from bisync.fs.statefolder import find_root


def root_and_path(text: str, root: str | None, state_dir: str | None) -> tuple[bytes, bytes]:
    """The root that a path belongs to, and the path below it ("" is the root itself).

    The path need not exist any more. With ``--root`` it may be given from there.

    Raises:
        UsageError: it is not below a root.
    """
    raw = parse(text)
    if root is not None:
        top = find_root(os.fsencode(root), state_dir)
        full = os.path.join(os.path.realpath(os.fsencode(root)), raw)
    else:
        full = os.path.join(os.getcwdb(), raw)
        top = _root_of(os.path.normpath(full), state_dir)
    folder, name = os.path.split(os.path.normpath(full))
    real = os.path.join(os.path.realpath(folder), name) if name else os.path.realpath(folder)
    if real.startswith(top.rstrip(b"/") + b"/"):
        return top, real[len(top.rstrip(b"/")) + 1 :]
    if top in (real, os.path.realpath(full)):
        return top, b""
    raise UsageError(f"{text}: not below the root {os.fsdecode(top)}")


def _root_of(path: bytes, state_dir: str | None) -> bytes:
    """The root of a path; of a symlink the one that it lies in, else the one it leads to."""
    if not os.path.islink(path):
        return find_root(path, state_dir)
    try:
        return find_root(os.path.dirname(path), state_dir)
    except UsageError:
        return find_root(path, state_dir)
