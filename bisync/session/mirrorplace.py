"""Where a mirror's destination is, found by rsync's rules, and what it must not overlap."""

import os
import stat

from msgspec import Struct

from bisync.core.path import STORE_DIR, valid_name
from bisync.endpoint.interface import Tree
from bisync.errors import UsageError
from bisync.fs.root import OPEN_DIR, enclosing_root
from bisync.fs.starts import identity_of
from bisync.session.mirrorconfig import MirrorConfig


class MirrorPlace(Struct, frozen=True):
    """Where the destination is: a folder of a root, and the name of a single file in it."""

    root: bytes
    below: bytes
    name: bytes | None = None

    @property
    def folder(self) -> bytes:
        """The folder's own path."""
        return os.path.join(self.root, self.below) if self.below else self.root


def find_place(text: bytes, tree: Tree, config: MirrorConfig, *, dry: bool) -> MirrorPlace | None:
    """Find the destination, and make it if only its last component is missing.

    Returns:
        ``None`` where a dry run would have to make it first.

    Raises:
        UsageError: it cannot be a destination.
    """
    if not text:
        raise UsageError("an empty destination; give a path")
    many = text.endswith(b"/") or not tree.is_single_file()
    name = None
    try:
        info = os.stat(text)
    except FileNotFoundError:
        info = None
    except OSError as error:
        raise UsageError(f"{os.fsdecode(text)}: {error.strerror}") from error
    if info is None and not many:
        text, name = os.path.split(text)
        text = text or b"."
        if not os.path.isdir(text):
            raise UsageError(f"{os.fsdecode(text)}: no such directory; make it first")
    elif info is None:
        if dry:
            return None
        _make(text, tree, config)
    elif not stat.S_ISDIR(info.st_mode):
        if many:
            raise UsageError(f"{os.fsdecode(text)}: not a directory; give one for several files")
        text, name = os.path.split(text)
        text = text or b"."
    real = os.path.realpath(text)
    above = enclosing_root(real)
    if above is None or os.path.lexists(real + b"/.bisync/replica"):
        return MirrorPlace(real, b"", name)
    return MirrorPlace(above, real[len(above.rstrip(b"/")) + 1 :], name)


def _make(text: bytes, tree: Tree, config: MirrorConfig) -> None:
    mode = 0o777 if tree.root is None else tree.root.attributes.mode & 0o777
    if tree.root is not None:
        mode = config.wish.chmod.apply(mode, is_dir=True) & 0o777
    try:
        os.mkdir(text.rstrip(b"/"), mode)
    except OSError as error:
        raise UsageError(f"{os.fsdecode(text)}: cannot make it: {error.strerror}") from error


def refuse_overlap(sources: list[bytes], place: MirrorPlace, config: MirrorConfig) -> None:
    """Refuse a destination inside a source, and a source that ``--delete`` could remove.

    Raises:
        UsageError: they overlap.
    """
    folder = place.folder
    for text in sources:
        real = os.path.realpath(text)
        if real == folder and place.name is None:
            raise UsageError(f"{os.fsdecode(text)}: source and destination are the same")
        if folder.startswith(real.rstrip(b"/") + b"/") and os.path.isdir(real):
            inner = folder[len(real.rstrip(b"/")) + 1 :]
            if not config.filters.hides(inner, is_dir=True):
                raise UsageError(
                    f"the destination lies inside the source {os.fsdecode(text)}; "
                    f"exclude it: --exclude=/{os.fsdecode(inner)}"
                )
        inside = real.startswith(folder.rstrip(b"/") + b"/")
        store = folder.rstrip(b"/") + b"/" + STORE_DIR + b"/"
        if inside and config.wish.delete and not real.startswith(store):
            raise UsageError(
                f"the source {os.fsdecode(text)} lies inside the destination, and --delete "
                "could remove it; leave --delete out or move it"
            )


def refuse_own_source(folder: bytes, identities: set[str]) -> None:
    """Refuse a destination inside a source that was reached as if on another machine.

    Raises:
        UsageError: it is one of these directories, or below one.
    """
    path = os.path.realpath(folder)
    while True:
        try:
            fd = os.open(path, OPEN_DIR)
        except OSError:
            fd = -1  # nobody may look there, so no source of this user's is there either
        if fd >= 0:
            try:
                inside = identity_of(fd) in identities
            finally:
                os.close(fd)
            if inside:
                raise UsageError(
                    f"the destination {os.fsdecode(folder)} lies inside the source, which is on "
                    "this machine"
                )
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


def backup_place(text: bytes, place: MirrorPlace) -> tuple[bytes, str]:
    """The store and its folder for ``--backup-dir``: a dated one of a store is that store's.

    Raises:
        UsageError: it is no folder for backups.
    """
    path = os.path.normpath(os.path.join(place.folder, text))
    store, _, day = path.rpartition(b"/")
    if not store.endswith(b"/" + STORE_DIR):
        store, day = path, b""
    if path == place.folder:
        raise UsageError("--backup-dir: it is the destination itself; give a folder")
    root = place.root.rstrip(b"/") + b"/"
    if store.startswith(root):
        inside = store[len(root) :]
        if not all(map(valid_name, inside.split(b"/"))):
            raise UsageError(f"--backup-dir {os.fsdecode(text)}: not a path")
        return inside, os.fsdecode(day)
    return store, os.fsdecode(day)
