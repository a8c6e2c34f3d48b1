"""Two machines with a wire between them: network namespaces."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def ip(*words: str, check: bool = True) -> int:
    """Run ip(8)."""
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode


@contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """192.0.2.1 and .2; their names."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    one, two = (f"bisync-{os.getpid()}-{n}" for n in (1, 2))
    ip("netns", "add", one, check=False)
    try:
        if ip("netns", "add", two, check=False):
            pytest.skip("no network namespaces here")
        ip("-n", one, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", two)
        for number, name in enumerate((one, two), 1):
            ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
        yield one, two
    finally:
        for name in (one, two):
            ip("netns", "delete", name, check=False)
