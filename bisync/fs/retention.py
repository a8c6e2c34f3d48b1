"""What leaves the rollback store by itself: what is old, and what nobody misses.

Nothing that the manifests do not know is touched, and nothing that is somebody's own work before
its time: an edit, a conflict's loser or a deletion stays as long as ``days`` says. Only of what
the engine itself had installed, and replaced by the next version, one per file and period is kept
in the long run.
"""

import json
import os
import time
from collections.abc import Iterable

from msgspec import Struct
from msgspec.json import decode as json_decode
from msgspec.json import encode as json_encode

from bisync.core.path import DELTA_SUFFIX, parse
from bisync.core.retention import Passing, Retention, Thinnable, period, settled, surplus
from bisync.errors import PathError
from bisync.fs.copying import remove_object
from bisync.fs.database import Database
from bisync.fs.displaced import was_written
from bisync.fs.rewind import Bridged, bridge
from bisync.fs.store import Store, Version

DAY_NS = 86_400 * 10**9
_LOOK_NS = 3600 * 10**9
_PASSING = "passing"  # in the state: how time passed, for what is dropped by its age
HAS_DELTAS = "has_deltas"  # in the state: some version was kept as what was written over
_TOGETHER = 16  # deltas that leave a period that is not over


class Dropped(Struct):
    """What was removed, and what refused to go."""

    versions: int = 0
    bytes: int = 0
    refused: int = 0  # locked by a person


def tend(store: Store, db: Database, rules: Retention, now_ns: int) -> list[str]:
    """Apply the rules after a run; return what is to be said of it."""
    now = _look_at_clock(store, db, now_ns)  # the log of operations goes by it, too
    if not store.exists():
        return []
    said = []
    if rules.every_s is not None:
        _thin_fresh(store, db, rules, now_ns)
        if not store.has_room():
            thinned = _thin_days(store, db)
            if thinned.versions:
                said.append(
                    f"little space is left: {thinned.versions} kept versions were thinned to one "
                    "per file and day"
                )
    if rules.days is not None:
        dropped = drop_older(store, rules.days, now)
        if dropped.versions:
            said.append(f"{dropped.versions} kept versions older than {rules.days} days dropped")
        if dropped.refused:
            said.append(
                f"{dropped.refused} kept versions older than {rules.days} days may not be removed"
            )
    store.flush()
    return said


def passing(db: Database, now_ns: int) -> Passing | None:
    """How time passed until now; ``None``: nobody has looked at the clock yet."""
    before = _last_look(db)
    return None if before is None else before.at(now_ns)


def _last_look(db: Database) -> Passing | None:
    known = db.get(_PASSING)
    return None if known is None else json_decode(known, type=Passing)


def _look_at_clock(store: Store, db: Database, now_ns: int) -> Passing:
    """Remember that it is ``now_ns``, unless what is remembered is near enough."""
    before = _last_look(db)
    if before is not None and 0 <= now_ns - before.seen_ns < _LOOK_NS:
        return before.at(now_ns)
    if before is None:  # what was kept last tells when somebody knew the time
        records = store.records() if store.exists() else ()
        times = [record.get("time_ns") for record in records]
        before = Passing(max((time for time in times if isinstance(time, int)), default=now_ns))
    now = before.at(now_ns)
    db.begin()
    db.put(_PASSING, json_encode(now).decode())
    db.commit()
    return now


def _thin_fresh(store: Store, db: Database, rules: Retention, now_ns: int) -> None:
    """Let go of versions of files that were kept again, and of periods that are over."""
    dropped = Dropped()
    db.begin()
    paths = {fresh.path for fresh in store.fresh}
    for fresh in store.fresh:
        now = _object(store, fresh.kept)
        if now is not None:
            db.execute(
                "INSERT OR REPLACE INTO thinned VALUES(?,?,?,?,?,?)",
                (fresh.path, fresh.kept, fresh.time_ns, *now),
            )
    assert rules.every_s is not None
    over_ns = settled(now_ns, rules) * rules.every_s * 10**9
    over = db.execute("SELECT DISTINCT path FROM thinned WHERE time_ns<?", (over_ns,))
    for path in paths.union(path for (path,) in over.fetchall()):
        _thin_path(store, db, path, rules, now_ns, dropped)
    db.execute("DELETE FROM thinned WHERE time_ns<?", (over_ns,))
    db.commit()
    store.fresh.clear()
    if dropped.versions:
        _note(store, {"dropped": dropped.versions, "bytes": dropped.bytes, "thinned": "period"})


def _thin_path(
    store: Store, db: Database, path: bytes, rules: Retention, now_ns: int, dropped: Dropped
) -> None:
    rows = db.execute(
        "SELECT kept, time_ns, ino, size, mtime FROM thinned WHERE path=? ORDER BY time_ns", (path,)
    ).fetchall()
    put = {kept: tuple(what) for kept, _, *what in rows}
    versions = [Thinnable(kept, size, time_ns) for kept, time_ns, _, size, _ in rows]
    going = list(surplus(versions, now_ns, rules))
    deltas = [version for version in going if version.kept.endswith(DELTA_SUFFIX)]
    over = any(period(version.time_ns, rules) < settled(now_ns, rules) for version in deltas)
    if len(deltas) < _TOGETHER and not over:
        # Each time, what an older one needs of them has to be written anew: not one by one.
        going = [version for version in going if version not in deltas]
    there = [version for version in going if _object(store, version.kept) == put[version.kept]]
    deltas_at_all = db.get(HAS_DELTAS) is not None
    _drop_all(store, db, {version.kept for version in there}, dropped, chains=deltas_at_all)
    for version in going:
        db.execute("DELETE FROM thinned WHERE path=? AND kept=?", (path, version.kept))


