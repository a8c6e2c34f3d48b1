"""Make the new version of a big file from the old one and a delta, without any session.

Usage: python examples/05_delta.py OLD NEW PATCHED
"""

import sys

from bisync.fs.bigfile import Lister, Patch, Sender


def main(old_path: str, new_path: str, patched_path: str) -> int:
    """Write PATCHED, which is NEW, and say what of it had to come."""
    with (
        open(old_path, "rb") as old_file,
        open(new_path, "rb") as new_file,
        open(patched_path, "x+b") as patched_file,
    ):
        old, new = Lister.fresh(None, workers=2), Lister.fresh(None, workers=2)
        for lister, file in ((old, old_file), (new, new_file)):
            if lister(file.fileno(), file.seek(0, 2)) is None:
                print("it became shorter while it was read", file=sys.stderr)
                return 24
        # The receiver has the old version and its list; the sender has the new ones.
        receiver = Patch(patched_file.fileno(), old_file.fileno(), old.blocks)
        sender = Sender(receiver, new.blocks, workers=2, pace=lambda _bytes: None)
        sender(new_file.fileno(), new.blocks.size)
        whole = receiver.blocks().digest() == new.blocks.digest()
    print(f"{new.blocks.size} bytes, {receiver.literal} of them had to come")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
