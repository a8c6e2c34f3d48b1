"""Another machine through a real sshd: the two command lines of the home lab, and what can fail."""

import json
import os
import pwd
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts import hosts, ip
from tests.system.sshd import Machine, machine, program
from tests.trees import (
    assert_equal,
    command,
    environment,
    kept,
    look,
    noise,
    put,
    run,
    snapshot,
    sync,
)

Pair = tuple[Path, Path]

# Word for word from the script that all this began with, rsync replaced by bisync mirror.
MERGE = r"""
  bisync mirror --max-size=4M --ignore-existing --numeric-ids --modify-window=1 --ignore-errors --block-size=128.00K --inplace --no-whole-file \
    -z --compress-level=9 \
    -aAXx \
    --exclude=.rsync_* \
    --rsh="ssh -i ~/.ssh/storage@${domainName}.key -p ${portNumber} -oStrictHostKeyChecking=no" \
    "${domainName}:/storage/rsync-rollback/" /storage/rsync-rollback/
"""  # noqa: E501
PULL = r"""
    bisync mirror --numeric-ids --delete --force --modify-window=1 --ignore-errors --block-size=128.00K --inplace --no-whole-file \
      -z --compress-level=9 \
      -aAXx \
      --backup-dir="rsync-rollback/$(date '+%Y-%m-%d')" \
      --exclude=rsync-rollback \
      --exclude=.rsync_* \
      --rsh="ssh -i ~/.ssh/storage@${domainName}.key -p ${portNumber} -oStrictHostKeyChecking=no" \
      "${domainName}:/storage/" /storage/ && touch ha_synced
"""  # noqa: E501


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Another machine."""
    with machine(tmp_path_factory.mktemp("sshd")) as there:
        yield there


@pytest.fixture
def lab(tmp_path: Path, here: Pair) -> Iterator["Lab"]:
    """Two machines that both have a ``/storage`` of their own."""
    folder = tmp_path / "sshd"
    folder.mkdir()
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    storage = Path("/storage")
    made = os.geteuid() == 0 and not storage.exists()
    if os.geteuid() == 0:
        storage.mkdir(exist_ok=True)
    try:
        with machine(folder, *_inside(here[0])) as there:
            yield Lab(there, folder, *here)
    finally:
        if made:
            storage.rmdir()


def _inside(storage: Path) -> tuple[str, ...]:
    """Words that start a program where ``/storage`` is another folder."""
    script = f'mount --bind {storage} /storage && exec "$@"'
    return ("unshare", "-m", "sh", "-ec", script, "sh")


class Lab:
    """The passive site: runs its script's lines against the active one."""

    def __init__(self, there: Machine, folder: Path, master: Path, mine: Path) -> None:
        self.there, self.folder, self.master, self.mine = there, folder, master, mine
        self.work = folder / "work"
        self.work.mkdir()

    def __call__(self, line: str, check: int = 0) -> str:
        """Run one line of the script; what it said."""
        home = pwd.getpwuid(0).pw_dir
        script = (
            f"set -e; mkdir -p {home}/.ssh; mount -t tmpfs none {home}/.ssh\n"
            f"cp {self.there.key} {home}/.ssh/storage@localhost.key\n"
            f"chmod 600 {home}/.ssh/*; cd {self.work}; set +e\n{line}"
        )
        path = f"{program(self.folder)}:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run(
            [*_inside(self.mine), "sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment(PATH=path, domainName="localhost", portNumber=str(self.there.port)),
        )
        assert done.returncode == check, (done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr


def test_the_labs_lines(lab: Lab):
    """Pull, pull with a rename and an edited image, a dated store, merge it, an emptied source."""
    image = noise(6 << 20, 1)
    put(lab.master / "vm" / "disk.img", image, t=1_700_000_000)
    put(lab.master / "mail" / "one", b"one\n", t=1_700_000_000)
    put(lab.master / "mail" / "two", b"two\n", t=1_700_000_000)
    put(lab.master / ".rsync_lock", b"mine\n")
    lab(PULL)
    assert look(lab.mine)["vm/disk.img"] == image
    assert ".rsync_lock" not in look(lab.mine)
    assert (lab.work / "ha_synced").exists()

    inode = (lab.mine / "mail").stat().st_ino
    (lab.master / "mail").rename(lab.master / "post")
    with (lab.master / "vm" / "disk.img").open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"written by a guest")
    put(lab.master / "post" / "one", b"first change\n", t=1_700_000_100)
    lab(PULL)
    assert (lab.mine / "post").stat().st_ino == inode
    put(lab.master / "post" / "one", b"second change\n", t=1_700_000_200)
    lab(PULL)
    assert look(lab.mine)["post/one"] == b"second change\n"
    versions = {content for _, content in kept(lab.mine)}
    assert {b"one\n", b"first change\n", image} <= versions
    assert any((lab.mine / "rsync-rollback").glob("20??-??-??"))

    # What was kept at the master comes along, up to 4 MiB, and nothing here goes.
    put(lab.master / "rsync-rollback" / "2026-01-01" / "old", b"kept there\n", t=1_600_000_000)
    put(lab.master / "rsync-rollback" / "2026-01-01" / "large", noise(5 << 20, 2))
    before = {path for path, _ in kept(lab.mine)}
    lab(MERGE)
    after = dict(kept(lab.mine))
    assert before <= after.keys()
    assert b"kept there\n" in after.values()
    assert not any(path.endswith(b"large") for path in after)
    lab(MERGE)
    assert dict(kept(lab.mine)) == after

    held = snapshot(lab.mine)
    for entry in (lab.master / "vm", lab.master / "post"):
        subprocess.run(["rm", "-r", entry], check=True)
    said = lab(PULL, check=25)
    assert "empty" in said
    assert snapshot(lab.mine) == held


