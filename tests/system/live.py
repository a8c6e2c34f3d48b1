"""A ``bisync watch`` that runs beside a test, and what can be asked of it."""

import contextlib
import json
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trees import ELSEWHERE, Outcome, command, environment

AGENT = ("--rsh", str(ELSEWHERE), "--agent-command", shlex.join(map(str, command())))


@dataclass
class Watching:
    """A session in a process of its own."""

    process: subprocess.Popen[str]
    runtime: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def ask(self, *words: str, check: int | tuple[int, ...] = 0) -> Outcome:
        """Run one of the commands that talk to it."""
        done = subprocess.run(
            command(*words),
            env=environment(BISYNC_RUNTIME_DIR=str(self.runtime)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        allowed = (check,) if isinstance(check, int) else check
        assert outcome.rc in allowed, (words, outcome, self.status(), "".join(self.said))
        return outcome

    def wait(self, *words: str, check: int | tuple[int, ...] = 0) -> Outcome:
        """Until all that happened is done."""
        return self.ask("wait", "--timeout", "60", *words, check=check)

    def status(self) -> dict[str, Any]:
        """Where it stands."""
        done = subprocess.run(
            command("status", "--json"),
            env=environment(BISYNC_RUNTIME_DIR=str(self.runtime)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            return {"gone": done.stderr}
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def shows(
        self, there: Callable[[dict[str, Any]], object], seconds: float = 60
    ) -> dict[str, Any]:
        """Ask for its status until it is like that; the last one."""
        deadline = time.monotonic() + seconds
        while not there(found := self.status()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def until(self, there: Callable[[dict[str, Any]], object], seconds: float = 60) -> bool:
        """Wait for an event (a JSON object on its output)."""
        with self.changed:
            return self.changed.wait_for(lambda: any(there(e) for e in self.events), seconds)

    def stop(self, signum: int = signal.SIGINT) -> int:
        """Stop it; its exit code."""
        self.process.send_signal(signum)
        return self.process.wait(60)

    @property
    def summary(self) -> dict[str, Any]:
        """What it said at its end."""
        assert self.events[-1]["type"] == "summary"
        return self.events[-1]


@contextlib.contextmanager
def watching(
    a: Path | str,
    b: Path | str,
    *options: str | Path,
    runtime: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Watching]:
    """Keep two roots equal while the block runs; ``prefix``: words in front of the program."""
    if runtime is None:
        runtime = Path(a).parent / "runtime"
    process = subprocess.Popen(
        [*prefix, *command("watch", "--json", *options, a, b)],  # type: ignore[arg-type]
        env=environment(BISYNC_RUNTIME_DIR=str(runtime)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    it = Watching(process, runtime)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with it.changed:
                it.events.append(json.loads(line))
                it.changed.notify_all()

    def hear() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with it.changed:
                it.said.append(line)
                it.changed.notify_all()

    threads = [threading.Thread(target=each) for each in (listen, hear)]
    for thread in threads:
        thread.start()
    try:
        yield it
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.returncode is None:
                process.kill()
        for thread in threads:
            thread.join()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
    assert "Traceback" not in "".join(it.said), "".join(it.said)


def ready(it: Watching, seconds: float = 60) -> Watching:
    """Wait until both sides were made equal for the first time."""
    assert it.until(lambda e: e["type"] == "ready", seconds), it.said
    return it
