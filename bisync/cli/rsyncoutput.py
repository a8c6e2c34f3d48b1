"""What a mirror run says, in rsync's forms."""

import os
import time
from typing import TextIO

from bisync.cli.output import line
from bisync.core.items import Item
from bisync.core.node import Kind
from bisync.errors import UsageError
from bisync.session.mirrorconfig import MirrorReport

_KNOWN = "infLlo%"
_KINDS = (
    (Kind.FILE, "reg"), (Kind.DIR, "dir"), (Kind.SYMLINK, "link"), (Kind.CHAR, "dev"),
    (Kind.BLOCK, "dev"), (Kind.FIFO, "special"), (Kind.SOCKET, "special"),
)  # fmt: skip


def escaped(path: bytes) -> str:
    """A path as rsync prints it: what is not printable as ``\\#ooo``."""
    out = []
    for char in path.decode("utf-8", "surrogateescape"):
        if char == "\\" or not (char.isprintable() or char == "\t"):
            raw = char.encode("utf-8", "surrogateescape")
            out.append("\\" if char == "\\" else "".join(f"\\#{byte:03o}" for byte in raw))
        else:
            out.append(char)
    return "".join(out)


def check_format(text: str) -> None:
    """Refuse letters nobody knows.

    Raises:
        UsageError: there is one.
    """
    i = 0
    while (i := text.find("%", i)) >= 0:
        letter = text[i + 1 : i + 2]
        if letter not in _KNOWN or not letter:
            raise UsageError(
                f"--out-format: %{letter} is not supported; known: %{' %'.join(_KNOWN)}"
            )
        i += 2


class Lines:
    """One line per item, by a format; the same lines go to a log file."""

    def __init__(self, template: str | None, log: TextIO | None, log_template: str) -> None:
        self._template = template
        self._log = log
        self._log_template = log_template

    def show(self, report: MirrorReport) -> None:
        """Show all items, by path; what goes first."""
        deleted = [item for item in report.items if item.letters.startswith("*")]
        others = [item for item in report.items if not item.letters.startswith("*")]
        for item in [*deleted, *sorted(others, key=lambda item: item.path)]:
            if self._template is not None and ("%i" in self._template or _is_named(item)):
                line(_filled(self._template, item))
            if self._log is not None:
                now = time.strftime("%Y/%m/%d %H:%M:%S")
                text = _filled(self._log_template, item)
                self._log.write(f"{now} [{os.getpid()}] {text}\n")


def _is_named(item: Item) -> bool:
    """rsync names a file whose attributes alone differ only where a format asks for ``%i``."""
    return item.is_dir or item.letters[0] != "." or item.old_path is not None


def _filled(template: str, item: Item) -> str:
    name = escaped(item.path) + ("/" if item.is_dir and item.path else "")
    values = {
        "i": item.letters,
        "n": name or "./",
        "f": escaped(item.path),
        "L": _link(item),
        "l": str(item.size),
        "o": "del." if item.letters.startswith("*") else "send",
        "%": "%",
    }
    if item.letters.startswith("*") and "%i" not in template and "%o" not in template:
        return "deleting " + (name or "./")
    out, i = [], 0
    while i < len(template):
        if template[i] == "%" and i + 1 < len(template):
            out.append(values[template[i + 1]])
            i += 2
        else:
            out.append(template[i])
            i += 1
    return "".join(out)


def _link(item: Item) -> str:
    if item.old_path is not None:
        return " <- " + escaped(item.old_path)
    if item.target is not None:
        return " -> " + escaped(item.target)
    return "" if item.linked is None else " => " + escaped(item.linked)


def summary(report: MirrorReport, *, verbose: bool, stats: bool, human: bool) -> None:
    """rsync's closing lines."""
    total = sum(seen.content.size for seen in report.listed if seen.kind is Kind.FILE)
    if stats:
        line("")
        line(f"Number of files: {_count(len(report.listed))}{_by_kind(report)}")
        made = {name: 0 for _, name in _KINDS}
        for kind, name in _KINDS:
            made[name] += report.created_kinds.get(kind, 0)
        line(f"Number of created files: {_count(sum(made.values()))}{_shares(made)}")
        dirs, others = report.deleted_kinds.get(True, 0), report.deleted_kinds.get(False, 0)
        shares = _shares({"reg": others, "dir": dirs})
        line(f"Number of deleted files: {_count(dirs + others)}{shares}")
        line(f"Number of regular files transferred: {_count(report.transferred)}")
        line(f"Total file size: {_size(total, human=human)} bytes")
        line(f"Total transferred file size: {_size(report.transferred_bytes, human=human)} bytes")
        line(f"Literal data: {_size(report.literal_bytes, human=human)} bytes")
        line(f"Matched data: {_size(report.matched_bytes, human=human)} bytes")
        line("File list size: 0")
        line(f"File list generation time: {report.walk_s:.3f} seconds")
        line("File list transfer time: 0.000 seconds")
        line(f"Total bytes sent: {_size(report.bytes_sent, human=human)}")
        line(f"Total bytes received: {_size(report.bytes_received, human=human)}")
    if verbose or stats:
        moved = report.bytes_sent + report.bytes_received
        rate = moved / max(report.elapsed_s, 0.001)
        line("")
        line(
            f"sent {_size(report.bytes_sent, human=human)} bytes  "
            f"received {_size(report.bytes_received, human=human)} bytes  {rate:,.2f} bytes/sec"
        )
        speedup = total / max(moved, 1)
        line(f"total size is {_size(total, human=human)}  speedup is {speedup:,.2f}")


def _by_kind(report: MirrorReport) -> str:
    found = {name: 0 for _, name in _KINDS}
    for seen in report.listed:
        found[dict(_KINDS)[seen.kind]] += 1
    return _shares(found)


def _shares(found: dict[str, int]) -> str:
    shown = ", ".join(f"{name}: {_count(n)}" for name, n in found.items() if n)
    return f" ({shown})" if shown else ""


def _count(number: int) -> str:
    return f"{number:,}"


def _size(number: int, *, human: bool) -> str:
    if not human or number < 1000:
        return f"{number:,}"
    value = float(number)
    for unit in "KMGT":
        value /= 1000
        if value < 1000:
            return f"{value:.2f}{unit}"
    return f"{value:.2f}P"


def problems_to(report: MirrorReport, log: TextIO) -> None:
    """Problems belong into the log, too."""
    log.writelines(f"{met.kind}: {escaped(met.path)}: {met.reason}\n" for met in report.met)