def test_sync(far: Machine, here: Pair):
    """Two-way, with either side there; then driven from the other end: nothing is sent again."""
    a, b = here
    put(a / "d" / "one", b"1" * 5000, t=1_700_000_000)
    put(b / "two", b"2" * 5000, t=1_700_000_000)
    there = f"localhost:{b}"
    first = sync(a, Path(there), "--rsh", far.rsh)
    assert first.counts("created", "conflicts") == {"created": 3, "conflicts": 0}
    assert_equal(a, b)
    (a / "d").rename(a / "dir")
    put(b / "three", b"3", t=1_700_000_000)
    # After a failover the roles are swapped: now the other end drives.
    second = sync(Path(f"localhost:{a}"), b, "--rsh", far.rsh)
    assert second.counts("moves", "created", "conflicts", "literal_bytes") == {
        "moves": 1,
        "created": 1,
        "conflicts": 0,
        "literal_bytes": 1,
    }
    assert_equal(a, b)
    third = sync(Path(f"localhost:{a}"), Path(f"localhost:{b}"), "--rsh", far.rsh)
    assert third.counts("moves", "created", "updated", "deleted", "literal_bytes") == dict.fromkeys(
        ("moves", "created", "updated", "deleted", "literal_bytes"), 0
    )


@pytest.mark.parametrize(
    ("host", "change", "says"),
    [
        ("localhost", ("StrictHostKeyChecking=yes", "StrictHostKeyChecking=yes -o HostKeyAlias=x"),
         "verification failed"),
        ("localhost", ("-i ", "-i /nonexistent/"), "Permission denied"),
        ("localhost", ("-p ", "-p 1"), "ssh could not get there"),
        ("nowhere.invalid", ("", ""), "resolve"),
    ],
)  # fmt: skip
def test_ssh_says_no(far: Machine, here: Pair, host: str, change: tuple[str, str], says: str):
    """A host key, a login or a name that ssh refuses: exit 12, its own words, nothing touched."""
    a, b = here
    put(a / "f", b"data")
    rsh = far.rsh.replace(*change) if change[0] else far.rsh
    done = run("sync", "--rsh", rsh, a, f"{host}:{b}", check=12)
    assert says in done.stderr
    assert look(b) == {}
    assert not (a / ".bisync").exists()


def test_no_bisync_there(far: Machine, here: Pair):
    """A program that is not there is said to be missing; one that talks is shown."""
    a, b = here
    words = ("sync", "--rsh", far.rsh, "--agent-command")
    done = run(*words, "/no/bisync", a, f"localhost:{b}", check=12)
    assert "install bisync, or say where it is" in done.stderr
    talks = "echo Welcome to this machine; bisync"
    done = run(*words, talks, a, f"localhost:{b}", check=12)
    assert "Welcome to this machine" in done.stderr


