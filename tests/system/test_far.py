"""The cases of two folders, played once more with both of them reached as if on other machines.

A sample: what a run does must not depend on where its sides are. All of them, with one side far:
``BISYNC_TEST_FAR=alpha sh tests/run.sh tests/system`` (or beta, or both).
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trees import FAR, environment

HERE = Path(__file__).parent
SAMPLE = ("test_cases_moves.py", "test_cases_conflicts.py", "test_cases_types.py")


@pytest.mark.skipif(bool(FAR), reason="that is what runs already")
def test_cases_elsewhere():
    """Moves, conflicts, kinds; on one file system."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "plain", *SAMPLE],
        cwd=HERE,
        env=environment(BISYNC_TEST_FAR="both"),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 50, done.stdout[-300:]
