"""The sweeps are only worth something if their judges notice: each judge is shown a culprit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from . import calls, tree, verdict
from .campaign import Campaign, Outcome, spread
from .histories import History, fresh_pair
from .ledger import Ledger
from .place import Pair
from .user import Mint, User


@pytest.fixture(name="pair")
def _pair(tmp_path: Path) -> Pair:
    pair = Pair(tmp_path / "alpha", tmp_path / "beta", tmp_path / "home", tmp_path)
    for path in (pair.alpha, pair.beta, pair.home):
        path.mkdir()
    return pair


@pytest.fixture(name="users")
def _users(pair: Pair) -> tuple[User, User]:
    mint = Mint()
    return User("alpha", pair.alpha, mint), User("beta", pair.beta, mint)


@pytest.fixture(name="ledger")
def _ledger(pair: Pair, users: tuple[User, User]) -> Ledger:
    """Both sides agree on one file x."""
    ledger = Ledger({"alpha": pair.alpha, "beta": pair.beta})
    users[0].write("x")
    ledger.user_changed("alpha")
    _install(pair.alpha / "x", pair.beta / "x")
    assert ledger.engine_ran() == []
    assert ledger.lost() == []
    return ledger


def _install(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    times = source.stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


def _keep(root: Path, name: str) -> None:
    """Do what the engine does: displace a file into the store."""
    day = root / tree.STORE / "2026-01-31"
    day.mkdir(parents=True, exist_ok=True)
    (root / name).rename(day / name)


def test_a_displaced_version_must_be_kept(
    pair: Pair, users: tuple[User, User], ledger: Ledger
) -> None:
    """Alpha's user overwrites x, the engine forgets beta's copy."""
    users[0].write("x")
    ledger.user_changed("alpha")
    _install(pair.alpha / "x", pair.beta / "x")
    assert ledger.engine_ran() == []
    (complaint,) = ledger.lost()
    assert "TOKEN-000001" in complaint
    assert "beta" in complaint


def test_a_kept_version_is_not_lost(pair: Pair, users: tuple[User, User], ledger: Ledger) -> None:
    """Alpha's user overwrites x, the engine keeps beta's copy."""
    users[0].write("x")
    ledger.user_changed("alpha")
    _keep(pair.beta, "x")
    _install(pair.alpha / "x", pair.beta / "x")
    assert ledger.engine_ran() == []
    assert ledger.lost() == []


def test_a_cut_off_kept_version_is_lost(
    pair: Pair, users: tuple[User, User], ledger: Ledger
) -> None:
    """A store that holds the beginning of a version does not hold the version."""
    users[0].write("x")
    ledger.user_changed("alpha")
    _keep(pair.beta, "x")
    os.truncate(pair.beta / tree.STORE / "2026-01-31" / "x", 150)
    _install(pair.alpha / "x", pair.beta / "x")
    ledger.engine_ran()
    assert len(ledger.lost()) == 1


def test_users_may_destroy_what_is_theirs(
    pair: Pair, users: tuple[User, User], ledger: Ledger
) -> None:
    """Both users delete x: it may be gone. What comes back is held again."""
    for user in users:
        user.delete("x")
        ledger.user_changed(user.side)
    assert ledger.engine_ran() == []
    assert ledger.lost() == []


def test_what_the_engine_brings_back_is_held_again(
    pair: Pair, users: tuple[User, User], ledger: Ledger
) -> None:
    """Alpha deletes x, the engine restores it from beta, beta deletes it: alpha's must be kept."""
    users[0].delete("x")
    ledger.user_changed("alpha")
    _install(pair.beta / "x", pair.alpha / "x")
    ledger.engine_ran()
    users[1].delete("x")
    ledger.user_changed("beta")
    (pair.alpha / "x").unlink()
    ledger.engine_ran()
    assert len(ledger.lost()) == 1


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda path: os.truncate(path, 150), "torn"),
        (lambda path: os.truncate(path, 0), "empty"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "torn"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "torn"),
    ],
)
def test_torn_content_is_noticed(
    pair: Pair, ledger: Ledger, spoil: Callable[[Path], object], word: str
) -> None:
    """Nobody wrote that."""
    spoil(pair.beta / "x")
    (complaint,) = ledger.engine_ran()
    assert complaint.startswith(word)
    assert "beta:'x'" in complaint


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda path: path.write_bytes(b"other"), "content"),
        (lambda path: path.chmod(0o600), "mode"),
        (lambda path: os.utime(path, ns=(1, 1)), "mtime_ns"),
        (lambda path: os.link(path, f"{path}2"), "names"),
        (lambda path: path.unlink(), "only at alpha"),
        (lambda path: (path.unlink(), path.mkdir()), "kind"),
        (lambda path: path.with_name(".bisync-left").touch(), "temporary"),
    ],
)
def test_disagreement_is_noticed(
    pair: Pair, ledger: Ledger, change: Callable[[Path], object], word: str
) -> None:
    """Every attribute counts."""
    assert verdict.agreement(pair) == []
    change(pair.beta / "x")
    assert any(word in complaint for complaint in verdict.agreement(pair))


