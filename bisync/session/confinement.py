"""What who drives an agent may not go beyond, whatever is asked for."""

import os

from msgspec import Struct

from bisync.core.filters import Filters, PerDirectory
from bisync.core.path import STATE_DIR, valid_name
from bisync.endpoint.service import ANYTHING, Policy
from bisync.errors import UsageError
from bisync.fs.root import enclosing_root


class Confinement(Struct, frozen=True, kw_only=True):
    """What the one who drives may not go beyond, whatever is asked for."""

    root: bytes | None = None  # only this directory; None: any that the user may go to
    policy: Policy = ANYTHING

    def locate(self, path: bytes) -> bytes:
        """The directory that a path of the other end means here.

        Raises:
            UsageError: it is outside.
        """
        if self.root is None:
            return path  # as it was spelled: a link in the place of a root is looked at
        if os.path.realpath(path) != os.path.realpath(self.root):
            raise UsageError(f"{os.fsdecode(path)}: this agent serves one directory only")
        return self.root

    def locate_below(self, path: bytes) -> bytes:
        """As :meth:`locate`, or something in that directory that is no state and no other root."""
        if self.root is None:
            return path
        try:
            root, real = os.path.realpath(self.root), os.path.realpath(path)
        except OSError as error:
            raise UsageError(f"{os.fsdecode(path)}: {error.strerror}") from error
        inside = real[len(root.rstrip(b"/")) :].split(b"/")
        if real != root and not real.startswith(root.rstrip(b"/") + b"/"):
            raise UsageError(f"{os.fsdecode(path)}: this agent serves one directory only")
        if STATE_DIR in inside:
            raise UsageError(f"{os.fsdecode(path)}: that is the engine's own")
        return path

    def locate_destination(self, path: bytes) -> bytes:
        """As :meth:`locate_below`, for something that is written: its state is that of the root."""
        found = self.locate_below(path)
        if self.root is not None:
            root, real = os.path.realpath(self.root), os.path.realpath(found)
            nested = real != root and os.path.lexists(real + b"/" + STATE_DIR)
            if nested or enclosing_root(root) is not None:
                raise UsageError(f"{os.fsdecode(path)}: another root begins there, or above")
        return found

    def refuse_filters(self, filters: Filters) -> None:
        """A rule whose files lie elsewhere would have them read."""
        if self.root is None:
            return
        for rule in filters.rules:
            if isinstance(rule, PerDirectory) and b"/" in rule.name:
                raise UsageError("this agent reads no files of filter rules from elsewhere")

    def refuse_backup_dir(self, destination: bytes, text: bytes | None) -> None:
        """A place for backups has to lie below the destination, by its very name."""
        if self.root is None or text is None:
            return
        real = os.path.realpath(destination)
        path = real + b"/" + text
        if not all(map(valid_name, text.split(b"/"))) or os.path.realpath(path) != path:
            raise UsageError(f"--backup-dir {os.fsdecode(text)}: this agent keeps them below DST")
        if STATE_DIR in text.split(b"/"):
            raise UsageError(f"--backup-dir {os.fsdecode(text)}: that is the engine's own")
