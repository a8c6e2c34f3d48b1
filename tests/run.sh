#!/bin/sh
# Install what the tests need and run them all; arguments go to pytest.
extras="[dev]"
. "$(dirname "$0")/environment.sh"
system_packages python3-venv rsync xfsprogs btrfs-progs e2fsprogs util-linux strace acl attr libcap2-bin postgresql openssh-server openssh-client iproute2 gocryptfs fuse3
make_environment
bin=$(dirname "$python")
[ $# -eq 0 ] || exec "$python" -m pytest "$@"
"$bin/ruff" format --check --quiet .
"$bin/ruff" check --quiet .
"$bin/mypy"
"$bin/lint-imports" --no-logo 2>/dev/null || "$bin/lint-imports"
failed=0
"$python" -m pytest -m "not alone" --numprocesses 2 --dist worksteal || failed=1
"$python" -m pytest -m alone || failed=1
exit $failed
