"""Which watcher: what was asked for, or the best that works here."""

from collections.abc import Callable
from enum import Enum

from bisync.errors import UsageError
from bisync.watch.interface import Scope, Sink, UnavailableError, Watcher


class Kind(Enum):
    """How to learn of changes."""

    AUTO = "auto"
    FANOTIFY = "fanotify"
    INOTIFY = "inotify"
    POLL = "poll"


def _makers(reasons: list[str]) -> dict[Kind, Callable[[Scope, Sink], Watcher]]:
    """The best first; ``reasons``: why not the others. Only who watches needs them."""
    from bisync.watch.fanotify import FanotifyWatcher  # noqa: PLC0415
    from bisync.watch.inotify import InotifyWatcher  # noqa: PLC0415
    from bisync.watch.poll import PollWatcher  # noqa: PLC0415

    return {
        Kind.FANOTIFY: FanotifyWatcher,
        Kind.INOTIFY: InotifyWatcher,
        Kind.POLL: lambda scope, sink: PollWatcher(scope, sink, reasons),
    }


def watch(kind: Kind, scope: Scope, sink: Sink) -> Watcher:
    """Begin to watch.

    Raises:
        UsageError: the kind that was asked for does not work here.
    """
    reasons: list[str] = []
    for each, make in _makers(reasons).items():
        if kind in (Kind.AUTO, each):
            try:
                return make(scope, sink)
            except UnavailableError as error:
                reasons.append(str(error))
    raise UsageError(f"--watcher {kind.value}: {'; '.join(reasons)}")
