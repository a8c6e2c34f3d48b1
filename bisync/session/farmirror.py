"""A mirror whose destination is on another machine: the run is there, the source here.

All that a run compares lies at the destination; so it runs beside it, and only what the source has
crosses: its list, and the content that is missing.
"""

import os
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.chmod import Chmod, ChmodStep
from bisync.core.filters import Filters
from bisync.core.items import Item
from bisync.core.method import Apply
from bisync.core.node import Kind
from bisync.core.retention import Retention
from bisync.core.wish import Wish
from bisync.endpoint.channel import Channel
from bisync.endpoint.interface import Tree
from bisync.endpoint.trees import Order, TreeService
from bisync.errors import BisyncError, Interrupted, UsageError
from bisync.linux.accounts import as_run_here
from bisync.linux.limits import workers
from bisync.session.confinement import Confinement
from bisync.session.mirror import mirror_from
from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
from bisync.session.origin import FarOrigin, Origin
from bisync.session.report import Change, Event, Listener, Met, Progress
from bisync.wire.mirrorvalues import FILTERS, ITEM, WISH
from bisync.wire.schema import (
    Bool,
    Each,
    Int,
    Maybe,
    Member,
    OneOf,
    Plain,
    Record,
    Several,
    Table,
    Text,
)
from bisync.wire.values import LONG_PATH, REASON, RETENTION

RUN = 110
_PATH = LONG_PATH
_COUNT = Int(0)
_SOME = 2000  # items in one part


class _Asked(Struct, frozen=True, kw_only=True):
    """What is asked of a run at the other end."""

    destination: bytes
    dry: bool
    machine: str  # where the source is
    wish: Wish
    filters: Filters
    ignore_errors: bool
    max_delete: int | None
    yes: bool
    backup_dir: bytes | None
    keep: bool
    retention: Retention | None
    whole_files: bool
    apply: Apply
    fsync: bool
    numeric_ids: bool
    wait_ms: int | None  # for another engine that works there; None: while it lives


_ASKED = Record(
    _Asked,
    destination=_PATH,
    dry=Bool(),
    machine=Text(256),
    wish=WISH,
    filters=FILTERS,
    ignore_errors=Bool(),
    max_delete=Maybe(_COUNT),
    yes=Bool(),
    backup_dir=Maybe(_PATH),
    keep=Bool(),
    retention=Maybe(RETENTION),
    whole_files=Bool(),
    apply=Member(Apply),
    fsync=Bool(),
    numeric_ids=Bool(),
    wait_ms=Maybe(_COUNT),
)
_WORD = Text(64)
_EVENT = OneOf(
    {
        1: Record(
            Change,
            side=_WORD,
            action=_WORD,
            path=_PATH,
            reason=REASON,
            old_path=Maybe(_PATH),
            size=_COUNT,
        ),
        2: Record(Met, side=_WORD, kind=_WORD, path=_PATH, reason=REASON),
        3: Record(
            Progress,
            phase=_WORD,
            done=_COUNT,
            bytes=_COUNT,
            name=Text(),
            total=_COUNT,
            literal=_COUNT,
        ),
    }
)
_PART = Each((Maybe(_EVENT), Several(ITEM, 1 << 16)))
_COUNTERS = (
    "files_scanned", "moves", "literal_bytes", "matched_bytes", "created", "updated", "deleted",
    "kept", "withheld", "transferred_bytes", "transferred",
)  # fmt: skip
_DONE = Each(
    (
        Each((_COUNT,) * len(_COUNTERS)),
        Table(Member(Kind), _COUNT, 16),
        Table(Bool(), _COUNT, 2),
    )
)


