"""Names as bytes, and how people see them.

A path exists for output, ignore rules and the rollback store only; everything else
is keyed by (parent node, name).
"""

NAME_MAX = 255  # bytes in one name, Linux
DELTA_SUFFIX = b".bisync-delta"  # of what is no version by itself, in the store
STATE_DIR = b".bisync"  # a root's own state; never synchronised
STORE_DIR = b"rsync-rollback"  # a root's kept versions; never synchronised by default
TEMP_PREFIX = b".bisync-"  # stage names beside a target where the stage cannot serve


def valid_name(name: bytes) -> bool:
    """Whether ``name`` can be one component: 1 to 255 bytes, no slash, no NUL, no dots only."""
    return 0 < len(name) <= NAME_MAX and name not in (b".", b"..") and not set(name) & {0, 0x2F}


def display(path: bytes) -> str:
    """Text for a terminal, a log or JSON: printable, and different for different bytes.

    Control characters, backslashes and bytes that are not UTF-8 appear as ``\\xNN``
    (a backslash as ``\\\\``), so a name can neither forge a line nor send escape codes.
    """
    if path.isascii() and b"\\" not in path and (text := path.decode()).isprintable():
        return text
    out = []
    for char in path.decode("utf-8", "surrogateescape"):
        if char == "\\":
            out.append("\\\\")
        elif char.isprintable():
            out.append(char)
        else:
            out.extend(f"\\x{b:02x}" for b in char.encode("utf-8", "surrogateescape"))
    return "".join(out)


def parse(text: str) -> bytes:
    """Undo :func:`display`; plain text without backslashes is itself."""
    raw = text.encode("utf-8", "surrogateescape")
    out, i = bytearray(), 0
    while i < len(raw):
        if raw[i : i + 2] == b"\\\\":
            out += b"\\"
            i += 2
        elif raw[i : i + 2] == b"\\x" and len(raw) >= i + 4:
            try:
                out.append(int(raw[i + 2 : i + 4], 16))
            except ValueError:
                out += raw[i : i + 4]
            i += 4
        else:
            out.append(raw[i])
            i += 1
    return bytes(out)


def shorten(base: bytes, suffix: bytes, limit: int = NAME_MAX) -> bytes:
    """``base + suffix`` in at most ``limit`` bytes; still UTF-8 if ``base`` was."""
    room = limit - len(suffix)
    if len(base) <= room:
        return base + suffix
    cut = base[:room]
    try:
        base.decode()
    except UnicodeDecodeError:
        return cut + suffix
    return cut.decode("utf-8", "ignore").encode() + suffix


def numbered(name: bytes, number: int) -> bytes:
    """The ``number``-th version of a name in the store: ``NAME.~2~``; 1 is the name itself."""
    return name if number <= 1 else shorten(name, b".~%d~" % number)


def delta_name(name: bytes, number: int) -> bytes:
    """The name of a reverse delta in the store: never that of the version it restores."""
    return shorten(name, b".~%d~" % number + DELTA_SUFFIX)
