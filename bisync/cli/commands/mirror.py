"""``bisync mirror``: rsync's words."""

import argparse
import contextlib
import os
import sys
from typing import TextIO

from bisync.cli.output import Output
from bisync.cli.reaching import reach
from bisync.cli.rsyncoutput import Lines, check_format, problems_to, summary
from bisync.cli.rsyncwords import size
from bisync.cli.stopping import Stopper
from bisync.cli.times import retention
from bisync.core.chmod import parse_chmod
from bisync.core.filters import Filters, parse_filters
from bisync.core.location import location
from bisync.core.method import Apply
from bisync.core.retention import Retention
from bisync.core.wish import Wish
from bisync.endpoint.connect import Reach
from bisync.errors import UsageError
from bisync.fs.wanted import Wanted, wanted_files
from bisync.linux.accounts import as_run_here
from bisync.linux.limits import workers
from bisync.session.mirrorconfig import MirrorConfig
from bisync.session.mirroring import mirror

_KIB = 1024


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    stopper = Stopper()
    if len(options.paths) < 2:
        raise UsageError("give at least one source, and the destination last")
    *sources, destination = [os.fsencode(text) for text in options.paths]
    config = _config(options, stopper, remote=location(destination).is_remote)
    template = _template(options)
    output = Output(
        as_json=options.json,
        verbose=False,
        quiet=options.quiet,
        progress=options.progress,
        stats=False,
    )
    with contextlib.ExitStack() as stack:
        log = _log(options.log_file, stack)
        with output:
            report = mirror(
                sources,
                destination,
                config,
                listener=output.event,
                dry=options.dry_run,
                reach=_reach(options),
            )
        if not options.json:
            Lines(None if options.quiet else template, log, options.out_format or "%i %n%L").show(
                report
            )
        if log is not None:
            problems_to(report, log)
    if options.dry_run:
        report.exit_code = 25 if report.withheld else report.exit_code
    if options.json:
        output.summary(report)
    elif not options.quiet:
        summary(report, verbose=options.verbose > 0, stats=options.stats, human=options.human)
    return report.exit_code


def _reach(o: argparse.Namespace) -> Reach:
    o.agent_command = o.rsync_path
    return reach(o, compress=o.compress is not False)


def _template(options: argparse.Namespace) -> str | None:
    if options.out_format is not None:
        check_format(options.out_format)
        return str(options.out_format)
    if options.itemize:
        return "%i %n%L"
    return "%n%L" if options.verbose else None


def _log(path: str | None, stack: contextlib.ExitStack) -> TextIO | None:
    if path is None:
        return None
    try:
        return stack.enter_context(open(path, "a", encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UsageError(f"--log-file {path}: {error.strerror}") from error


def _retention(o: argparse.Namespace) -> Retention:
    """A backup is somebody's own: nothing of it goes unless that was asked for."""
    backup = o.backup or o.backup_dir is not None
    age = o.keep_age or ("forever" if backup else "90d")
    return retention(age, o.keep_every or ("all" if backup else "1h"))


def _config(o: argparse.Namespace, stopper: Stopper, *, remote: bool) -> MirrorConfig:
    if o.delete_excluded:
        o.delete = True
    o.recursive = o.recursive is True or (o.recursive == "archive" and o.files_from is None)
    if o.delete and not o.recursive and o.files_from is None:
        raise UsageError("--delete does not work without --recursive (-r)")
    if o.max_delete is not None and not o.max_delete.lstrip("-").isdecimal():
        raise UsageError(f"--max-delete {o.max_delete}: give a number")
    files = _files(o)
    return MirrorConfig(
        wish=_wish(o, recursive=o.recursive, remote=remote),
        filters=_filters(o),
        files_from=files,
        one_file_system=o.one_file_system,
        prune_empty=o.prune_empty,
        ignore_errors=o.ignore_errors,
        max_delete=None if o.max_delete is None else max(0, int(o.max_delete)),
        numeric_ids=o.numeric_ids,
        yes=o.yes,
        backup_dir=None if o.backup_dir is None else os.fsencode(o.backup_dir),
        keep=not o.no_keep or o.backup or o.backup_dir is not None,
        retention=_retention(o),
        whole_files=bool(o.whole_file),
        apply=_apply(o),
        bwlimit=0 if o.bwlimit is None else size(o.bwlimit, "--bwlimit", unit=_KIB),
        wait_s=float(o.timeout) if o.timeout and int(o.timeout) > 0 else None,
        workers=workers(),
        stop=stopper.check,
    )


def _apply(o: argparse.Namespace) -> Apply:
    if o.apply is None:
        # A backup is a file that everybody can read, not what was written over.
        return Apply.REPLACE if o.backup or o.backup_dir is not None else Apply.AUTO
    try:
        return Apply(o.apply)
    except ValueError as error:
        raise UsageError(f"--apply {o.apply}: give auto, replace or in-place") from error


def _wish(o: argparse.Namespace, *, recursive: bool, remote: bool) -> Wish:
    umask = os.umask(0o077)
    os.umask(umask)
    for name, value in (("--timeout", o.timeout), ("--modify-window", o.modify_window),
                        ("--compress-level", o.compress_level)):  # fmt: skip
        if value is not None and not value.lstrip("-").isdecimal():
            raise UsageError(f"{name} {value}: give a number")
    if o.block_size is not None:
        size(o.block_size, "--block-size")
    suffix = b""
    if o.backup and o.backup_dir is None:
        suffix = os.fsencode("~" if o.suffix is None else o.suffix)
        if not suffix or b"/" in suffix:
            raise UsageError(f"--suffix {o.suffix!r}: give one that is not empty, without a slash")
    wish = Wish(
        recursive=recursive,
        links=o.links,
        perms=o.perms or o.acls,
        times=o.times,
        dir_times=not o.omit_dir_times,
        owner=o.owner,
        group=o.group,
        acls=o.acls,
        xattrs=o.xattrs,
        devices=o.devices,
        specials=o.specials,
        hard_links=o.hard_links,
        checksum=o.checksum,
        update=o.update,
        existing=o.existing,
        ignore_existing=o.ignore_existing,
        delete=o.delete,
        force=o.force,
        max_size=None if o.max_size is None else size(o.max_size, "--max-size"),
        min_size=None if o.min_size is None else size(o.min_size, "--min-size"),
        modify_window_s=0 if o.modify_window is None else max(0, int(o.modify_window)),
        inplace=o.inplace,
        chmod=parse_chmod(o.chmod or [], umask),
        backup_suffix=suffix,
    )
    return wish if remote else as_run_here(wish)  # else the other end knows who runs it there


def _filters(o: argparse.Namespace) -> Filters:
    words = [(kind, os.fsencode(value)) for kind, value in o.filters or []]
    if o.backup and o.backup_dir is None and not o.delete_excluded:
        words.append(("filter", b"P *" + os.fsencode("~" if o.suffix is None else o.suffix)))
    return parse_filters(words, _read, delete_excluded=o.delete_excluded, zero=o.from0)


def _read(path: bytes) -> bytes | None:
    if path == b"-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _files(o: argparse.Namespace) -> Wanted | None:
    if o.files_from is None:
        return None
    data = _read(os.fsencode(o.files_from))
    if data is None:
        raise UsageError(f"--files-from {o.files_from}: cannot be read")
    if o.from0:
        return wanted_files(name for name in data.split(b"\0") if name)
    lines = (text.rstrip(b"\r") for text in data.split(b"\n"))
    return wanted_files(text for text in lines if text and text[:1] not in b"#;")
