"""``bisync watch``: real time in the foreground, until somebody stops it."""

import argparse
import os

from msgspec.structs import replace

from bisync.cli.commands.sync import config_of
from bisync.cli.output import Output
from bisync.cli.reaching import reach
from bisync.cli.stopping import Stopper
from bisync.cli.times import seconds
from bisync.session.control import Server
from bisync.session.live import Live, LiveConfig
from bisync.session.session import Session
from bisync.watch.choose import Kind

_LEAST_S = 0.1  # between two looks; one after the other would never rest


def run(options: argparse.Namespace) -> int:
    """Run the command; 0 when it was asked to stop."""
    stopper = Stopper()
    over = reach(options)
    config = replace(config_of(options, stopper.check), wait_s=None)
    output = Output(
        as_json=options.json,
        verbose=options.verbose,
        quiet=options.quiet,
        progress=options.progress,
        stats=options.stats,
        live=True,
    )
    with output:
        session = Session(options.alpha, options.beta, config, listener=output.event, reach=over)
        live = Live(session, live_config(options))
        name = options.name or " ".join(where.text for where in session.locations)
        server = Server(f"watch-{os.getpid()}", lambda: {name: live})
        try:
            live.run(output.ready)
        finally:
            server.close()
    output.summary(live.report())
    return 0


def live_config(options: argparse.Namespace) -> LiveConfig:
    """How changes are noticed."""
    return LiveConfig(
        watcher=Kind(options.watcher),
        poll_s=seconds(options.poll, "--poll", _LEAST_S),
        rescan_s=seconds(options.rescan, "--rescan", _LEAST_S),
    )
