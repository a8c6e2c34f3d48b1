"""Let a program hold still while its files are read: a person's own commands.

A keeper of its own process group runs both commands, so that what was frozen thaws when the engine
is killed, interrupted, or takes longer than it may.
"""

import logging
import os
import subprocess
import sys

from bisync.core.declared import Hooks
from bisync.core.path import display
from bisync.errors import PathError

log = logging.getLogger(__name__)

_FROZEN, _FAILED, _LATE = b"frozen\n", 3, 4
_GRACE_S = 5.0  # to start and to end in, beside the commands themselves
_KEEPER = f"""
import os, select, signal, subprocess, sys
limit, freeze, thaw = float(sys.argv[1]), sys.argv[2], sys.argv[3]
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)  # it ends when all is thawed
def run(command):
    if not command:
        return 0
    child = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
        restore_signals=True,
        preexec_fn=defaults,
    )
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except OSError:
            pass  # it became somebody else
        return 1
def defaults():
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
late = False
try:
    if run(freeze) == 0:
        sys.stdout.buffer.write({_FROZEN!r})
        sys.stdout.buffer.flush()
        late = not select.select([0], [], [], limit)[0]
finally:
    code = run(thaw)
    os._exit({_FAILED} if code else {_LATE} if late else 0)
"""


class Freeze:
    """A program that holds still from now until :meth:`thaw`.

    Raises:
        PathError: it could not be made to.
    """

    def __init__(self, hooks: Hooks, directory: bytes) -> None:
        self._what = display(directory)
        self._environment = {**os.environ, "BISYNC_GROUP": os.fsdecode(directory)}
        words = [sys.executable, "-E", "-S", "-c", _KEEPER]
        self._keeper = subprocess.Popen(
            [*words, str(hooks.limit_s), hooks.freeze, hooks.thaw],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=self._environment,
            start_new_session=True,  # no interrupt of ours is for it
        )
        self._hooks = hooks
        assert self._keeper.stdout is not None
        try:
            said = self._keeper.stdout.readline()
        except BaseException:
            self.thaw()
            raise
        if said != _FROZEN:
            self.thaw()
            raise PathError("the command to freeze it failed")

    def thaw(self) -> str:
        """Let it go on; what went wrong, "" if nothing did. Only once."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        try:
            code = self._keeper.wait(2 * self._hooks.limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = _FAILED
        if code < 0:  # somebody killed it
            code = self._thaw_here()
        if code == _LATE:  # whether anything moved since is looked at
            log.warning("thawed-early path=%s limit=%s", self._what, self._hooks.limit_s)
        if code in (0, _LATE):
            return ""
        log.error("not-thawed path=%s", self._what)
        return f"{self._what}: the command to thaw it failed; it may still be frozen"

    def _thaw_here(self) -> int:
        """The keeper is gone: then it is done from here."""
        try:
            return subprocess.run(
                ["/bin/sh", "-c", self._hooks.thaw],
                timeout=self._hooks.limit_s,
                check=False,
                cwd="/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
            ).returncode
        except subprocess.TimeoutExpired:
            return _FAILED
