"""Parse the command line and hand over to one command. Imports nothing heavy."""

import argparse
import contextlib
import gc
import io
import logging
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from bisync import __version__
from bisync.cli.rsyncwords import add_words
from bisync.core.method import BASE_CLONES
from bisync.errors import BisyncError, UnwrittenError, UsageError

_DESCRIPTION = "Two-way file synchronisation for Linux: moves are moves, nothing is ever lost."
_EXIT_CODES = """exit codes:
  0 converged    2 usage    3 root in use    12 a side or the connection failed    23 problems
  24 busy files    25 a guard needs a person    30 took too long
  40 conflicts wait (--conflict manual)    130/143 stopped"""


_HOMES = {"plan": "sync", "restore": "history", "man": "completion"} | dict.fromkeys(
    ("wait", "flush", "pause", "resume"), "status"
)
"""Commands that live in the module of another one."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[_Parser]


class _Filter(argparse.Action):
    """--exclude, --include and --exclude-from keep their order."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        name = (option_string or "").lstrip("-")
        namespace.filters = [*(namespace.filters or []), (name, values)]


def _big_file_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--apply",
        choices=["auto", "replace", "in-place"],
        default="auto",
        help="how new versions of big files get into place: by what the file system can do, as "
        "whole new files, or written into the old ones with an undo (auto)",
    )
    p.add_argument(
        "--postgresql",
        action="append",
        default=[],
        metavar="DIR",
        help="the data directory of a PostgreSQL server, below the root: its files are taken at "
        "one instant and applied together",
    )
    p.add_argument(
        "--groups",
        action="append",
        default=[],
        metavar="FILE",
        help="directories whose files are one thing together, with commands that freeze and thaw "
        "their programs (TOML)",
    )
    p.add_argument(
        "--hot",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files that are never closed (running disk images): take them at first sight, too "
        "(gitignore syntax); else a new file is taken when its writer closes it",
    )
    p.add_argument(
        "--base-clones",
        type=int,
        default=BASE_CLONES,
        metavar="N",
        help="so many big files may have a frozen clone of the version that is known, to tell by "
        f"extents where they were written to (XFS, btrfs; {BASE_CLONES}; 0: none)",
    )
    p.add_argument(
        "--hot-share",
        metavar="N%|all",
        default="5%",
        help="of the time, this part may go into versions of big files that are never closed; who "
        "writes to them is slowed down by each version (5%%)",
    )


