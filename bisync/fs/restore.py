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

from bisync.core.path import valid_name
from bisync.errors import BusyError, PathError, StaleError
from bisync.fs.copying import copy_object
from bisync.fs.database import Database
from bisync.fs.look import hold
from bisync.fs.root import OPEN_DIR, Root
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.lease import Lease, is_breaking
from bisync.linux.rename import exchange, rename_noreplace


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

    def __init__(self, root: Root, db: Database, stage: Stage, store: Store, pair: int) -> None:
        self.root = root
        self.db = db
        self.stage = stage
        self.store = store
        self.pair = pair

    def put_back(self, kept: bytes, path: bytes, reason: str) -> None:
        """Place a copy of a kept file or symlink at ``path``; what is there goes to the store.

        Raises:
            PathError: the kept version is gone or no file; nothing happened.
            BusyError: somebody can write to what is there.
        """
        name = self._copy_of(kept)
        incoming = self.stage.incoming
        handle = self.root.handles.read(incoming, name)
        done = self._log({"op": "Restore", "in": name.decode(), "handle": handle.hex(),
                          "path": path.decode("latin-1")})  # fmt: skip
        try:
            with parent_of(self.root.fd, path) as (dir_fd, base):
                if self._arrive(name, dir_fd, base):
                    record = {"reason": reason, "conflict": False, "digest": None}
                    self._keep(incoming, name, path, record)
                os.fsync(dir_fd)
        except (PathError, OSError):
            if self.root.handles.read(incoming, name) == handle:
                self.stage.discard(name)
            raise
        finally:
            self._unlog(done)

    def retire(self, path: bytes, reason: str) -> None:
        """Take what is at ``path`` out of the tree and into the store.

        Raises:
            StaleError: nothing is there.
            BusyError: somebody can write to it.
        """
        out = Stage.name()
        done = self._log({"op": "Retire", "out": out.decode(), "path": path.decode("latin-1")})
        try:
            with parent_of(self.root.fd, path) as (dir_fd, base), hold(dir_fd, base) as held:
                if held.lease is Lease.REFUSED:
                    raise BusyError("somebody has it open for writing")
                rename_noreplace(dir_fd, base, self.stage.displaced, out)
                record = {"reason": reason, "conflict": False, "digest": None}
                try:
                    self._keep(self.stage.displaced, out, path, record)
                except PathError:
                    rename_noreplace(self.stage.displaced, out, dir_fd, base)
                    raise
                os.fsync(dir_fd)
        except FileNotFoundError as error:
            raise StaleError("it is not there any more") from error
        finally:
            self._unlog(done)

    def swap(self, one: bytes, two: bytes) -> None:
        """Exchange two names in one step."""
        with (
            parent_of(self.root.fd, one) as (one_dir, one_name),
            parent_of(self.root.fd, two) as (two_dir, two_name),
        ):
            exchange(one_dir, one_name, two_dir, two_name)
            os.fsync(one_dir)
            os.fsync(two_dir)

    # -- parts ---------------------------------------------------------------

    def _arrive(self, name: bytes, dir_fd: int, base: bytes) -> bool:
        """Bring a staged object to its name; whether something came out of it."""
        incoming = self.stage.incoming
        try:
            rename_noreplace(incoming, name, dir_fd, base)
            return False
        except FileExistsError:
            pass
        with hold(dir_fd, base) as held:
            if held.lease is Lease.REFUSED:
                raise BusyError("somebody has it open for writing")
            before = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
            exchange(incoming, name, dir_fd, base)
            after = os.stat(name, dir_fd=incoming, follow_symlinks=False)
            same = all(
                getattr(before, field) == getattr(after, field)
                for field in ("st_ino", "st_size", "st_mtime_ns")
            )
            if not same or (held.lease is Lease.GRANTED and is_breaking(held.fd)):
                exchange(incoming, name, dir_fd, base)
                raise StaleError("somebody changed it at the same moment")
        return True

    def _keep(self, dir_fd: int, name: bytes, path: bytes, record: dict[str, Any]) -> None:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        shared = stat.S_ISREG(info.st_mode) and info.st_nlink > 1
        self.store.keep(dir_fd, name, path, record, copy=shared)
        self.store.flush()

    def _copy_of(self, kept: bytes) -> bytes:
        """A durable copy of a kept object in the stage."""
        try:
            fd, base = self.store.open_kept(kept)
        except OSError as error:
            raise PathError(f"the kept version cannot be opened: {error.strerror}") from error
        try:
            info = os.stat(base, dir_fd=fd, follow_symlinks=False)
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode)):
                raise PathError("only files and symlinks can be put back by name")
            name = Stage.name()
            copy_object(fd, base, self.stage.incoming, name)
            return name
        except FileNotFoundError as error:
            raise PathError("the kept version is gone") from error
        except OSError as error:
            raise PathError(f"no copy of the kept version: {error.strerror}") from error
        finally:
            os.close(fd)

    def _log(self, row: dict[str, Any]) -> int:
        sql = "INSERT INTO result(pair, done, payload) VALUES(?, 0, ?)"
        self.db.begin()
        row = {"keys": [], "node": 0, "digest": None, "size": 0, **row}
        seq = self.db.execute(sql, (self.pair, json.dumps(row))).lastrowid
        self.db.commit()
        return int(seq or 0)

    def _unlog(self, seq: int) -> None:
        self.db.begin()
        self.db.execute("DELETE FROM result WHERE seq=?", (seq,))
        self.db.commit()
