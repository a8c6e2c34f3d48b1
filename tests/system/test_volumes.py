"""Encrypted volumes come and go while the engine watches: nothing is taken for a deletion."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.live import AGENT, ready, watching
from tests.system.vault import Vault
from tests.trees import assert_equal, look, put

Pair = tuple[Path, Path]


class Volume:
    """A FUSE volume: encrypted files in one folder, plain ones in another."""

    def __init__(self, folder: Path) -> None:
        self.point, self._cipher, self._word = folder / "point", folder / "cipher", folder / "word"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._word.write_text("word")
        self.point.mkdir()
        self._cipher.mkdir()
        line = ["gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", self._word, self._cipher]
        subprocess.run(line, check=True)

    def mount(self) -> None:
        """Until it answers."""
        line = ["gocryptfs", "-fg", "-q", "-nosyslog", "-passfile", self._word]
        process = subprocess.Popen(
            [*line, self._cipher, self.point], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._processes.append(process)
        deadline = time.monotonic() + 30
        while not self.point.is_mount():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip("no FUSE here")
            time.sleep(0.02)

    def unmount(self) -> None:
        """The mount point is an empty folder; who has files open keeps them."""
        subprocess.run(["fusermount", "-u", "-z", self.point], check=True)

    def crash(self) -> None:
        """Its program ends; all that is asked fails."""
        self._processes[-1].kill()
        self._processes[-1].wait()

    def end(self) -> None:
        subprocess.run(["fusermount", "-u", "-z", self.point], check=False, capture_output=True)
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """A volume that is mounted."""
    if not (shutil.which("gocryptfs") and shutil.which("fusermount")):
        pytest.skip("needs gocryptfs and fusermount")
    volume = Volume(tmp_path)
    try:
        volume.mount()
        yield volume
    finally:
        volume.end()


@pytest.mark.parametrize("how", ["unmount", "crash", "crash, unmount"])
@pytest.mark.parametrize("where", ["near", "far"])
def test_a_volume_that_goes(here: Pair, volume: Volume, how: str, where: str):
    """It is said; nothing is deleted, or made in the empty folder; and it goes on by itself."""
    a, b = here[0], volume.point / "B"
    b.mkdir()
    put(a / "d/f", b"1")
    put(a / "e/f", b"2")
    there = b if where == "near" else f"elsewhere:{b}"
    with watching(a, there, *AGENT) as it:
        ready(it)
        put(b / "d/g", b"3")
        it.wait()
        before = look(a)
        assert set(before) == {"d", "d/f", "d/g", "e", "e/f"}
        for step in how.split(", "):
            getattr(volume, step)()
        put(a / "d/new", b"4")
        status = it.shows(lambda s: s["phase"] in ("halted", "reconnecting"))
        assert status["phase"] in ("halted", "reconnecting")
        assert status["reason"]
        assert status["oldest_age_s"] > 0
        assert look(a) == {**before, "d/new": b"4"}
        if how == "crash":
            volume.unmount()
        assert list(volume.point.iterdir()) == []
        volume.mount()
        put(b / "e/other", b"5")
        assert it.shows(lambda s: s["phase"] == "watching")["phase"] == "watching"
        it.wait()
        assert look(b) == look(a) == {**before, "d/new": b"4", "e/other": b"5"}
        assert it.status()["totals"]["deleted"] == 0


@pytest.mark.parametrize("kind", ["fanotify", "inotify"])
def test_a_folder_that_is_locked(here: Pair, vault: Vault, kind: str):
    """Its key is taken away while it is watched: it is left alone until it comes back."""
    a, b = here[0], vault.root / "B"
    b.mkdir()
    (b / "secret").mkdir()
    vault.encrypt(b / "secret")
    put(b / "secret/d/f", b"1")
    put(b / "secret/g", b"2")
    put(b / "plain", b"3")
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        it.wait()
        before = look(a)
        assert len(before) == 5
        # A watch of inotify holds its directory; the key is gone all the same.
        assert vault.lock() == (kind == "fanotify")
        complete = it.ask("flush", "--timeout", "60", check=23) and it.status()["complete_ns"]
        put(a / "plain", b"4")
        it.wait(check=23)  # a locked folder stays a problem, whatever was looked at since
        (a / "secret/g").unlink()
        put(a / "secret/new", b"5")
        it.wait(check=23)
        status = it.status()
        assert any("locked" in problem for problem in status["problems"]), json.dumps(status)
        assert status["complete_ns"] == complete
        assert (b / "plain").read_bytes() == b"4"
        assert look(a) == {
            "plain": b"4", "secret": None, "secret/d": None, "secret/d/f": b"1", "secret/new": b"5",
        }  # fmt: skip
        vault.unlock()
        it.wait()
        assert_equal(a, b)
        assert len(look(b)) == 5
        put(b / "secret/after", b"6")
        it.wait()
        assert (a / "secret/after").read_bytes() == b"6"
        assert it.status()["problems"] == []
