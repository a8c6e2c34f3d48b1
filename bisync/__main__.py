"""``python -m bisync``."""

from bisync.cli.main import entry

if __name__ == "__main__":
    entry()
