"""Where a root is, as a person writes it."""

import pytest

from bisync.core.location import Location, location
from bisync.errors import UsageError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"/srv/data", Location(b"/srv/data")),
        (b"data", Location(b"data")),
        (b"./a:b", Location(b"./a:b")),
        (b"/a:b", Location(b"/a:b")),
        (b"host:/srv", Location(b"/srv", "host")),
        (b"host:", Location(b".", "host")),
        (b"host:data:more", Location(b"data:more", "host")),
        (b"me@host:x/", Location(b"x/", "host", "me")),
        (b"[::1]:/srv", Location(b"/srv", "::1")),
        (b"me@[fe80::1%eth0]:/srv", Location(b"/srv", "fe80::1%eth0", "me")),
        (b"ssh://host/srv", Location(b"/srv", "host")),
        (b"ssh://me@host:2222/srv/x", Location(b"/srv/x", "host", "me", 2222)),
        (b"ssh://[::1]:22/", Location(b"/", "::1", None, 22)),
        (b"host:\xff\xfe", Location(b"\xff\xfe", "host")),
    ],
)
def test_location(text: bytes, found: Location):
    """Each spelling, and what it means."""
    assert location(text) == found


@pytest.mark.parametrize(
    "text",
    [
        b"host::module", b"rsync://host/module", b"ssh://host", b"ssh:///srv", b"ssh://host:0/x",
        b"ssh://host:99999/x", b"-oProxyCommand=true:/x", b"me@-x:/x", b"ho st:/x", b":x",
        b"ho\nst:/x", b"[::1:/x", b"host:a\0b", b"ssh://-x/srv",
    ],
)  # fmt: skip
def test_refused(text: bytes):
    """What is no place, or could be taken for an option by ssh."""
    with pytest.raises(UsageError):
        location(text)
