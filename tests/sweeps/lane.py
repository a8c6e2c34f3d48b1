"""A lane: one prepared scenario, used by one point of a campaign at a time."""

import functools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import calls, scenario, verdict
from .calls import Call
from .place import FolderTemplate, ImageTemplate, Pair, Prepare, Template, cannot_mount


@dataclass(slots=True)
class Lane:
    """A template, a place for strace's log, and the outcome when nothing disturbs the run."""

    folder: Path
    template: Template
    _expected: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "strace.log"

    def expected(self) -> dict[str, str]:
        """Return the outcome of the scenario in this lane without any disturbance."""
        if not self._expected:
            with self.template.copy() as (pair, ledger):
                complaints = verdict.converged(pair, ledger, pair.sync())
                assert not complaints, _listed("the scenario fails undisturbed", complaints)
                self._expected = verdict.outcome(pair)
        return self._expected

    def reference(self, names: Sequence[str]) -> tuple[list[Call], Pair]:
        """Run the scenario under strace; return its calls, and the pair they speak of."""
        with self.template.copy() as (pair, ledger):
            run = pair.sync(before=calls.tracer(self.log, names))
            complaints = verdict.converged(pair, ledger, run)
            assert not complaints, _listed("the scenario fails under strace", complaints)
            return calls.calls(self.log), pair


def lanes(
    folder: Path, count: int, prepare: Prepare = scenario.prepare, words: tuple[str, ...] = ()
) -> list[Lane]:
    """Prepare lanes; each prepares its scenario when it is first used."""
    found = []
    for number in range(count):
        place = folder / f"lane-{number}"
        place.mkdir()
        template: Template = (
            FolderTemplate(place, prepare, words)
            if cannot_mount()
            else ImageTemplate(place, prepare, words=words)
        )
        found.append(Lane(place, template))
    return found


@functools.cache
def cannot_trace() -> str:
    """Say why calls cannot be counted and stopped here; empty if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    line = ["strace", "-qq", "-e", "trace=getpid", "-e", "inject=getpid:retval=1", "true"]
    done = subprocess.run(line, capture_output=True, check=False)
    return f"strace cannot trace here: {done.stderr.decode().strip()}" if done.returncode else ""


def _listed(what: str, complaints: list[str]) -> str:
    return "\n  - ".join([f"{what}:", *complaints[:30]])
