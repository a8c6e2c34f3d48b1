"""How soon a change is on the other side, and what it costs to be ready for it.

Usage (as root): python -m bench.realtime [--rounds N] [--image-mib N] [--file-system KIND]

Milliseconds from the last byte written to when the other side's file holds it, polled each half
millisecond; the far side is reached by ssh on this machine. Let nothing else run.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.images import mounted
from bench.trees import place
from tests.system.live import Watching, ready, watching
from tests.system.sshd import machine

_LOOK_S = 0.0005
_REST_S = 0.05
_GIVE_UP_S = 60.0


def until(there: Callable[[], bool], give_up_s: float = _GIVE_UP_S) -> float:
    """Milliseconds until something is so."""
    began = time.perf_counter()
    while not there():
        if time.perf_counter() - began > give_up_s:
            return float("inf")
        time.sleep(_LOOK_S)
    return (time.perf_counter() - began) * 1000


def show(what: str, times: list[float]) -> None:
    """One row."""
    times.sort()
    last = times[min(len(times) - 1, len(times) * 99 // 100)]
    print(f"{what:58} median {statistics.median(times):8.1f} ms   p99 {last:8.1f} ms", flush=True)


def small_writes(one: Path, two: Path, rounds: int) -> list[float]:
    """Small files of a tree, rewritten one after the other."""
    times = []
    for number in range(rounds):
        name, data = f"d{number % 50}/f{number % 7}", b"%d from %s" % (number, bytes(one))
        (one / name).write_bytes(data)
        times.append(until(lambda n=name, d=data: (two / n).read_bytes() == d))  # type: ignore[misc]
        time.sleep(_REST_S)
    return times


def image_writes(one: Path, two: Path, rounds: int) -> list[float]:
    """4 KiB somewhere in a big file that stays open; each long after the one before."""
    times = []
    fd = os.open(one / "image", os.O_RDWR)
    size = os.fstat(fd).st_size
    for number in range(rounds):
        data = (b"%08d" % number) * 512
        at = (number * 7919 * 4096) % (size - 4096)
        os.pwrite(fd, data, at)

        def there(data: bytes = data, at: int = at) -> bool:
            with open(two / "image", "rb") as file:
                return os.pread(file.fileno(), 4096, at) == data

        times.append(until(there))
        time.sleep(2)
    os.close(fd)
    return times


def fill(root: Path) -> None:
    """50 directories of 100 small files."""
    for number in range(5000):
        path = root / f"d{number % 50}" / f"f{number // 50}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)


def settled(it: Watching) -> Watching:
    """Wait until it rests."""
    ready(it)
    it.wait()
    return it


def cpu_s(pid: int) -> float:
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def sides(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Two roots in a folder of their own."""
    a, b = folder / "A", folder / "B"
    a.mkdir(parents=True)
    b.mkdir()
    yield a, b


def trees(folder: Path, rounds: int) -> None:
    """Small files, here and over ssh, with each watcher; a directory renamed; at rest."""
    (folder / "ssh").mkdir()
    with machine(folder / "ssh") as there:
        for kind in ("fanotify", "inotify"):
            for where in ("here", "over ssh"):
                with sides(folder / f"{kind}-{where}") as (a, b):
                    fill(a)
                    far: list[str] = [] if where == "here" else ["--rsh", there.rsh]
                    target = b if where == "here" else f"localhost:{b}"
                    with watching(a, target, "--watcher", kind, *far) as it:
                        settled(it)
                        show(f"small write, {where}, {kind}", small_writes(a, b, rounds))
                        show(f"small write, {where}, {kind}, back", small_writes(b, a, rounds))
                        if where == "here":
                            others(a, b, it, kind)


def others(a: Path, b: Path, it: Watching, kind: str) -> None:
    """A directory of 10 000 files renamed, and what it costs to wait."""
    for number in range(10_000):
        path = a / "many" / f"{number % 100}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    it.wait()
    times = []
    for number in range(5):
        name, old = f"many{number}", "many" if number == 0 else f"many{number - 1}"
        (a / old).rename(a / name)
        times.append(until(lambda n=name: (b / n / "99/9999").exists()))  # type: ignore[misc]
        it.wait()
    show(f"directory of 10 000 files renamed, {kind}", times)
    used = cpu_s(it.process.pid)
    time.sleep(10)
    share = (cpu_s(it.process.pid) - used) * 10
    print(f"{'at rest, ' + kind:58} {share:8.2f} % of a core", flush=True)


def images(folder: Path, kind: str, mib: int, rounds: int) -> None:
    """A running disk image, as big as asked for."""
    size = (mib * 4 + 512) << 20
    with mounted(folder, kind, size) as (point, _), sides(point / "pair") as (a, b):
        with open(a / "image", "wb") as file:
            file.writelines(os.urandom(1 << 20) for _ in range(mib))
        with watching(a, b, "--hot", "image", runtime=folder / f"runtime-{kind}") as it:
            settled(it)
            show(f"4 KiB into an open image of {mib} MiB, {kind}", image_writes(a, b, rounds))


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--image-mib", type=int, default=2048)
    parser.add_argument("--file-system", choices=["ext4", "xfs", "btrfs"], action="append")
    options = parser.parse_args()
    with place() as folder:
        trees(folder, options.rounds)
        for kind in options.file_system or ["ext4", "xfs"]:
            images(folder, kind, options.image_mib, 10)


if __name__ == "__main__":
    main()