def _session_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "alpha", metavar="ALPHA", help="one root: PATH, [USER@]HOST:PATH or ssh://HOST[:PORT]/PATH"
    )
    p.add_argument("beta", metavar="BETA", help="the other root")
    p.add_argument("-e", "--rsh", metavar="COMMAND", help="how to reach another machine (ssh)")
    p.add_argument(
        "--agent-command",
        metavar="PROGRAM",
        help="bisync on the other machine; ' agent' is appended (bisync)",
    )
    p.add_argument("--bwlimit", metavar="RATE", help="bytes in a second over the network, in KiB")
    p.add_argument(
        "--timeout",
        metavar="SECONDS",
        help="give up on a machine that is silent for so long (60), or on a root that another "
        "bisync works on (wait)",
    )
    p.add_argument(
        "--conflict",
        choices=["newest", "oldest", "alpha", "beta", "keep-both", "manual"],
        help="which version wins; the other always goes to the rollback store (newest)",
    )
    _one_way_options(p)
    for name in ("--exclude", "--include", "--exclude-from"):
        p.add_argument(
            name,
            action=_Filter,
            dest="filters",
            metavar="FILE" if name.endswith("from") else "PATTERN",
            help={
                "--exclude": "leave paths alone (gitignore syntax, the last match decides)",
                "--include": "take paths back in",
                "--exclude-from": "read gitignore lines from a file",
            }[name],
        )
    p.add_argument(
        "--max-delete",
        metavar="N|N%",
        help="withhold deletions beyond this many in an hour (50%% and more than 20)",
    )
    p.add_argument("--yes", action="store_true", help="approve what the deletion guard withholds")
    p.add_argument("--accept-root", action="store_true", help="approve another root than before")
    p.add_argument(
        "--after-restore",
        choices=["forward", "keep", "merge"],
        help="what to do when one side was restored from a backup or snapshot",
    )
    p.add_argument("--checksum", action="store_true", help="read what only looks equal, or did")
    p.add_argument("--specials", action="store_true", help="carry FIFOs and sockets")
    p.add_argument("--devices", action="store_true", help="carry device nodes")
    p.add_argument("--rollback-dir", metavar="DIR", help="store below each root (rsync-rollback)")
    p.add_argument("--state-dir", metavar="DIR", help="keep state here instead of ROOT/.bisync")
    p.add_argument(
        "--fsync",
        choices=["batch", "always", "never"],
        default="batch",
        help="when data is made durable before it becomes visible (batch)",
    )
    _big_file_options(p)
    p.add_argument(
        "--keep",
        metavar="AGE",
        default="90d",
        help="drop kept versions older than this from the store: 90d, 12w, 1y or forever (90d)",
    )
    p.add_argument(
        "--keep-every",
        metavar="TIME",
        default="1h",
        help="of versions that came from the other side and gave way to its next ones, keep one "
        "per file in this time: 15min, 1h, 1d or all (1h); the newest few stay one time longer",
    )
    p.add_argument("-v", "--verbose", action="store_true", help="one line per change")
    p.add_argument("-q", "--quiet", action="store_true", help="problems only")
    p.add_argument(
        "--json", action="store_true", help="one JSON object per line, the last a summary"
    )
    p.add_argument("--progress", action="store_true", help="show progress")
    p.add_argument("--stats", action="store_true", help="all counters in the closing summary")


def _one_way_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--one-way",
        action="store_true",
        help="only ALPHA counts: what was done on BETA is undone, and kept in the rollback store",
    )
    p.add_argument(
        "--leave-edits",
        action="store_true",
        help="with --one-way: what was done on BETA stays, and is a problem",
    )


def _live_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--watcher",
        choices=["auto", "fanotify", "inotify", "poll"],
        default="auto",
        help="how to learn of changes: the best that works on each side (auto)",
    )
    p.add_argument(
        "--poll",
        metavar="TIME",
        default="30s",
        help="between two looks at what cannot be watched (30s)",
    )
    p.add_argument(
        "--rescan",
        metavar="TIME",
        default="1h",
        help="between two looks at everything, whatever the watchers say (1h)",
    )


def _daemon_options(commands: "_Commands") -> None:
    daemon = commands.add_parser("daemon", help="all sessions of a configuration, as a service")
    daemon.add_argument(
        "--config",
        metavar="FILE",
        help="TOML (/etc/bisync/config.toml; of a plain user: ~/.config/bisync/config.toml)",
    )
    daemon.add_argument("--check", action="store_true", help="only say whether it is right")
    daemon.add_argument("-v", "--verbose", action="store_true", help="one line per change")
    daemon.add_argument("--json", action="store_true", help="one JSON object per line")


def _control_options(commands: "_Commands") -> None:
    for name, text in (
        ("status", "the sessions that run on this machine, and where each stands"),
        ("wait", "wait until all that happened on both sides until now is done"),
        ("flush", "look at everything now, and wait until it is done"),
        ("pause", "let a session rest; what changes meanwhile is remembered"),
        ("resume", "go on, and approve what a guard withheld"),
        ("events", "what happens, as it happens: one JSON object per line"),
    ):
        p = commands.add_parser(name, help=text)
        p.add_argument(
            "session", nargs="?", metavar="SESSION", help="its name or one of its sides (all)"
        )
        if name != "events":
            p.add_argument("--json", action="store_true", help="one JSON object per line")
        if name == "status":
            how = p.add_mutually_exclusive_group()
            how.add_argument("--watch", action="store_true", help="go on showing it")
            how.add_argument(
                "--prometheus", action="store_true", help="in the text format of Prometheus"
            )
        if name in ("wait", "flush"):
            p.add_argument(
                "--timeout", metavar="TIME", help="give up after so long, with exit code 30 (never)"
            )
        if name == "resume":
            p.add_argument("--yes", action="store_true", help="approve the deletions withheld")
            p.add_argument("--accept-root", action="store_true", help="approve another root")


