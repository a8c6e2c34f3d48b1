"""Fixtures: the file systems that the tests run on, and fresh roots on them."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.system.vault import Vault
from tests.trees import Batch

# The same examples in every run, so that a failure is the change's; new ones by BISYNC_FULL=1.
settings.register_profile("same", derandomize=True)
if not os.environ.get("BISYNC_FULL"):
    settings.load_profile("same")

# What is about time, or keeps all cores busy by itself, runs with nothing beside it.
ALONE = {
    "sweeps", "watch", "test_watch.py", "test_unwatched.py", "test_soak.py", "test_bases.py",
    "test_databases.py", "test_postgresql.py", "test_hot.py", "test_search.py",
}  # fmt: skip
FILE_SYSTEMS = ("plain", "tmpfs", "ext4", "xfs", "btrfs")
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZE = 400 << 20  # bytes; XFS needs 300 MB
LARGER = {"btrfs": 1200 << 20}  # it frees what was removed only some seconds later


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs alone; see ``run.sh``."""
    for item in items:
        if not ALONE.isdisjoint(item.path.parts):
            item.add_marker("alone")


def _mount(cleanup: contextlib.ExitStack, point: Path, *args: str | Path) -> None:
    """Mount something for as long as ``cleanup`` lives; skip the test where that is forbidden."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    point.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *args, point], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    cleanup.callback(_unmount, point)


def _unmount(point: Path) -> None:
    if os.path.ismount(point):
        done = subprocess.run(["umount", point], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def _remove(folder: Path) -> None:
    """Remove a folder with everything that a test may have left in it."""
    for unlock in (False, True):
        if unlock and folder.exists():
            subprocess.run(["chattr", "-R", "-f", "-ia", folder], capture_output=True, check=False)
        rm = ["rm", "-rf", "--one-file-system", folder]
        subprocess.run(rm, capture_output=True, check=False)


@pytest.fixture(scope="session")
def file_system() -> Iterator[Callable[[str], Path]]:
    """Give a folder on the file system of a name, made on first use and removed at the end."""
    made: dict[str, Path] = {}
    with contextlib.ExitStack() as cleanup:
        base = Path(tempfile.mkdtemp(prefix="bisync-test-"))
        cleanup.callback(_remove, base)
        base.chmod(0o755)  # for the tests that run as a plain user

        def get(name: str) -> Path:
            if name not in made:
                _make(cleanup, base, name)
                made[name] = base / name
            return made[name]

        yield get


def _make(cleanup: contextlib.ExitStack, base: Path, name: str) -> None:
    point = base / name
    if name == "plain":
        point.mkdir()
    elif name == "tmpfs":
        _mount(cleanup, point, "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "none")
    else:
        kind, _, size = name.partition("-")  # "xfs-2048": of so many MiB
        if shutil.which(MAKE[kind][0]) is None:
            pytest.skip(f"{MAKE[kind][0]} is not installed")
        image = base / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(int(size) << 20 if size else LARGER.get(kind, SIZE))
        done = subprocess.run([*MAKE[kind], image], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot make {kind}: {done.stderr.strip()}")
        _mount(cleanup, point, "-o", "loop", image)
        point.chmod(0o755)


@pytest.fixture(scope="session", params=FILE_SYSTEMS)
def fsmount(request: pytest.FixtureRequest, file_system: Callable[[str], Path]) -> Path:
    """Each file system in turn: a folder on it that the whole session shares."""
    return file_system(request.param)


@pytest.fixture
def fsdir(fsmount: Path) -> Iterator[Path]:
    """A fresh, empty directory on each file system in turn."""
    yield from _fresh(fsmount)


@pytest.fixture
def pair(fsdir: Path) -> tuple[Path, Path]:
    """Two fresh, empty roots on each file system in turn."""
    return _pair(fsdir)


@pytest.fixture
def here(file_system: Callable[[str], Path]) -> Iterator[tuple[Path, Path]]:
    """Two fresh, empty roots in the temp folder, for what does not depend on a file system."""
    for folder in _fresh(file_system("plain")):
        yield _pair(folder)


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mount something on a point for the length of a test: ``mount(point, *arguments)``."""
    with contextlib.ExitStack() as cleanup:
        yield lambda point, *args: _mount(cleanup, point, *args)


@pytest.fixture(scope="module")
def batch(request: pytest.FixtureRequest, fsmount: Path) -> Iterator[Batch]:
    """All CASES of a module, played in one pair of roots with the module's OPTIONS."""
    module = request.module
    for folder in _fresh(fsmount):
        options, umask = getattr(module, "OPTIONS", ()), getattr(module, "UMASK", -1)
        yield Batch(folder, module.CASES, options, umask).play()


def _fresh(base: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=base))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        _remove(folder)


def _pair(folder: Path) -> tuple[Path, Path]:
    roots = folder / "A", folder / "B"
    for root in roots:
        root.mkdir()
    return roots


@pytest.fixture
def vault(here: tuple[Path, Path], mount: Callable[..., None]) -> Vault:
    point = here[0].with_name("vault")
    image = here[0].with_name("vault.img")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    line = ["mkfs.ext4", "-q", "-F", "-O", "encrypt", "-b", "4096", image]
    if shutil.which("mkfs.ext4") is None or subprocess.run(line, check=False).returncode:
        pytest.skip("cannot make an ext4 file system with encryption")
    mount(point, "-o", "loop", image)
    found = Vault(point)
    try:
        found.unlock()
    except OSError as error:
        pytest.skip(f"the kernel has no native encryption: {error}")
    return found
