"""A conflict policy of one's own: of two versions of a log the longer one stays, of others both.

Usage: python examples/06_conflict_policy.py ALPHA BETA
"""

import os
import sys

import bisync


def decide(alpha: str, beta: str, quarrel: bisync.Quarrel) -> bisync.Take:
    """What to do about one conflict that waits, seen from ALPHA."""
    paths = [os.path.join(os.fsencode(root), quarrel.path) for root in (alpha, beta)]
    if not (quarrel.path.endswith(b".log") and all(map(os.path.isfile, paths))):
        return bisync.Take.BOTH
    here, there = map(os.path.getsize, paths)
    return bisync.Take.LIVE if here >= there else bisync.Take.KEPT


def main(alpha: str, beta: str) -> int:
    """Synchronise, decide what waits, and let a second run carry it out."""
    config = bisync.Config(conflict=bisync.Policy.MANUAL)
    report = bisync.sync(alpha, beta, config)
    waiting = [quarrel for quarrel in bisync.conflicts(alpha) if quarrel.waiting]
    for quarrel in waiting:
        take = decide(alpha, beta, quarrel)
        print(f"{quarrel.path.decode(errors='replace')}: {take.value}")
        bisync.resolve(alpha, quarrel.id, take)
    if waiting:
        report = bisync.sync(alpha, beta, config)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
