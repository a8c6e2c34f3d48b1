"""A real sshd on the loopback, with keys that are thrown away: another machine for the tests."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.trees import environment

SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Machine:
    """Where it listens, and how to get in."""

    port: int
    key: Path
    known_hosts: Path
    authorized: Path

    @property
    def rsh(self) -> str:
        """What ``--rsh`` takes: this machine's key, and no other than its own."""
        return (
            f"ssh -p {self.port} -i {self.key} -o IdentitiesOnly=yes -o BatchMode=yes "
            f"-o UserKnownHostsFile={self.known_hosts} -o StrictHostKeyChecking=yes"
        )

    @property
    def public_key(self) -> str:
        """The key's line for ``authorized_keys``."""
        return self.key.with_suffix(".pub").read_text().strip()


def program(folder: Path) -> Path:
    """A folder for PATH in which ``bisync`` is the program under test."""
    bins = folder / "bin"
    bins.mkdir(exist_ok=True)
    script = bins / "bisync"
    path = environment()["PYTHONPATH"]
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(path)} exec {sys.executable} -m bisync "$@"\n'
    )
    script.chmod(0o755)
    return bins


@contextmanager
def machine(folder: Path, *prefix: str, address: str = "127.0.0.1") -> Iterator[Machine]:
    """Start one. ``prefix``: words in front of sshd, as for another namespace."""
    if os.geteuid() != 0 or not Path(SSHD).exists() or not shutil.which("ssh"):
        pytest.skip("needs root and Debian's openssh-server and openssh-client")
    folder.chmod(0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    authorized = folder / "authorized_keys"
    shutil.copy(folder / "key.pub", authorized)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{program(folder)}:/usr/local/bin:/usr/bin:/bin"
    config = folder / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress {address}\nHostKey {folder / 'host'}\n"
        f"AuthorizedKeysFile {authorized}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"PasswordAuthentication no\nPermitRootLogin yes\nSetEnv PATH={path}\nMaxStartups 100\n"
    )
    host_key = (folder / "host.pub").read_text().split()
    known = folder / "known_hosts"
    known.write_text(f"[{address}]:{port},[localhost]:{port} {host_key[0]} {host_key[1]}\n")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*prefix, SSHD, "-D", "-e", "-f", config], stderr=log)
    try:
        _listens(server, folder / "log")
        yield Machine(port, folder / "key", known, authorized)
    finally:
        server.terminate()
        server.wait(10)


def _listens(server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while b"Server listening" not in log.read_bytes():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < until, "sshd does not listen"
        time.sleep(0.02)
