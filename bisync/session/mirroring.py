"""``destination := source``, wherever both are: the library's front door to mirrors."""

import os
from collections.abc import Iterable

from bisync.core.location import Location, location
from bisync.endpoint.connect import Connection, Reach
from bisync.errors import BisyncError, UsageError
from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
from bisync.session.report import Listener


def mirror(
    sources: Iterable[str | bytes | os.PathLike[str]],
    destination: str | bytes | os.PathLike[str],
    config: MirrorConfig | None = None,
    *,
    listener: Listener = lambda _event: None,
    dry: bool = False,
    reach: Reach | None = None,
) -> MirrorReport:
    """Make a destination what its sources are, within what the configuration asks for.

    Args:
        sources: spelled as for rsync: ``"folder/"`` is what it holds, ``"folder"`` itself; with
            ``HOST:`` in front it is on another machine, all of them on one.
        destination: a folder, made if only its last component is missing; or a file.
        config: what to carry; the default carries names and contents of single files.
        listener: gets every event.
        dry: decide everything, change nothing.
        reach: how other machines are reached.

    Raises:
        UsageError: the request makes no sense.
        RootLockedError: another engine works on the destination.
        HaltError: a root guard wants a person's word.
        EndpointError: a machine cannot be reached, or a side cannot be worked on.
    """
    froms = [location(os.fsencode(source)) for source in sources]
    to = location(os.fsencode(destination))
    config, reach = config or MirrorConfig(), reach or Reach()
    if len({(where.host, where.user, where.port) for where in froms}) > 1:
        raise UsageError("all sources of a mirror have to be on one machine")
    open_now: list[Connection] = []

    def reached(where: Location) -> Connection | None:
        if not where.is_remote:
            return None
        open_now.append(Connection(where, reach, config.stop))
        return open_now[-1]

    report: MirrorReport | None = None
    try:
        source = reached(froms[0]) if froms else None
        if source is not None and to.is_remote:
            source.begun()  # two at once would ask their questions at the same terminal
        target = reached(to)
        # These load most of the engine, while the connections are on their way.
        from bisync.session.farmirror import push  # noqa: PLC0415
        from bisync.session.mirror import mirror_from  # noqa: PLC0415
        from bisync.session.origin import FarOrigin, LocalOrigin, Origin  # noqa: PLC0415

        paths = [where.path for where in froms]
        origin: Origin = LocalOrigin(paths)
        if source is not None:
            origin = FarOrigin(source.begun(), paths, froms[0].machine)
        if target is not None:
            report = push(target.begun(), origin, to.path, config, listener, dry=dry)
        else:
            report = mirror_from(origin, to.path, config, listener, dry=dry)
    except BisyncError as error:
        report = getattr(error, "report", None)
        raise
    finally:
        for connection in open_now:
            connection.close()
        if report is not None and open_now:
            report.bytes_sent = sum(each.channel.sent for each in open_now)
            report.bytes_received = sum(each.channel.received for each in open_now)
    return report
