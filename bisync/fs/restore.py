"""Put things back by path: a kept version to its name, a live one into the store.

Like a user's own edit, so the next scan carries it over; but captured: whatever loses its
name goes to the store, and a crash in between loses nothing (the result log names what lies
in the stage).
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bisync.core.path import TEMP_PREFIX, valid_name
from bisync.errors import BusyError, PathError, StaleError
from bisync.fs.copying import copy_object, remove_object
from bisync.fs.displaced import edited, remove_unused
from bisync.fs.index import Index
from bisync.fs.log import NOBODYS, note_stuck, place_to_row
from bisync.fs.look import hold
from bisync.fs.root import OPEN_DIR, Root
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.fs.takeback import Spot, swap_back
from bisync.linux.lease import Lease, is_breaking
from bisync.linux.rename import rename_noreplace, swap


@contextmanager
def parent_of(fd: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """The held directory and the name of a path below a descriptor; links are not followed.

    Raises:
        StaleError: a directory on the way is not there.
        PathError: the path is not one below the descriptor.
    """
    *parts, name = path.split(b"/")
    if not all(map(valid_name, (*parts, name))):
        raise PathError("not a path below the root")
    opened: list[int] = []
    try:
        for part in parts:
            try:
                fd = os.open(part, OPEN_DIR, dir_fd=fd)
            except OSError as error:
                raise StaleError(f"its directory cannot be opened: {error.strerror}") from error
            opened.append(fd)
        yield fd, name
    finally:
        for each in opened:
            os.close(each)


class Restorer:
    """Changes one tree by path. The log rows belong to ``pair``."""

    def __init__(self, root: Root, index: Index, stage: Stage, store: Store, pair: int) -> None:
        self.root = root
        self.index = index
        self.db = index.db
        self.stage = stage
        self.store = store
        self.pair = pair

    def put_back(self, kept: bytes, path: bytes, reason: str, *, over_directory: bool) -> None:
        """Place a copy of a kept file or symlink at ``path``; what is there goes to the store.

        Args:
            kept: its path below the store.
            path: below the root.
            reason: for the manifest.
            over_directory: replace a directory too, with all it holds.

        Raises:
            PathError: the kept version is gone or no file; nothing happened.
            BusyError: somebody can write to what is there.
        """
        with parent_of(self.root.fd, path) as (dir_fd, base):
            if not over_directory and _is_dir(dir_fd, base):
                raise PathError("a directory stands there now; move it away first")
            name = Stage.name()
            row: dict[str, Any] = {"op": "Restore", "in": name.decode(), "handle": None}
            row["path"] = path.decode("latin-1")
            spot = self.stage.incoming, name
            if os.fstat(dir_fd).st_dev != os.fstat(self.stage.incoming).st_dev:
                spot = dir_fd, TEMP_PREFIX + name  # no rename leads there from the stage
                above = self.index.nearest_directory(path.rpartition(b"/")[0])
                row["near"] = place_to_row((above, spot[1]))
            seq = self._log(row)
            try:
                self._bring(kept, spot, row, seq)
                if self._arrive(spot, (dir_fd, base), row):
                    record = {"reason": reason, "conflict": False, "digest": None}
                    try:
                        self._keep(*spot, path, record)
                    except (PathError, OSError):
                        self._take_back(spot, (dir_fd, base), row)
                        raise
                os.fsync(dir_fd)
            except (PathError, OSError):
                self._clear(spot, (dir_fd, base), row)
                os.fsync(dir_fd)  # what was taken back is, before the log forgets
                raise
            finally:
                self._unlog(seq)

    def _bring(self, kept: bytes, spot: Spot, row: dict[str, Any], seq: int) -> None:
        """Copy a kept object to where it waits; the log knows it before it is used."""
        self._copy_of(kept, spot)
        row["handle"] = self.root.handles.read(*spot).hex()
        info = os.stat(spot[1], dir_fd=spot[0], follow_symlinks=False)
        row["size"], row["mtime"] = info.st_size, info.st_mtime_ns
        self.db.begin()
        self.db.execute("UPDATE result SET payload=? WHERE seq=?", (_payload(row), seq))
        self.db.commit()

    def _take_back(self, spot: Spot, target: Spot, row: dict[str, Any]) -> bool:
        return swap_back(self.root.handles, spot, target, bytes.fromhex(row["handle"]))

    def _clear(self, spot: Spot, target: Spot, row: dict[str, Any]) -> None:
        """Remove a copy that kept no name; what is somebody's stays, and the log says where."""
        try:
            handle = self.root.handles.read(*spot).hex()
        except FileNotFoundError:
            return
        if row["handle"] is None:
            remove_object(*spot)
        elif handle != row["handle"]:
            self._let_wait(spot, row)
        elif not remove_unused(*spot, (row["size"], row["mtime"])):
            rename_noreplace(*spot, target[0], edited(target[1]))

    def _let_wait(self, spot: Spot, row: dict[str, Any]) -> None:
        """The store does not take what has no name any more: the next run tries again."""
        if "near" in row:
            where = {"near": row["near"]}
        elif spot[0] == self.stage.displaced:
            where = {"out": spot[1].decode("latin-1")}
        else:
            where = {"in": spot[1].decode("latin-1"), "handle": NOBODYS}
        self.db.begin()
        note_stuck(self.db, row["path"].encode("latin-1"), where)

    def retire(self, path: bytes, reason: str) -> None:
        """Take what is at ``path`` out of the tree and into the store.

        Raises:
            StaleError: nothing is there.
            BusyError: somebody can write to it.
        """
        out = Stage.name()
        row = {"op": "Retire", "out": out.decode(), "path": path.decode("latin-1")}
        done = self._log(row)
        try:
            with parent_of(self.root.fd, path) as (dir_fd, base), hold(dir_fd, base) as held:
                if held.lease is Lease.REFUSED:
                    raise BusyError("somebody has it open for writing")
                rename_noreplace(dir_fd, base, self.stage.displaced, out)
                record = {"reason": reason, "conflict": False, "digest": None}
                try:
                    self._keep(self.stage.displaced, out, path, record)
                except (PathError, OSError):
                    try:
                        rename_noreplace(self.stage.displaced, out, dir_fd, base)
                    except OSError:  # it is gone, or somebody saved another one meanwhile
                        self._let_wait((self.stage.displaced, out), row)
                    raise
                os.fsync(dir_fd)
        except FileNotFoundError as error:
            raise StaleError("it is not there any more") from error
        finally:
            self._unlog(done)

    def refuse_writers(self, *paths: bytes) -> None:
        """Make sure that nobody can write to any of these just now.

        Raises:
            BusyError: somebody can.
            StaleError: one of them is not there.
        """
        for path in paths:
            with parent_of(self.root.fd, path) as (dir_fd, name):
                try:
                    with hold(dir_fd, name) as held:
                        if held.lease is Lease.REFUSED:
                            raise BusyError("somebody has it open for writing")
                except FileNotFoundError as error:
                    raise StaleError("it is not there any more") from error

    def swap(self, one: bytes, two: bytes) -> None:
        """Exchange two names in one step."""
        with (
            parent_of(self.root.fd, one) as (one_dir, one_name),
            parent_of(self.root.fd, two) as (two_dir, two_name),
        ):
            swap(one_dir, one_name, two_dir, two_name)
            os.fsync(one_dir)
            os.fsync(two_dir)

    # -- parts ---------------------------------------------------------------

    def _arrive(self, spot: Spot, target: Spot, row: dict[str, Any]) -> bool:
        """Bring a waiting object to its name; whether something came out of it."""
        dir_fd, base = target
        try:
            rename_noreplace(*spot, dir_fd, base)
            return False
        except FileExistsError:
            pass
        with hold(dir_fd, base) as held:
            if held.lease is Lease.REFUSED:
                raise BusyError("somebody has it open for writing")
            before = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
            swap(*spot, dir_fd, base)
            after = os.stat(spot[1], dir_fd=spot[0], follow_symlinks=False)
            same = all(
                getattr(before, field) == getattr(after, field)
                for field in ("st_ino", "st_size", "st_mtime_ns")
            )
            if not same or (held.lease is Lease.GRANTED and is_breaking(held.fd)):
                self._take_back(spot, target, row)
                raise StaleError("somebody changed it at the same moment")
        return True

    def _keep(self, dir_fd: int, name: bytes, path: bytes, record: dict[str, Any]) -> None:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        shared = stat.S_ISREG(info.st_mode) and info.st_nlink > 1
        self.store.keep(dir_fd, name, path, record, copy=shared)
        self.store.flush()

    def _copy_of(self, kept: bytes, spot: tuple[int, bytes]) -> None:
        """A durable copy of a kept file or symlink."""
        try:
            fd, base = self.store.open_kept(kept)
        except OSError as error:
            raise PathError(f"the kept version cannot be opened: {error.strerror}") from error
        try:
            info = os.stat(base, dir_fd=fd, follow_symlinks=False)
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode)):
                raise PathError("only files and symlinks can be put back by name")
            copy_object(fd, base, *spot)
        except FileNotFoundError as error:
            raise PathError("the kept version is gone") from error
        except OSError as error:
            raise PathError(f"no copy of the kept version: {error.strerror}") from error
        finally:
            os.close(fd)

    def _log(self, row: dict[str, Any]) -> int:
        sql = "INSERT INTO result(pair, done, payload) VALUES(?, 0, ?)"
        self.db.begin()
        seq = self.db.execute(sql, (self.pair, _payload(row))).lastrowid
        self.db.commit()
        return int(seq or 0)

    def _unlog(self, seq: int) -> None:
        self.db.begin()
        self.db.execute("DELETE FROM result WHERE seq=?", (seq,))
        self.db.commit()


def _payload(row: dict[str, Any]) -> str:
    return json.dumps({"keys": [], "node": 0, "digest": None, "size": 0, **row})


def _is_dir(dir_fd: int, name: bytes) -> bool:
    try:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(info.st_mode)
