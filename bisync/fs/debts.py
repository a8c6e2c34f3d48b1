"""What the versions of hot files cost: kept in the state, so that every run of a timer knows it."""

import time
from typing import TYPE_CHECKING

from bisync.core.hot import Allowance, Cost, Debt, owes_more, taken, wait_s
from bisync.core.node import NodeId
from bisync.errors import BusyError
from bisync.fs.database import Database
from bisync.linux.lease import Lease, probed

if TYPE_CHECKING:
    from bisync.fs.bigfile import Comparer, Lister


class Debts:
    """Those of one replica."""

    def __init__(self, db: Database, allowance: Allowance | None) -> None:
        """``allowance``: ``None``: hot files may cost anything."""
        self._db, self._allowance = db, allowance

    def ask(self, node: NodeId, dir_fd: int, name: bytes) -> None:
        """Ask whether a version of a big file may be read now; one that was closed may always be.

        Raises:
            BusyError: its writer has to be spared for a while.
        """
        debt = self._debt(node)
        if debt is None or self._allowance is None:
            return
        try:
            with probed(dir_fd, name) as (_, lease):
                closed = lease is Lease.GRANTED
        except OSError:
            return  # whoever reads it meets that, too, and says so
        if closed:
            self._db.begin()
            self._db.execute("DELETE FROM hot WHERE node=?", (node,))
            return
        wait = wait_s(debt, time.time_ns(), self._allowance)
        if wait > 0:
            raise BusyError(
                "it is written to and never closed; its next version is taken in "
                f"{max(1, round(wait))} s, to spare who writes"
            )

    def pay(self, node: NodeId, began: float, lister: "Lister | Comparer") -> None:
        """A version was taken of a file that has a writer; ``began``: by the monotonic clock."""
        if self._allowance is None:
            return
        clone_s, many = getattr(lister, "clone_s", 0.0), getattr(lister, "many_extents", False)
        cost = Cost(time.monotonic() - began, clone_s, many)
        debt = self._debt(node) or Debt()
        self._save(node, taken(debt, cost, time.time_ns(), self._allowance))

    def pay_more(self, node: NodeId, began: float) -> None:
        """The version was sent, too."""
        debt = self._debt(node)
        if debt is not None:
            self._save(node, owes_more(debt, time.monotonic() - began))

    def _debt(self, node: NodeId) -> Debt | None:
        row = self._db.execute(
            "SELECT debt_s, at_ns, interval_s FROM hot WHERE node=?", (node,)
        ).fetchone()
        return None if row is None else Debt(*row)

    def _save(self, node: NodeId, debt: Debt) -> None:
        self._db.begin()
        row = node, debt.debt_s, debt.at_ns, debt.interval_s
        self._db.execute("INSERT OR REPLACE INTO hot VALUES(?,?,?,?)", row)
