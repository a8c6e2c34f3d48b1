"""Finish what was done in part of files that belong together, after a crash.

Before anybody opens them they become what they all were, or what they all are to be.
"""

import contextlib
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from bisync.core.node import NodeId, Place
from bisync.errors import PathError, StaleError
from bisync.fs.index import NO_STAMP
from bisync.fs.log import place_from_row
from bisync.fs.look import Looker, hold, look_through
from bisync.fs.replica import Replica
from bisync.linux.lease import Lease
from bisync.linux.rename import rename_noreplace, swap

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""A step in the log; see :mod:`bisync.fs.log`."""
_There = tuple[list[Any] | None, Place | None]  # what is at a place, and where it is as yet


class Steps(Protocol):
    """What recovery knows of single steps."""

    def was_performed(self, row: Row) -> bool:
        """Whether a step was."""
        ...

    def bind(self, row: Row) -> None:
        """Tell the index which object a step put into place."""
        ...

    def spot(self, row: Row) -> tuple[int, bytes]:
        """Where a step's new object waits."""
        ...

    def finish_move_over(self, row: Row) -> None:
        """Take out what a move swapped itself with, if it came no further."""
        ...

    def to_store(self, dir_fd: int, name: bytes, row: Row) -> None:
        """Bring what a step takes away to the store."""
        ...


