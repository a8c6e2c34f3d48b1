"""SIGKILL before every system call that writes: the next run converges, nothing lost or torn.

Case 155. The run is killed on entry to one call of the scenario's run; then

* everything visible is a complete version that some user wrote,
* one undisturbed run ends with 0, both trees are equal in every attribute, and each content that no
  user threw away is live or in a store (see `ledger`).

A sample of the calls in 45 s; every one with ``BISYNC_FULL=1``.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import calls, scenario, verdict
from .calls import Call
from .campaign import LANES, TIME_LIMIT, Campaign, Outcome, scratch
from .lane import Lane, cannot_trace

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.timeout(TIME_LIMIT),
    pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace()),
]
