"""Keep two directories equal, and follow what happens: ``python 04_watch.py ALPHA BETA``."""

import sys
import threading

import bisync


def main() -> None:
    """Print changes until somebody says ``stop``; any other line waits for all that happened."""
    live = bisync.Live(bisync.Session(sys.argv[1], sys.argv[2]))

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                break
            code, why = live.wait(60)
            print(f"complete: {code} {why}", flush=True)
        live.stop()

    threading.Thread(target=listen, daemon=True).start()
    for event in live.events():
        if isinstance(event, bisync.Change):
            path = event.path.decode(errors="backslashreplace")
            print(f"{event.side} {event.action} {path}", flush=True)


if __name__ == "__main__":
    main()