class Finisher:
    """Finishes the steps of one log; use :meth:`run`."""

    def __init__(self, replica: Replica, look: Looker, steps: Steps) -> None:
        self._directories, self._index = replica.directories, replica.index
        self._look, self._steps = look, steps
        self._times: dict[str, set[int]] = defaultdict(set)  # that steps set, by identity

    def run(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Finish what can be.

        Only what can be finished for all of its files: where somebody was faster, the next plan
        decides.

        Args:
            rows: steps that are not known to be done, with their pairs, in order.
        """
        groups: dict[tuple[int, int], list[Row]] = {}
        for pair, row in rows:
            if "with" not in row:
                continue
            if row["op"] != "SetAttributes":
                groups.setdefault((pair, row["with"]), []).append(row)
            elif (known := self._index.identity(row["node"])) is not None:
                self._times[known[0].hex()].add(row["mtime"])
        if not groups:
            return
        made = [r for _, r in rows if r["op"] == "Make" and r.get("digest") is None and "in" in r]
        self._find_directories(made, set())
        begun = [group for group in groups.values() if any(self._performed(group))]
        needed = {row["at"][0][0] for group in begun for row in group if row["op"] == "Make"}
        for row in reversed(made):
            if row["node"] in needed:
                needed.add(row["at"][0][0])
        self._find_directories(made, needed)
        for group in begun:
            self._finish(group)

    def _finish(self, rows: list[Row]) -> None:
        # What was taken out never comes back: if all are done it is not part of it any more, and if
        # somebody worked with what was there it would not fit any more.
        for row in rows:
            row["astray"] = True
        performed = self._performed(rows)
        left = [row for row, done in zip(rows, performed, strict=True) if not done]
        try:
            for row, done in zip(rows, performed, strict=True):
                if done and row["op"] == "Move":
                    self._steps.finish_move_over(row)
            if left and self._is_untouched(rows) and self._can_follow(left):
                for row in left:
                    self._follow(row, rows)
        except (PathError, OSError) as error:
            log.warning("database-not-finished path=%s reason=%s", rows[0].get("path"), error)

    def _find_directories(self, rows: list[Row], needed: set[NodeId]) -> None:
        """Steps may be about places in directories that are made with them.

        Args:
            needed: directories that are made if they are not there yet.
        """
        for row in rows:
            place = place_from_row(row["at"][0])
            if not self._steps.was_performed(row):
                if row["node"] not in needed or not self._make(row, place):
                    continue
            elif not _is_directory(*self._directories.at(place)):
                continue
            self._steps.bind(row)
            self._index.put_name(place, row["node"], NO_STAMP)

    def _make(self, row: Row, place: Place) -> bool:
        try:
            spot, target = self._steps.spot(row), self._directories.at(place)
            if self._look.handle(*spot) != handle_in(row) or not _is_directory(*spot):
                return False
            rename_noreplace(*spot, *target)
            os.fsync(target[0])
        except (PathError, OSError) as error:
            log.info("directory-not-made path=%s reason=%s", row.get("path"), error)
            return False
        return True

    def _performed(self, rows: list[Row]) -> list[bool]:
        """Which steps were: also a move of what was replaced at its new place since."""
        found: list[bool] = []
        replaced: set[int] = set()
        for row in reversed(rows):
            if row["op"] == "Link":
                now = self._state_at(place_from_row(row["at"][0]))
                done = row["linked"] is not None and now is not None and now[0] == row["linked"][0]
            else:
                done = row["node"] in replaced or self._steps.was_performed(row)
            if done and row["op"] == "Replace":
                replaced.add(row["node"])
            found.append(done)
        return found[::-1]

    def _is_untouched(self, rows: list[Row]) -> bool:
        """Whether each file of a database is what it was before some step of it, or is after."""
        found: dict[Place, list[list[Any] | None]] = defaultdict(list)
        for row in rows:
            for place, state in row["before"]:
                found[place_from_row(place)].append(state)
        for row in rows:
            after: list[tuple[list[Any], list[Any] | None]]
            match row["op"]:
                case "Remove" | "Unlink":
                    after = [(row["from"], None)]
                case "Link":
                    after = [(row["at"][0], row["linked"])]
                case "Make" | "Replace":
                    after = [(row["at"][0], [row["handle"], row["size"], row["mtime"]])]
                    if "keep" in row:
                        after.append((row["keep"], row["old"]))
                case "Move" if row["was"] is not None:
                    after = [(row["was"], None), (row["at"][0], row["old"])]
                    if "displaces" in row:  # swapped, and not taken out yet
                        after.append((row["was"], row.get("gone")))
                case "Exchange":
                    after = [(row["at"][0], row["old"]), (row["other_at"], row.get("gone"))]
                case _:
                    return False
            for place, state in after:
                if place_from_row(place) in found:  # the shared memory counts for nothing
                    found[place_from_row(place)].append(state)
        return all(
            any(self._is_same(self._state_at(place), state) for state in states)
            for place, states in found.items()
        )

    def _is_same(self, now: list[Any] | None, state: list[Any] | None) -> bool:
        """Whether an object is what it was, but for a time that a step set."""
        if now is None or state is None or now == state:
            return now == state
        return now[:2] == state[:2] and now[2] in self._times[now[0]]

    def _state_at(self, place: Place) -> list[Any] | None:
        try:
            spot = self._directories.at(place)
            info = self._look.stat(*spot)
            if not stat.S_ISREG(info.st_mode):
                return [self._look.handle(*spot).hex(), 0, 0]
            return [self._look.handle(*spot).hex(), info.st_size, info.st_mtime_ns]
        except (StaleError, FileNotFoundError):
            return None

    def _can_follow(self, rows: list[Row]) -> bool:
        """Whether steps can still be done, in their order: what each needs is there."""
        now: dict[Place, _There] = {}

        def at(place: Place) -> _There:
            return now.get(place) or (self._state_at(place), place)

        after: _There
        for row in rows:
            match row["op"]:
                case "Make" | "Replace" if len(row["at"]) == 1:
                    place = place_from_row(row["at"][0])
                    if self._look.handle(*self._steps.spot(row)) != handle_in(row):
                        return False
                    after = [row["handle"], row["size"], row["mtime"]], None
                    before = row.get("gone") if row["op"] == "Make" else row["old"]
                    if "keep" in row:
                        keep = place_from_row(row["keep"])
                        kept = at(keep)[0]
                        if kept is not None and not self._is_same(kept, before):
                            return False
                        now[keep] = before, place
                case "Remove" | "Unlink":
                    place, after, before = place_from_row(row["from"]), (None, None), row["old"]
                case "Link":
                    place, after, before = place_from_row(row["at"][0]), (row["linked"], None), None
                case "Move" | "Exchange" if row.get("was", row.get("other_at")) is not None:
                    was = place_from_row(row["was"] if row["op"] == "Move" else row["other_at"])
                    place, after, before = place_from_row(row["at"][0]), at(was), row.get("gone")
                    if after[0] is None or not self._is_same(after[0], row["old"]):
                        return False
                    now[was] = at(place) if row["op"] == "Exchange" else (None, None)
                case _:
                    return False
            there, yet = at(place)
            if not self._is_same(there, before):
                return False
            if row.get("members") is not None and yet is not None:
                spot = self._directories.at(yet)
                if _is_directory(*spot):  # nobody's new file goes with it
                    look_through(self._look, *spot, row["node"], set(row["members"]))
            if before is not None and yet is not None:
                with hold(*self._directories.at(yet)) as held:
                    if held.lease is Lease.REFUSED:
                        return False
            now[place] = after
        return True

    def _found(self, handle: str, rows: list[Row]) -> tuple[int, bytes]:
        """Where an object of a database is now."""
        places = [place_from_row(place) for row in rows for place in row.get("at", ())]
        places += [place_from_row(row["was"]) for row in rows if row.get("was") is not None]
        places += self._index.places_of_handle(bytes.fromhex(handle))
        for place in places:
            state = self._state_at(place)
            if state is not None and state[0] == handle:
                return self._directories.at(place)
        raise StaleError("what it is a name of is gone")

    def _follow(self, row: Row, rows: list[Row]) -> None:
        """Do a step; what it displaces goes to the store with the rest of the stage."""
        if row["op"] == "Link":
            dir_fd, name = self._directories.at(place_from_row(row["at"][0]))
            source_fd, source = self._found(row["linked"][0], rows)
            os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
            os.fsync(dir_fd)
        elif row["op"] == "Unlink":
            dir_fd, name = self._directories.at(place_from_row(row["from"]))
            if self._look.stat(dir_fd, name).st_nlink < 2:
                raise StaleError("its other names are gone")
            os.unlink(name, dir_fd=dir_fd)
        elif row["op"] == "Remove":
            dir_fd, name = self._directories.at(place_from_row(row["from"]))
            self._steps.to_store(dir_fd, name, row)
        elif row["op"] in ("Move", "Exchange"):
            old = place_from_row(row["was"] if row["op"] == "Move" else row["other_at"])
            old_fd, was = self._directories.at(old)
            dir_fd, name = self._directories.at(place_from_row(row["at"][0]))
            if row.get("gone") is None:
                rename_noreplace(old_fd, was, dir_fd, name)
            else:
                swap(old_fd, was, dir_fd, name)
                if row["op"] == "Move":
                    self._steps.to_store(old_fd, was, row)
            os.fsync(old_fd)
        else:
            dir_fd, name = self._directories.at(place_from_row(row["at"][0]))
            if "keep" in row:
                keep_fd, keep = self._directories.at(place_from_row(row["keep"]))
                with contextlib.suppress(FileExistsError):  # it came as far as that
                    os.link(
                        name, keep, src_dir_fd=dir_fd, dst_dir_fd=keep_fd, follow_symlinks=False
                    )
                os.fsync(keep_fd)
            move = rename_noreplace if row["op"] == "Make" and row.get("gone") is None else swap
            move(*self._steps.spot(row), dir_fd, name)
        os.fsync(dir_fd)


def handle_in(row: Row) -> bytes | None:
    """The identity of a step's new object; ``None`` while it is copied beside its target."""
    text = row.get("handle")
    return None if text is None else bytes.fromhex(text)


def _is_directory(dir_fd: int, name: bytes) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
