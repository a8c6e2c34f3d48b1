"""The program under test, loaded once: each run of it is a fork of a process that did nothing yet.

A run of two small folders takes a tenth of the time that Python needs to start and load the engine.
Its process is as real as any other: its own arguments, environment, descriptors, locks and end.
"""

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

_LOADED = (
    "bisync.cli.main", "bisync.cli.output", "bisync.cli.commands.sync",
    "bisync.cli.commands.mirror", "bisync.session.session", "bisync.session.mirroring",
    "bisync.fs.bigfile",
)  # fmt: skip
_MOST = 1 << 20  # bytes of one request


class Prepared:
    """Starts runs, one after the other."""

    def __init__(self, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.prepared", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
            )
        self._line = ours

    def run(
        self, args: Sequence[str], env: dict[str, str], cwd: str | None, umask: int, timeout: float
    ) -> tuple[int, bytes, bytes]:
        """Exit code (negative: the signal that ended it), standard output and error.

        After any error it is of no use any more: what comes on the line is not for the next run.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds.
        """
        request = {"args": list(args), "env": env, "cwd": cwd or os.getcwd(), "umask": umask}
        with contextlib.ExitStack() as open_now:
            outputs = [
                open_now.enter_context(os.fdopen(os.memfd_create(name), "w+b"))
                for name in ("stdout", "stderr")
            ]
            fds = array.array("i", [file.fileno() for file in outputs])
            self._line.sendmsg(
                [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            )
            pid = int(self._line.recv(64))
            self._line.settimeout(timeout)
            try:
                code = int(self._line.recv(64))
            except TimeoutError as error:
                os.kill(pid, 9)
                raise subprocess.TimeoutExpired(["bisync", *args], timeout) from error
            self._line.settimeout(None)
            for file in outputs:
                file.seek(0)
            out, err = (file.read() for file in outputs)
            return code, out, err

    def close(self) -> None:
        """End it."""
        self._line.close()
        self._process.terminate()
        self._process.wait(30)


def _become(request: dict[str, Any], fds: Sequence[int]) -> None:
    """The run that was asked for."""
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    if request["umask"] >= 0:
        os.umask(request["umask"])
    sys.argv = ["bisync", *request["args"]]


def _serve(line: socket.socket) -> None:
    """Fork for each request; returns in the forks only. Ends with its other end."""
    while True:
        data, rights, _flags, _address = line.recvmsg(_MOST, socket.CMSG_SPACE(8))
        if not data:
            sys.exit(0)
        fds = array.array("i", rights[0][2])
        pid = os.fork()
        if pid == 0:
            line.close()
            _become(json.loads(data), list(fds))
            return
        for fd in fds:
            os.close(fd)
        line.send(b"%d" % pid)
        line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    for module in _LOADED:
        import_module(module)
    _serve(socket.socket(fileno=int(sys.argv[1])))
    import_module("bisync.cli.main").entry()
