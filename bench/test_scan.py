"""How fast a tree is observed: entries per second, with a warm and with a cold cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.trees import drop_caches, empty_files, place
from bisync.core.ignore import Matcher
from bisync.fs.replica import Options, Replica
from bisync.fs.walk import ScanRules

COUNT = int(os.environ.get("BISYNC_BENCH_ENTRIES", "100000"))


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with place() as folder:
        empty_files(folder, COUNT)
        found = Replica(os.fsencode(folder), Options(ScanRules(Matcher(()))))
        found.establish()
        found.scan()
        yield found
        found.close()


def _note(benchmark, entries: int) -> None:
    if benchmark.stats is not None:
        benchmark.extra_info["entries_per_s"] = round(entries / benchmark.stats.stats.median)


def test_warm_scan(benchmark, replica: Replica):
    """Nothing changed, everything is in the cache."""
    result = benchmark(replica.scan)
    assert result.changed == 0
    _note(benchmark, result.entries)


def test_cold_scan(benchmark, replica: Replica):
    """Nothing changed, nothing is in the cache."""
    if not drop_caches():
        pytest.skip("dropping the caches needs root")
    result = benchmark.pedantic(replica.scan, setup=lambda: drop_caches() and None, rounds=3)
    assert result.changed == 0
    _note(benchmark, result.entries)


def test_first_scan(benchmark):
    """An index is made from nothing."""
    with place() as folder:
        empty_files(folder, COUNT)

        def scan(path: Path = folder):
            found = Replica(os.fsencode(path), Options(ScanRules(Matcher(()))))
            found.become_ephemeral()
            result = found.scan()
            found.close()
            return result

        result = benchmark.pedantic(scan, rounds=3, warmup_rounds=1)
        assert result.entries >= COUNT
        _note(benchmark, result.entries)