def _drop_all(
    store: Store, db: Database, doomed: set[bytes], dropped: Dropped, *, chains: bool
) -> None:
    """Remove versions; what is made from one of them is made without it first.

    Args:
        chains: whether there may be such versions.
    """
    if not doomed:
        return
    bridged = bridge(store, doomed) if chains else Bridged()
    for old, new in bridged.renamed.items():
        now = _object(store, new)
        if now is not None:
            sql = "UPDATE thinned SET kept=?, ino=?, size=?, mtime=? WHERE kept=?"
            db.execute(sql, (new, *now, old))
        _removed(store, old, Dropped())
    for kept in sorted(doomed - bridged.needed):
        _drop(store, db, kept, dropped)


def _thin_days(store: Store, db: Database) -> Dropped:
    """Of all installed versions, keep the last one per file and day."""
    last: dict[tuple[bytes, bytes], Version] = {}
    doomed: set[bytes] = set()
    dropped = Dropped()
    db.begin()
    there = {version.kept: version for version in store.versions()}  # a name may be used again
    for version in sorted(there.values(), key=lambda each: each.time_ns):
        if not version.installed:
            continue
        day = version.path, version.kept[:10]
        older, last[day] = last.get(day), version
        if older is None:
            continue
        found = _object(store, older.kept)
        size = older.size if not older.delta else (found or (0, 0))[1]
        if found is not None and found[1:] == (size, older.mtime_ns):
            doomed.add(older.kept)
    _drop_all(store, db, doomed, dropped, chains=True)
    db.commit()
    if dropped.versions:
        _note(store, {"dropped": dropped.versions, "bytes": dropped.bytes, "thinned": "day"})
    return dropped


def _object(store: Store, kept: bytes) -> tuple[int, int, int] | None:
    """What tells a kept file from another one that took its name: inode, size, time."""
    info = store.look_at(kept)
    if info is None:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def _drop(store: Store, db: Database, kept: bytes, dropped: Dropped) -> None:
    """Remove a version, unless somebody who had it open when it was displaced still writes."""
    row = db.execute("SELECT payload FROM displaced WHERE path=?", (kept,)).fetchone()
    if row is not None and _is_written(store, kept, row[0]):
        return  # it goes back to its user
    if _removed(store, kept, dropped):
        db.execute("DELETE FROM displaced WHERE path=?", (kept,))


def _is_written(store: Store, kept: bytes, payload: str) -> bool:
    try:
        fd, name = store.open_kept(kept)
    except OSError:
        return False
    try:
        return was_written(fd, name, json.loads(payload)[1])
    except FileNotFoundError:
        return False
    except OSError:
        return True  # nobody knows, so it stays
    finally:
        os.close(fd)


def drop_older(store: Store, days: int, now: Passing) -> Dropped:
    """Remove the versions that were kept more than ``days`` days ago; say so in the manifest.

    Days are looked at by their folders first, so a store without old ones costs one listing.
    Versions that another program put there, or whose record is missing, stay.
    """
    dropped = Dropped()
    most_ns = days * DAY_NS
    # A day's folder may have been named in another zone of time.
    if not any(now.age_ns(_begin_ns(day) - DAY_NS, most_ns // 3) > most_ns for day in store.days()):
        return dropped
    for kept in _older(store, most_ns, now):
        _removed(store, kept, dropped)
    if dropped.versions:
        _note(store, {"dropped": dropped.versions, "bytes": dropped.bytes, "older_than": days})
    return dropped


def _begin_ns(day: bytes) -> int:
    """When a day began, by its folder's name."""
    try:
        return int(time.mktime(time.strptime(day.decode(), "%Y-%m-%d"))) * 10**9
    except (ValueError, OverflowError):
        return 0  # no such day: better look


def _older(store: Store, most_ns: int, now: Passing) -> Iterable[bytes]:
    last: dict[bytes, int] = {}  # a name that was let go of may have been used again
    for record in store.records():
        time_ns, kept = record.get("time_ns"), record.get("kept")
        if isinstance(time_ns, int) and isinstance(kept, str):
            name = parse(kept)
            last[name] = max(time_ns, last.get(name, time_ns))
    return [k for k, time_ns in last.items() if now.age_ns(time_ns, most_ns // 3) > most_ns]


def _removed(store: Store, kept: bytes, dropped: Dropped) -> bool:
    """Remove one version; ``False`` if it is gone already, or may not go."""
    try:
        fd, name = store.open_kept(kept)
    except OSError:
        return False  # by a person or an earlier run
    try:
        _, size = remove_object(fd, name)
    except FileNotFoundError:
        return False
    except OSError:
        dropped.refused += 1
        return False
    finally:
        os.close(fd)
    dropped.versions += 1
    dropped.bytes += size
    store.tidy(kept)
    return True


def _note(store: Store, record: dict[str, object]) -> None:
    try:
        store.note(record)
    except OSError as error:
        raise PathError(f"cannot write the manifest: {error.strerror}") from error
