"""Start `bisync` and say how it ended."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 180  # seconds; a run of the scenario takes about one
HUNG = -1000  # exit code of a run that was given up


@dataclass(frozen=True, slots=True)
class Run:
    """How one run ended. `code` is negative for a death by signal."""

    code: int
    output: str
    errors: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def __str__(self) -> str:
        how = "hung" if self.code == HUNG else f"ended with {self.code}"
        said = "\n".join(filter(None, (self.errors.strip(), self.output.strip())))
        return f"the run {how}; it said:\n{said[-1500:] or '(nothing)'}"


def program() -> list[str]:
    """Return the engine's command line without its arguments."""
    return shlex.split(os.environ.get("BISYNC_COMMAND", f"{sys.executable} -m bisync"))


def environment(home: Path) -> dict[str, str]:
    """Return surroundings in which two runs make the same system calls.

    One worker: strace counts per thread. No bytecode is written, and nothing is read or written in
    the home folder of whoever runs the tests.
    """
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "LANG", "VIRTUAL_ENV"}}
    return kept | {
        "BISYNC_WORKERS": "1",
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONFAULTHANDLER": "1",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }


def command(alpha: Path, beta: Path, options: Sequence[str] = ()) -> list[str]:
    return [*program(), "sync", *options, str(alpha), str(beta)]


def mirror(alpha: Path, beta: Path, options: Sequence[str] = ()) -> list[str]:
    """Make beta what alpha is, in everything."""
    return [*program(), "mirror", "-aHAX", "--delete", *options, f"{alpha}/", f"{beta}/"]


def run(line: Sequence[str], home: Path, *, before: Sequence[str] = ()) -> Run:
    """Run a command line to its end; `before` is put in front of it (strace, prlimit)."""
    process = start(line, home, before=before)
    try:
        output, errors = process.communicate(timeout=PATIENCE)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        code = HUNG
    return Run(code, _text(output), _text(errors))


def start(
    line: Sequence[str], home: Path, *, before: Sequence[str] = (), output: BinaryIO | None = None
) -> subprocess.Popen[bytes]:
    """Start a command line in a process group of its own; `output` takes all it says."""
    return subprocess.Popen(
        [*before, *line],
        env=environment(home),
        cwd=tempfile.gettempdir(),  # a failed probe for a temporary folder leaves files in it
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.PIPE,
        stderr=output or subprocess.PIPE,
        start_new_session=True,
    )


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")