def _agent_options(commands: "_Commands") -> None:
    agent = commands.add_parser(
        "agent", help="the other end of a connection (started through ssh, not by people)"
    )
    agent.add_argument(
        "--root",
        metavar="DIR",
        help="serve this directory only, whatever is asked for: for a forced command of ssh",
    )
    agent.add_argument("--read-only", action="store_true", help="be a source, never a destination")
    agent.add_argument(
        "--append-only-store", action="store_true", help="never let go of a kept version"
    )
    agent.add_argument("--devices", action="store_true", help="with --root: device nodes, too")
    agent.add_argument(
        "--set-id", action="store_true", help="with --root: set-id bits and capabilities, too"
    )


def _sync(commands: "_Commands") -> None:
    sync = commands.add_parser("sync", help="synchronise two roots both ways, once")
    _session_options(sync)
    sync.add_argument("-n", "--dry-run", action="store_true", help="say what would be done")


def _watch(commands: "_Commands") -> None:
    watch = commands.add_parser("watch", help="keep two roots equal, until it is stopped")
    _session_options(watch)
    _live_options(watch)
    watch.add_argument("--name", help="what status, wait and the others call it")


def _plan(commands: "_Commands") -> None:
    plan = commands.add_parser("plan", help="what sync would do and why; changes nothing")
    _session_options(plan)


def _mirror(commands: "_Commands") -> None:
    mirror = commands.add_parser(
        "mirror", help="make a destination what its sources are; rsync's words", add_help=False
    )
    add_words(mirror)


def _looking_back(commands: "_Commands") -> None:
    for name, text in (
        ("history", "what became of a path: its versions, renames, and where they are kept"),
        ("restore", "put a file or folder back as it was at a time"),
        ("why", "the last decisions about a path, by which rule, and what waits"),
    ):
        back = commands.add_parser(name, help=text)
        back.add_argument("path", metavar="PATH", help="something in a root, now or formerly")
        back.add_argument("--root", metavar="DIR", help="the root (found from PATH)")
        back.add_argument("--state-dir", metavar="DIR", help="as given to sync")
        back.add_argument("--json", action="store_true", help="one JSON object per line")
        if name == "restore":
            back.add_argument("--at", metavar="TIME", help="when (before its last change)")
            back.add_argument("--to", metavar="DEST", help="a new place (where it was)")


def _verify(commands: "_Commands") -> None:
    verify = commands.add_parser("verify", help="find bit rot, and repair it from a peer or store")
    verify.add_argument("root", metavar="ROOT", help="the root to read")
    verify.add_argument("peer", metavar="PEER", nargs="?", help="another root of the pair")
    verify.add_argument("--sample", metavar="N%", default="100%", help="read only a share (100%%)")
    verify.add_argument("--repair", action="store_true", help="bring intact content back")
    verify.add_argument("--state-dir", metavar="DIR", help="as given to sync")
    verify.add_argument("--json", action="store_true", help="one JSON object")


def _recover(commands: "_Commands") -> None:
    recover = commands.add_parser(
        "recover", help="after a crash: make half-written files whole, before programs use them"
    )
    recover.add_argument("root", metavar="ROOT", help="the root")
    recover.add_argument("--state-dir", metavar="DIR", help="as given to sync")
    recover.add_argument("--rollback-dir", metavar="DIR", help="as given to sync")
    recover.add_argument("--json", action="store_true", help="one JSON object")


def _rollback(commands: "_Commands") -> None:
    rollback = commands.add_parser("rollback", help="the store of displaced versions")
    rollback.add_argument(
        "words", nargs="*", metavar="list|prune|lock|unlock|merge STORE", help="what to do"
    )
    rollback.add_argument("--keep", metavar="AGE", help="prune: remove days older than this")
    rollback.add_argument("--day", metavar="DAY", help="prune: remove this day (YYYY-MM-DD)")
    rollback.add_argument("--root", metavar="DIR", help="the root (found from the current folder)")
    rollback.add_argument("--state-dir", metavar="DIR", help="as given to sync")
    rollback.add_argument("--rollback-dir", metavar="DIR", help="as given to sync")
    rollback.add_argument("--json", action="store_true", help="one JSON object per line")


