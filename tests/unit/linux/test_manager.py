"""What a service manager hears."""

import socket
from pathlib import Path

import pytest

from bisync.linux.manager import notify, watchdog_s


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool):
    """By a path, or by an abstract name."""
    name = f"@bisync-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify("STOPPING=1")  # nobody listens: no harm


def test_there_is_none(monkeypatch: pytest.MonkeyPatch):
    """Nobody asked."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [("60000000", None, 30.0), ("60000000", "1", None), ("x", None, None)],
)
def test_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, seconds: float | None
):
    """Twice as often as is asked for, if it is this process that is meant."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_s() == seconds
