"""Benchmarks. `python -m pytest bench --benchmark-enable`, and `python -m bench.against_peers`."""
