"""``bisync sync`` and ``bisync plan``."""

import argparse
import os
from collections.abc import Callable

from msgspec.structs import replace

from bisync.cli.output import Output
from bisync.cli.reaching import reach, set_out
from bisync.cli.stopping import Stopper
from bisync.cli.times import retention
from bisync.core.declared import Declared, postgresql
from bisync.core.hot import Allowance
from bisync.core.ignore import Ignore, filter_lines
from bisync.core.method import Apply
from bisync.core.path import STORE_DIR
from bisync.core.resolve import OneWay, Policy
from bisync.core.safety import DeleteLimit
from bisync.errors import UsageError
from bisync.linux.limits import workers
from bisync.session.config import AfterRestore, Config, Fsync


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    stopper = Stopper()
    over = reach(options)
    config = replace(config_of(options, stopper.check), wait_s=over.timeout_s or None)
    dry = options.command == "plan" or options.dry_run
    output = Output(
        as_json=options.json,
        verbose=options.verbose or dry,
        quiet=options.quiet,
        progress=options.progress,
        stats=options.stats,
    )
    with output:
        ahead = set_out((options.alpha, options.beta), over, stopper.check)
        from bisync.session.session import Session  # noqa: PLC0415 -- most of the engine

        session = Session(
            options.alpha, options.beta, config, listener=output.event, reach=over, links=ahead
        )
        report = session.run(dry=dry)
    if dry:
        report.exit_code = 25 if report.withheld else 0
    output.summary(report)
    return report.exit_code


def _allowance(text: str) -> Allowance | None:
    if text == "all":
        return None
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0.0001 <= share <= 1:
        raise UsageError(f"--hot-share {text}: give a percentage from 0.01% on, or all")
    return Allowance(share=share)


def config_of(options: argparse.Namespace, stop: Callable[[], None]) -> Config:
    """How two roots are kept equal, as the options say."""
    return Config(
        conflict=Policy(options.conflict or "newest"),
        one_way=_one_way(options),
        ignore=Ignore(_patterns(options.filters or [])),
        max_delete=_limit(options.max_delete),
        yes=options.yes,
        accept_root=options.accept_root,
        after_restore=AfterRestore(options.after_restore) if options.after_restore else None,
        checksum=options.checksum,
        specials=options.specials,
        devices=options.devices,
        state_dir=options.state_dir,
        fsync=Fsync(options.fsync),
        apply=Apply(options.apply),
        groups=_groups(options),
        hot=Ignore(tuple(options.hot)),
        allowance=_allowance(options.hot_share),
        base_clones=options.base_clones,
        retention=retention(options.keep, options.keep_every),
        workers=workers(),
        stop=stop,
        store=os.fsencode(options.rollback_dir) if options.rollback_dir else STORE_DIR,
    )


def _one_way(options: argparse.Namespace) -> OneWay | None:
    if not options.one_way:
        if options.leave_edits:
            raise UsageError("--leave-edits says something about --one-way only")
        return None
    if options.conflict:
        raise UsageError(f"--conflict {options.conflict}: with --one-way only ALPHA counts")
    return OneWay.REPORT if options.leave_edits else OneWay.UNDO


def _groups(options: argparse.Namespace) -> tuple[Declared, ...]:
    named = (postgresql(os.fsencode(path.strip("/"))) for path in options.postgresql)
    if not options.groups:
        return tuple(named)
    from bisync.session.groupfile import read_groups  # noqa: PLC0415 -- loads a parser

    return (*named, *(group for path in options.groups for group in read_groups(path)))


def _patterns(filters: list[tuple[str, str]]) -> tuple[str, ...]:
    lines: list[str] = []
    for kind, value in filters:
        if kind != "exclude-from":
            lines += filter_lines([(kind, value)])
            continue
        try:
            with open(value, encoding="utf-8", errors="surrogateescape") as file:
                lines += [line.rstrip("\n") for line in file]
        except OSError as error:
            raise UsageError(f"--exclude-from {value}: {error.strerror}") from error
    return tuple(lines)


def _limit(text: str | None) -> DeleteLimit:
    if text is None:
        return DeleteLimit()
    number = text.removesuffix("%")
    if not number.isdecimal():
        raise UsageError(f"--max-delete {text}: give a number, or a percentage like 30%")
    if text.endswith("%"):
        return DeleteLimit(percent=float(number), minimum=0)
    return DeleteLimit(count=int(number))