def test_a_lost_attribute_is_noticed(pair: Pair, ledger: Ledger) -> None:
    try:
        os.setxattr(pair.alpha / "x", "user.colour", b"blue")
    except OSError:
        pytest.skip("the file system has no user attributes")
    assert any("xattrs" in complaint for complaint in verdict.agreement(pair))


def test_pinned_names_stay(pair: Pair, ledger: Ledger, users: tuple[User, User]) -> None:
    users[0].write("still/y")
    ledger.pin("alpha", "still")
    (complaint,) = ledger.disturbed()
    assert "beta:'still/y'" in complaint


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_a_sample_is_spread(count: int) -> None:
    """Every beginning of the order leaves no large gap."""
    order = spread(range(count), seed=3)
    assert sorted(order) == list(range(count))
    begun = sorted(order[: max(1, count // 4)])
    gaps = [b - a for a, b in zip(begun, [*begun[1:], begun[0] + count], strict=True)]
    assert max(gaps) <= 8 or count < 8


def test_calls_are_counted_by_thread_and_name(tmp_path: Path, pair: Pair) -> None:
    """As strace counts them for its injections."""
    base = str(pair.base)
    log = tmp_path / "log"
    log.write_text(
        f"10  write(3<{base}/alpha/x>, ..., 5) = 5\n"
        f"11  write(3<{base}/alpha/y>, ..., 5 <unfinished ...>\n"
        f"10  fsync(3<{base}/alpha/x>) = 0\n"
        "11  <... write resumed>) = 5\n"
        "10  write(1<pipe:[77]>, ..., 5) = 5\n"
        f"10  write(3<{base}/alpha/x>, ..., 5) = 5\n"
        f"10  fcntl(3<{base}/alpha/x>, F_SETLK, ...) = 0\n"
        f'10  openat(5<{base}/alpha>, "y", O_RDONLY) = 4\n'
        f'10  openat(5<{base}/alpha>, "y", O_WRONLY|O_CREAT, 0600) = 4\n'
        "10  --- SIGCHLD {si_signo=SIGCHLD} ---\n"
    )
    found = calls.calls(log)
    assert [call.point for call in found if call.name == "write"] == [
        "write:1",
        "write:1",
        "write:2",
        "write:3",
    ]
    wanted = ["write:1", "fsync:1", "write:3", "openat:2"]
    assert [call.point for call in calls.points(found, pair)] == wanted
    assert calls.counts_before(found, found[-1]) == {
        "write": 3,
        "fsync": 1,
        "fcntl": 1,
        "openat": 1,
    }


def test_a_campaign_fails_with_its_points() -> None:
    """The message names the failed point and how to try it again."""
    campaign = Campaign(
        "test_x.py::test_x",
        lanes=["left", "right"],
        attempt=lambda _, point: Outcome(["bad"] if point == 3 else []),
        key=str,
        seconds=0,
        least=10,
    )
    assert campaign.run(range(3)).tried == 3
    with pytest.raises(AssertionError, match="BISYNC_POINT='3'"):
        campaign.run(range(8))


def test_a_campaign_that_misses_its_points_fails() -> None:
    campaign = Campaign(
        "test_x.py::test_x",
        lanes=["only"],
        attempt=lambda _, point: Outcome([], hit=point % 2 == 0),
        key=str,
        seconds=0,
    )
    with pytest.raises(AssertionError, match="differ too much"):
        campaign.run(range(8))


@pytest.mark.parametrize("seed", range(5))
def test_histories_catch_an_engine_that_does_nothing(tmp_path: Path, seed: int) -> None:
    with fresh_pair(tmp_path / "site") as pair:
        history = History(seed, pair, lambda *_: 0)
        assert any("only at alpha" in text for text in history.play(rounds=1, longest_turn=4))


def test_a_history_is_replayed_from_its_seed(tmp_path: Path) -> None:
    """The same seed, the same deeds."""
    stories = []
    for _ in range(2):
        with fresh_pair(tmp_path / "site") as pair:
            history = History(7, pair, lambda *_: 0)
            history.play(rounds=3, longest_turn=6)
            stories.append(history.story())
    assert stories[0] == stories[1]
    assert "TOKEN-" in stories[0]