def test_forced_command(far: Machine, here: Pair):
    """A key that is bound to one folder reaches that folder and no other."""
    a, b = here
    put(a / "f", b"data")
    put(b.parent / "secret" / "s", b"secret")
    before = far.authorized.read_text()
    forced = f'restrict,command="bisync agent --root {b}" {far.public_key}\n'
    far.authorized.write_text(forced)
    try:
        for place in (b.parent, b.parent / "secret", b / "..", "/etc"):
            run("sync", "--rsh", far.rsh, a, f"localhost:{place}", check=2)
            run("mirror", "-a", "--rsh", far.rsh, f"{a}/", f"localhost:{place}/new", check=2)
            run("mirror", "-a", "--rsh", far.rsh, f"localhost:{place}/", f"{a}/got/", check=(2, 23))
        assert not (a / "got").exists() or look(a / "got") == {}
        run("sync", "--rsh", far.rsh, a, f"localhost:{b}")
    finally:
        far.authorized.write_text(before)
    assert_equal(a, b)
    assert look(b.parent / "secret") == {"s": b"secret"}


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two machines with a wire between them."""
    with hosts() as names:
        yield names


def test_the_wire_is_cut(two_hosts: tuple[str, str], tmp_path: Path, here: Pair):
    """Two hosts: the link goes down in the middle, comes back, and the run goes on there."""
    one, two = two_hosts
    a, b = here
    folder = tmp_path / "sshd"
    folder.mkdir()
    put(a / "image", noise(90 << 20, 1))
    put(b / "small", b"small")
    with machine(folder, "ip", "netns", "exec", two, address="192.0.2.2") as there:
        line = [
            "ip", "netns", "exec", one, *command("sync", "--json", "--bwlimit", "20000"),
            "--timeout", "4", "--rsh", there.rsh, a, f"192.0.2.2:{b}",
        ]  # fmt: skip
        going = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE)
        parts = b / ".bisync" / "in"
        until = time.monotonic() + 60
        while not any(p.stat().st_blocks > 80_000 for p in parts.glob("*")):  # 40 MB
            assert time.monotonic() < until
            time.sleep(0.02)
        ip("-n", one, "link", "set", "wire", "down")
        out, _ = going.communicate(timeout=60)
        assert going.returncode == 30, out
        assert look(b) == {"small": b"small"}
        ip("-n", one, "link", "set", "wire", "up")
        until = time.monotonic() + 90  # the other end finds out, too
        again = line[: line.index("--bwlimit")] + line[line.index("--timeout") :]
        while True:
            done = subprocess.run(again, env=environment(), capture_output=True, check=False)
            if done.returncode == 0:
                break
            assert done.returncode in (3, 12), done.stderr
            assert time.monotonic() < until, done.stderr
            time.sleep(1)
    assert_equal(a, b)
    assert json.loads(done.stdout.splitlines()[-1])["bytes_sent"] < 60 << 20


def test_read_only(far: Machine, here: Pair):
    """A key that may only read: a source of mirrors, nothing else; no state is made there."""
    a, b = here
    put(b / "d" / "f", b"data")
    before = far.authorized.read_text()
    forced = f'restrict,command="bisync agent --root {b} --read-only" {far.public_key}\n'
    far.authorized.write_text(forced)
    there = f"localhost:{b}"
    try:
        run("mirror", "-a", "--rsh", far.rsh, f"{there}/", f"{a}/got/")
        run("mirror", "-a", "--rsh", far.rsh, f"{there}/d", f"{a}/only/")
        put(a / "new", b"new")
        for words in (("sync",), ("mirror", "-a"), ("mirror", "-a", "--delete")):
            done = run(*words, "--rsh", far.rsh, a / "got", there, check=2)
            assert "read-only" in done.stderr
        plan = run("plan", "--rsh", far.rsh, a / "got", there)
        assert "created 0" in plan.stdout
    finally:
        far.authorized.write_text(before)
    assert_equal(a / "got", b)
    assert look(a / "only") == {"d": None, "d/f": b"data"}
    assert sorted(path.name for path in b.iterdir()) == ["d"]
