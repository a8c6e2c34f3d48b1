"""What a session did since its start."""

from msgspec import Struct

from bisync.session.report import Report


class Totals(Struct):
    """Counts of all runs together; entries unless the name says bytes."""

    runs: int = 0
    created: int = 0
    updated: int = 0
    moves: int = 0
    deleted: int = 0
    kept: int = 0
    conflicts: int = 0  # that were decided; one that waits is met by each run
    bytes_sent: int = 0
    bytes_received: int = 0
    literal_bytes: int = 0
    matched_bytes: int = 0
    files_scanned: int = 0
    presumed: int = 0

    def add(self, report: Report) -> None:
        """One more run."""
        self.runs += 1
        for name in self.__struct_fields__[1:]:
            setattr(self, name, getattr(self, name) + getattr(report, name))
        self.conflicts -= report.waiting

    def report(self, elapsed_s: float, last: Report, *, withheld: int, problems: int) -> Report:
        """All runs as one.

        Args:
            last: run, for what still waits.
            withheld: deletions that wait.
            problems: that are still there.
        """
        found = Report(
            elapsed_s=round(elapsed_s, 3),
            withheld=withheld,
            problems=problems,
            waiting=last.waiting,
            busy=last.busy,
            skipped=last.skipped,
        )
        for name in self.__struct_fields__[1:]:
            setattr(found, name, getattr(self, name))
        found.conflicts += last.waiting
        return found