def _about_itself(commands: "_Commands") -> None:
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=["bash", "zsh"], help="for which shell")
    commands.add_parser("man", help="print the manual page")


def _conflicts(commands: "_Commands") -> None:
    conflicts = commands.add_parser("conflicts", help="list, show and resolve conflicts")
    conflicts.add_argument(
        "words", nargs="*", metavar="list|show|resolve [ID|PATH]", help="what to do with which one"
    )
    conflicts.add_argument("--take", choices=["live", "kept", "both"], help="how to resolve it")
    conflicts.add_argument("--root", metavar="DIR", help="the root (found from the current folder)")
    conflicts.add_argument("--state-dir", metavar="DIR", help="as given to sync")
    conflicts.add_argument("--json", action="store_true", help="one JSON object per line")


_MAKERS: tuple[tuple[tuple[str, ...], Callable[["_Commands"], None]], ...] = (
    (("sync",), _sync),
    (("watch",), _watch),
    (("plan",), _plan),
    (("mirror",), _mirror),
    (("history", "restore", "why"), _looking_back),
    (("verify",), _verify),
    (("recover",), _recover),
    (("rollback",), _rollback),
    (("completion", "man"), _about_itself),
    (("agent",), _agent_options),
    (("daemon",), _daemon_options),
    (("status", "wait", "flush", "pause", "resume", "events"), _control_options),
    (("conflicts",), _conflicts),
)


def build_parser(wanted: str = "") -> argparse.ArgumentParser:
    """The command line: all of it, or what one command needs, which takes a tenth of the time."""
    parser = _Parser(
        prog="bisync",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bisync {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    makers = [make for names, make in _MAKERS if wanted in names]
    for make in makers or [make for _, make in _MAKERS]:
        make(commands)
    return parser


def _parse(args: list[str]) -> argparse.Namespace:
    """Parse; options may stand before, between and behind the words of a command."""
    parser = build_parser(args[0] if args else "")
    options, rest = parser.parse_known_args(args)
    words = {"conflicts": "words", "rollback": "words", "mirror": "paths"}.get(options.command)
    if rest and (words is None or any(word[:1] == "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        setattr(options, words, [*getattr(options, words), *rest])
    return options


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code. Never shows a traceback to a user."""
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name may break a run
    try:
        options = _parse(args)
        name = _HOMES.get(options.command, options.command)
        command = import_module(f"bisync.cli.commands.{name}")
        return int(command.run(options))
    except BisyncError as error:
        from bisync.cli.output import fail  # noqa: PLC0415 - only needed when something failed

        return fail(error, as_json="--json" in args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output went away
        return 141
    except UnwrittenError:
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence: one clear line
        from bisync.cli.output import crash  # noqa: PLC0415

        return crash(error, as_json="--json" in args)


def entry() -> NoReturn:
    """The console script."""
    gc.set_threshold(50_000, 20, 50)  # a run makes many objects, and hardly any cycles
    try:
        code = main()
    except UnwrittenError as error:
        code = _unwritten(str(error))
    except SystemExit as end:  # --help, --version
        code = end.code if isinstance(end.code, int) else 0
    if sys.getprofile() or sys.gettrace():
        sys.exit(code)
    _end(code)


def _end(code: int) -> NoReturn:
    """End the process: to take the interpreter apart takes a quarter of a short run.

    The kernel frees what there is. What matters is done here: threads end, output is written.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            code = 141
        except OSError as error:
            told = _unwritten(str(error.strerror))  # whatever else went wrong
            code = code or told
    os._exit(code)


def _unwritten(reason: str) -> int:
    """Standard output takes nothing; the exit code, as Python itself ends then."""
    with contextlib.suppress(OSError):
        os.write(2, f"bisync: cannot write: {reason}\n".encode())
    return 120
