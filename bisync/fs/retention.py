"""Drop kept versions that are old enough. Nothing that the manifests do not know is touched."""

import os
import time
from dataclasses import dataclass

from bisync.core.path import parse
from bisync.errors import PathError
from bisync.fs.copying import remove_object
from bisync.fs.store import Store

DAY_NS = 86_400 * 10**9


@dataclass(slots=True)
class Dropped:
    """What a retention run removed, and what refused to go."""

    versions: int = 0
    bytes: int = 0
    refused: int = 0  # locked by a person


def drop_older(store: Store, days: int, now_ns: int) -> Dropped:
    """Remove the versions that were kept more than ``days`` days ago; say so in the manifest.

    Days are looked at by their folders first, so a store without old ones costs one listing.
    Versions that another program put there, or whose record is missing, stay.
    """
    dropped = Dropped()
    limit_ns = now_ns - days * DAY_NS
    oldest = time.strftime("%Y-%m-%d", time.localtime(limit_ns / 1e9)).encode()
    if not any(day <= oldest for day in store.days()):
        return dropped
    for record in store.records():
        time_ns, kept_text = record.get("time_ns"), record.get("kept")
        if not isinstance(time_ns, int) or time_ns >= limit_ns or not isinstance(kept_text, str):
            continue
        kept = parse(kept_text)
        try:
            fd, name = store.open_kept(kept)
        except OSError:
            continue  # gone already, by a person or an earlier run
        try:
            _, size = remove_object(fd, name)
        except FileNotFoundError:
            continue
        except OSError:
            dropped.refused += 1
            continue
        finally:
            os.close(fd)
        dropped.versions += 1
        dropped.bytes += size
        store.tidy(kept)
    if dropped.versions:
        try:
            store.note({"dropped": dropped.versions, "bytes": dropped.bytes, "older_than": days})
        except OSError as error:
            raise PathError(f"cannot write the manifest: {error.strerror}") from error
    return dropped
