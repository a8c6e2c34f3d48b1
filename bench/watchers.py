"""What keeps two folders equal while they are used: bisync, lsyncd, Unison, Syncthing, in one run.

Usage (as root): python -m bench.watchers [--files N] [--rounds N] [PROGRAM ...]

Each gets two folders of its own on this machine and its smallest delay. Milliseconds from the end
of a write until the other folder holds it, the programs in turn; then a directory with a third of
the files is renamed; then nothing happens for ten seconds. What is not installed is left out.
lsyncd carries one way. Unison looks at all each second where its monitor is not packaged.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from bench.realtime import cpu_s, show, until
from bench.trees import place, small_files
from tests.system.live import ready, watching

_START_S = 120.0
_REST_S = 10
_GAP_S = 0.3  # between two writes

Processes = list[int]
Starter = Callable[[Path, Path, Path], contextlib.AbstractContextManager[Processes]]


@contextlib.contextmanager
def _started(*lines: list[str | Path], **environment: str) -> Iterator[Processes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen(line, env={**os.environ, **environment}, **quiet)  # type: ignore[call-overload]
        for line in lines
    ]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


@contextlib.contextmanager
def bisync(a: Path, b: Path, folder: Path) -> Iterator[Processes]:
    """Both ways."""
    with watching(a, b, runtime=folder / "runtime") as it:
        ready(it)
        it.wait()
        yield [it.process.pid]


@contextlib.contextmanager
def lsyncd(a: Path, b: Path, folder: Path) -> Iterator[Processes]:
    """From a to b, by rsync."""
    config = folder / "lsyncd.conf"
    config.write_text(
        "settings { nodaemon = true }\n"
        f'sync {{ default.rsync, source = "{a}", target = "{b}", delay = 1 }}\n'
    )
    with _started(["lsyncd", config]) as processes:
        yield processes


@contextlib.contextmanager
def unison(a: Path, b: Path, folder: Path) -> Iterator[Processes]:
    """Both ways; with its monitor if there is one."""
    repeat = "watch" if shutil.which("unison-fsmonitor") else "1"
    line = ["unison", a, b, "-batch", "-auto", "-ui", "text", "-times", "-repeat", repeat]
    with _started(line, UNISON=str(folder / "unison")) as processes:
        yield processes


@contextlib.contextmanager
def syncthing(a: Path, b: Path, folder: Path) -> Iterator[Processes]:
    """Both ways, two processes that talk over the loopback."""
    homes = [folder / name for name in ("one", "two")]
    names = []
    for home in homes:
        line = ["syncthing", "generate", "--home", home, "--no-default-folder"]
        subprocess.run([*line, "--skip-port-probing"], check=True, capture_output=True)
        line = ["syncthing", "--home", home, "--device-id"]
        names.append(subprocess.check_output(line, text=True).strip())
    for number, (home, root) in enumerate(zip(homes, (a, b), strict=True)):
        _configure(home / "config.xml", root, names, number)
    lines: list[list[str | Path]] = [
        ["syncthing", "serve", "--home", home, "--no-browser", "--no-restart"] for home in homes
    ]
    with _started(*lines, STNOUPGRADE="1") as processes:
        yield processes


def _configure(path: Path, root: Path, names: list[str], number: int) -> None:
    """One folder, shared with the other one, nobody else asked for anything."""
    tree = ElementTree.parse(path)
    top = tree.getroot()
    options = top.find("options")
    assert options is not None
    for option, value in {
        "listenAddress": f"tcp://127.0.0.1:{22100 + number}", "globalAnnounceEnabled": "false",
        "localAnnounceEnabled": "false", "relaysEnabled": "false", "natEnabled": "false",
        "crashReportingEnabled": "false", "reconnectionIntervalS": "5", "urAccepted": "-1",
    }.items():  # fmt: skip
        (found,) = options.findall(option)
        found.text = value
    gui = top.find("gui/address")
    assert gui is not None
    gui.text = f"127.0.0.1:{22200 + number}"
    for device in top.findall("device"):
        top.remove(device)
    folder = ElementTree.SubElement(
        top, "folder", id="bench", path=str(root), type="sendreceive", rescanIntervalS="3600",
        fsWatcherEnabled="true", fsWatcherDelayS="1",
    )  # fmt: skip
    for each, name in enumerate(names):
        ElementTree.SubElement(folder, "device", id=name)
        device = ElementTree.SubElement(top, "device", id=name, name=str(each))
        ElementTree.SubElement(device, "address").text = f"tcp://127.0.0.1:{22100 + each}"
    tree.write(path)


PROGRAMS: dict[str, Starter] = {
    "bisync": bisync,
    "lsyncd": lsyncd,
    "unison": unison,
    "syncthing": syncthing,
}


class Side:
    """A program at work on two folders."""

    def __init__(self, name: str, folder: Path, files: int) -> None:
        self.name, self.folder = name, folder
        self.a, self.b = folder / "A", folder / "B"
        for path in (self.a, self.b):
            path.mkdir(parents=True)
        small_files(self.a, files)
        for number in range(files // 2):
            path = self.a / "half" / f"{number % 100}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % number)
        self.files = sorted(path.relative_to(self.a) for path in self.a.rglob("*.txt"))
        self.pids: Processes = []

    def wait_for_copy(self) -> None:
        """Until all of it is there."""
        began = time.monotonic()
        missing = [*self.files, *(each.relative_to(self.a) for each in self.a.glob("half/*/*"))]
        while missing := [path for path in missing if not (self.b / path).exists()]:
            assert time.monotonic() - began < _START_S, self.name
            time.sleep(0.2)

    def written(self, number: int, *, back: bool) -> float:
        """A small write, until it is there."""
        one, two = (self.b, self.a) if back else (self.a, self.b)
        path, data = self.files[number * 37 % len(self.files)], b"%d %d" % (number, back)
        (one / path).write_bytes(data)

        def there() -> bool:
            with contextlib.suppress(FileNotFoundError):  # some take the old one away first
                return (two / path).read_bytes() == data
            return False

        found = until(there)
        time.sleep(_GAP_S)
        return found

    def renamed(self) -> float:
        """The directory with half of the files gets another name."""
        (self.a / "half").rename(self.a / "renamed")
        last, old = self.b / "renamed/99", self.b / "half"
        count = len(os.listdir(self.a / "renamed/99"))
        return until(lambda: last.exists() and len(os.listdir(last)) == count and not old.exists())

    def memory_mb(self) -> float:
        """Of all its processes."""
        total = 0
        for pid in self.pids:
            text = Path(f"/proc/{pid}/status").read_text()
            total += int(text.split("VmRSS:")[1].split()[0])
        return total / 1000


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS))
    options = parser.parse_args()
    names = [name for name in options.programs if shutil.which(name) or name == "bisync"]
    for name in set(options.programs) - set(names):
        print(f"{name} is not installed")
    with place() as folder, contextlib.ExitStack() as running:
        sides = [Side(name, folder / name, options.files) for name in names]
        for side in sides:
            began = time.monotonic()
            side.pids = running.enter_context(PROGRAMS[side.name](side.a, side.b, side.folder))
            side.wait_for_copy()
            print(f"{side.name:12} all copied after {time.monotonic() - began:.1f} s", flush=True)
        time.sleep(3)
        for back in (False, True):
            times: dict[str, list[float]] = {side.name: [] for side in sides}
            for number in range(options.rounds):
                for side in sides:
                    if not (back and side.name == "lsyncd"):
                        times[side.name].append(side.written(number, back=back))
            for name, found in times.items():
                if found:
                    show(f"small write{', back' if back else ''}, {name}", found)
        for side in sides:
            print(f"{side.name:12} directory renamed: {side.renamed():.0f} ms", flush=True)
            time.sleep(3)
        before = [sum(map(cpu_s, side.pids)) for side in sides]
        time.sleep(_REST_S)
        for side, used in zip(sides, before, strict=True):
            share = (sum(map(cpu_s, side.pids)) - used) / _REST_S * 100
            print(f"{side.name:12} at rest {share:.1f} % of a core, {side.memory_mb():.0f} MB")


if __name__ == "__main__":
    main()
