"""Sweeps: stop, break or unplug the engine at every system call of a run, and look at the trees.

================  =============================================================================
`tree`            what a root holds, as values: snapshots, their differences, contents
`ledger`          which contents must still exist somewhere, and which a user threw away
`user`            a user at one side: writes, saves, moves, links, deletes; every content unique
`scenario`        an agreed pair of roots, then changed at both sides (about eighty operations)
`place`           where a pair lives: file system images that are cloned per run, or folders
`engine`          starts `bisync sync`, plain or under strace, and says how it ended
`lane`            a prepared scenario, its reference run and its outcome without disturbance
`calls`           reads strace's log: which call of which name a run can be stopped at
`verdict`         the questions asked after a run: complete, equal, nothing lost
`campaign`        tries many points within a time limit, and reports the ones that failed
`powercut`        stops a run at flushes and name operations, and clones the disks there
`histories`       random histories of two sites
`test_harness`    shows each judge a culprit
================  =============================================================================

Environment:

* ``BISYNC_FULL=1``: every point instead of a time-boxed sample.
* ``BISYNC_SEED=N``: another sample, and other histories (default 1).
* ``BISYNC_POINT=NAME``: only this point or history, as a failure message spells it.
* ``BISYNC_HISTORIES=N``: so many histories, without a time limit.
* ``BISYNC_LANES=N``: so many points are tried at the same time.
* ``BISYNC_COMMAND="PROGRAM ..."``: the engine to test, instead of ``python -m bisync``.
* ``BISYNC_LIBRARY=MODULE``: the library to test, instead of ``bisync``.
"""
