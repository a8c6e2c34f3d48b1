"""The status of all sessions in the text format of Prometheus (version 0.0.4)."""

from collections.abc import Iterator
from typing import Any

_GAUGES = (
    ("backlog", "backlog_directories", "Directories that something happened in"),
    ("oldest_age_s", "oldest_change_seconds", "Age of the oldest change not carried; 0: none"),
    ("withheld", "withheld_deletions", "Deletions that wait for a person"),
    ("waiting_conflicts", "waiting_conflicts", "Conflicts that wait for a person"),
)
_COUNTERS = (
    ("runs", "Runs"),
    ("created", "Entries made"),
    ("updated", "Entries that got new content or attributes"),
    ("moves", "Entries moved"),
    ("deleted", "Entries deleted"),
    ("kept", "Versions kept"),
    ("conflicts", "Conflicts met"),
    ("bytes_sent", "Bytes sent"),
    ("bytes_received", "Bytes received"),
)


def exposition(rows: list[dict[str, Any]]) -> str:
    """Lines for a scrape; ``rows`` as ``status --json`` gives them."""
    return "".join(f"{line}\n" for line in _lines(rows))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head("session", "gauge", "1 for each session, with its phase")
    for row in rows:
        yield f"bisync_session{_labels(row, phase=row['phase'], direction=row['direction'])} 1"
    yield from _head("complete_timestamp_seconds", "gauge", "When both sides were last complete")
    for row in rows:
        if row["complete_ns"] is not None:
            yield f"bisync_complete_timestamp_seconds{_labels(row)} {row['complete_ns'] / 1e9:.3f}"
    for key, name, text in _GAUGES:
        yield from _head(name, "gauge", text)
        for row in rows:
            yield f"bisync_{name}{_labels(row)} {row[key] or 0}"
    for key, text in (("busy", "Files that wait for their writers"),
                      ("problems", "Paths with problems")):  # fmt: skip
        yield from _head(key, "gauge", f"{text}; at most 100 are counted")
        for row in rows:
            yield f"bisync_{key}{_labels(row)} {len(row[key])}"
    for key, text in _COUNTERS:
        yield from _head(f"{key}_total", "counter", f"{text} since the start")
        for row in rows:
            yield f"bisync_{key}_total{_labels(row)} {row['totals'][key]}"
    yield from _head("watched", "gauge", "Directories watched one by one, of a side")
    yield from _watched(rows, "watched", "directories")
    yield from _head("polled", "gauge", "Directories at the top of what is polled, of a side")
    yield from _watched(rows, "polled", "polled")
    yield from _head("own_bytes", "gauge", "Room that a root's index, bases, stage and store take")
    for row in rows:
        for side, found in zip(("alpha", "beta"), row["sizes"] or (), strict=False):
            for part in ("index", "bases", "stage", "store"):
                yield f"bisync_own_bytes{_labels(row, side=side, part=part)} {found[part]}"


def _watched(rows: list[dict[str, Any]], name: str, key: str) -> Iterator[str]:
    for row in rows:
        for side, seen in zip(("alpha", "beta"), row["watchers"], strict=True):
            if seen is not None:
                yield f"bisync_{name}{_labels(row, side=side, kind=seen['kind'])} {seen[key]}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP bisync_{name} {text}", f"# TYPE bisync_{name} {kind}"


def _labels(row: dict[str, Any], **more: str) -> str:
    values = {"session": row["session"], **more}
    return "{" + ",".join(f'{name}="{_quoted(text)}"' for name, text in values.items()) + "}"


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
