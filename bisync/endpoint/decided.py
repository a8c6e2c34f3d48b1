"""Conflicts that a person decided, carried out on the side where the loser is."""

import os

from bisync.core.conflict import ConflictKind
from bisync.core.resolve import conflict_name
from bisync.errors import PathError
from bisync.fs.conflicts import Choice, Quarrel, Take
from bisync.fs.content import read_version
from bisync.fs.replica import Replica
from bisync.fs.restore import Restorer, parent_of


class Decided:
    """What was decided about conflicts of one pair of a root."""

    def __init__(self, replica: Replica, pair: int) -> None:
        self._replica, self._pair = replica, pair

    def carry_out(self, choice: Choice) -> str:
        """Bring the chosen version to its name; return why not, "" if done.

        What the conflict was is taken from the own list, whoever asks.
        """
        r = self._replica
        known = [q for q in r.conflicts.rows(self._pair) if q.id == choice.quarrel.id]
        if not known:
            return "it is not on this side's list"
        q = known[0]
        restorer = Restorer(r.root, r.index, r.stage, r.store, self._pair)
        try:
            if q.kept_as is not None:
                self._settle_copy(restorer, q, choice.take)
            elif q.loser is not None and choice.take is not Take.LIVE:
                kept = q.kept or r.store.find(q.path, q.digest)
                if kept is None:
                    return "its loser is not in the store any more"
                path = q.path
                if choice.take is Take.BOTH:
                    path = self._free_path(q)
                reason = "conflict resolved: the kept version was taken"
                over_directory = q.kind == ConflictKind.TYPE.value
                restorer.put_back(kept, path, reason, over_directory=over_directory)
        except PathError as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _settle_copy(self, restorer: Restorer, q: Quarrel, take: Take) -> None:
        """Both versions are in the tree; the one that was not taken leaves it.

        May be done again after it was stopped anywhere: what is live is looked at first.
        """
        assert q.kept_as is not None
        if take is Take.BOTH:
            return
        restorer.refuse_writers(q.path, q.kept_as)
        if take is Take.KEPT and not self._is_live(q):
            restorer.swap(q.path, q.kept_as)
        restorer.retire(q.kept_as, "conflict resolved: the other version was taken")

    def _is_live(self, q: Quarrel) -> bool:
        """Whether the loser has the name already."""
        if q.digest is None:
            return False
        with parent_of(self._replica.root.fd, q.path) as (dir_fd, name):
            return read_version(dir_fd, name).digest.hex() == q.digest

    def _free_path(self, q: Quarrel) -> bytes:
        """Where the loser can stay beside the winner."""
        folder, slash, name = q.path.rpartition(b"/")
        attempt = 0
        while True:
            copy = conflict_name(name, q.loser_replica[:7], q.mtime_ns, attempt)
            path = folder + slash + copy
            with parent_of(self._replica.root.fd, path) as (dir_fd, base):
                try:
                    os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
                except FileNotFoundError:
                    return path
            attempt += 1
