"""Mirror a folder from a program, and say what would be deleted before it is.

Usage: python examples/02_mirror.py SOURCE DESTINATION
"""

import os
import sys

import bisync


def main(source: str, destination: str) -> int:
    """Look first, then make the destination what the source is."""
    wish = bisync.Wish(
        recursive=True,
        links=True,
        perms=True,
        times=True,
        delete=True,
        user=os.geteuid(),
        user_group=os.getegid(),
    )
    config = bisync.MirrorConfig(wish=wish)
    inside = os.path.join(source, "")  # what it holds, not the folder itself
    planned = bisync.mirror([inside], destination, config, dry=True)
    for item in planned.items:
        print(f"{item.letters} {item.path.decode(errors='replace')}")
    if planned.withheld:
        print(f"{planned.withheld} deletions want a person's word", file=sys.stderr)
        return planned.exit_code
    report = bisync.mirror([inside], destination, config)
    print(f"{report.created} created, {report.moves} renamed, {report.kept} old versions kept")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
