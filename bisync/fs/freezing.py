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
def run(command):
    if not command:
        return 0
    child = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        print("took longer than", limit, "s:", command, file=sys.stderr)
        os.killpg(child.pid, signal.SIGKILL)
        return 1
code = run(freeze)
late = False
if code == 0:
    try:
        sys.stdout.buffer.write({_FROZEN!r})
        sys.stdout.buffer.flush()
        late = not select.select([0], [], [], limit)[0]
    except OSError:
        pass  # nobody waits any more
failed = run(thaw) != 0
sys.exit({_FAILED} if failed else {_LATE} if late else 0)
"""


class Freeze:
    """A program that holds still from now until :meth:`thaw`.

    Raises:
        PathError: it could not be made to.
    """

    def __init__(self, hooks: Hooks, directory: bytes) -> None:
        self._what = display(directory)
        words = [sys.executable, "-E", "-S", "-c", _KEEPER]
        self._keeper = subprocess.Popen(
            [*words, str(hooks.limit_s), hooks.freeze, hooks.thaw],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={**os.environ, "BISYNC_GROUP": os.fsdecode(directory)},
            start_new_session=True,  # no interrupt of ours is for it
        )
        self._limit_s = hooks.limit_s
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
            code = self._keeper.wait(2 * self._limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = _FAILED
        if code == _LATE:  # whether anything moved since is looked at
            log.warning("thawed-early path=%s limit=%s", self._what, self._limit_s)
        if code in (0, _LATE):
            return ""
        log.error("not-thawed path=%s", self._what)
        return f"{self._what}: the command to thaw it failed; it may still be frozen"