def push(
    channel: Channel,
    origin: Origin,
    destination: bytes,
    config: MirrorConfig,
    listener: Listener,
    *,
    dry: bool,
) -> MirrorReport:
    """Run a mirror whose destination is at the other end.

    Raises:
        BisyncError: as :func:`bisync.session.mirror.mirror`; ``report`` is what was done.
    """
    report = MirrorReport()
    trees: list[Tree] = []

    def walk(_order: Order | None) -> Tree:
        tree = origin.walk(config)
        if not trees:
            report.listed = [seen for each in tree.listings for seen in each.entries]
            if tree.root is not None:
                report.listed.insert(0, tree.root)
        trees[:] = [tree]
        return tree

    def take(plain: Plain) -> None:
        event, items = _PART.unpack(plain)
        report.items += items
        said_before = isinstance(event, Met) and event.kind != "note" and not report.add(event)
        if event is not None and not said_before:
            listener(event)

    c = config
    asked = _Asked(
        destination=destination,
        dry=dry,
        machine=os.uname().nodename,
        wish=c.wish,
        filters=c.filters,
        ignore_errors=c.ignore_errors,
        max_delete=c.max_delete,
        yes=c.yes,
        backup_dir=c.backup_dir,
        keep=c.keep,
        retention=c.retention,
        whole_files=c.whole_files,
        apply=c.apply,
        fsync=c.fsync,
        numeric_ids=c.numeric_ids,
        wait_ms=None if c.wait_s is None else round(c.wait_s * 1000),
    )
    service = TreeService(walk, config.wish)
    channel.service = service
    try:
        counted, created, deleted = _DONE.unpack(channel.call(RUN, _ASKED.pack(asked), take))
        for name, count in zip(_COUNTERS, counted, strict=True):
            setattr(report, name, count)
        report.created_kinds, report.deleted_kinds = created, deleted
    except BisyncError as error:
        report.error, report.exit_code = str(error), error.exit_code
        if isinstance(error, Interrupted):
            report.exit_code = 128 + error.signum
        error.report = report  # type: ignore[attr-defined]
        raise
    finally:
        channel.service = None
        service.close()
        report.finish()
    return report


class MirrorService:
    """Runs a mirror here whose source is at the other end.

    Args:
        confinement: what may be asked for.
    """

    def __init__(
        self,
        channel: Channel,
        confinement: Confinement,
        stop: Callable[[], None],
    ) -> None:
        self._channel, self._confinement, self._stop = channel, confinement, stop
        self._policy = confinement.policy

    def _allowed(self, wish: Wish) -> Wish:
        """What is asked for, without what the other end may not give here."""
        if not self._policy.devices:
            wish = replace(wish, devices=False)
        if not self._policy.set_id:
            no_set_id = ChmodStep(dirs=True, files=True, clear=0o6000, bits=0, search=0)
            chmod = Chmod((*wish.chmod.steps, no_set_id))
            wish = replace(wish, chmod=chmod, xattrs=False)
        return wish

    def run(self, body: Plain, part: Callable[[Plain], None]) -> Plain:
        """Answer a call."""
        asked: _Asked = _ASKED.unpack(body)
        if not (self._policy.changes or asked.dry):
            raise UsageError("this agent is read-only: it can be the source of a mirror only")
        destination = self._confinement.locate_destination(asked.destination)
        self._confinement.refuse_backup_dir(destination, asked.backup_dir)
        self._confinement.refuse_filters(asked.filters)

        def tell(event: Event) -> None:
            if isinstance(event, Change | Met | Progress):
                part(_PART.pack((event, ())))

        config = MirrorConfig(
            wish=self._allowed(as_run_here(asked.wish)),
            filters=asked.filters,
            ignore_errors=asked.ignore_errors,
            max_delete=asked.max_delete,
            yes=asked.yes,
            backup_dir=asked.backup_dir,
            keep=asked.keep or not self._policy.prunes,
            retention=asked.retention if self._policy.prunes else None,
            whole_files=asked.whole_files,
            apply=asked.apply,
            fsync=asked.fsync,
            numeric_ids=asked.numeric_ids,
            wait_s=None if asked.wait_ms is None else asked.wait_ms / 1000,
            workers=workers(),
            stop=self._stop,
        )
        origin = FarOrigin(self._channel, None, asked.machine)
        report = mirror_from(origin, destination, config, tell, dry=asked.dry)
        items: list[Item] = report.items
        for at in range(0, len(items), _SOME):
            part(_PART.pack((None, tuple(items[at : at + _SOME]))))
        counted = tuple(getattr(report, name) for name in _COUNTERS)
        return _DONE.pack((counted, report.created_kinds, report.deleted_kinds))
