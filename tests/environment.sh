# Find a Python, make .venv with the project in it. Sourced by tests/run.sh and examples/try.sh.
# Sets: python (the interpreter of .venv). Takes: extras ("" or "[dev]").
set -eu
cd "$(dirname "$0")/.."

system_packages() {
    # As root on Debian or Ubuntu: install what is missing; otherwise say what will be skipped.
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
            missing="$missing $package"
    done
    [ -z "$missing" ] && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086
        apt-get install -y -qq $missing >/dev/null 2>&1 ||
            { apt-get update -qq && apt-get install -y -qq $missing >/dev/null; }
    else
        echo "not installed, what needs it is skipped:$missing" >&2
    fi
}

make_environment() {
    for name in python3.11 python3.12 python3.13 python3; do
        base=$(command -v "$name") || continue
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && break
        base=""
    done
    [ -n "$base" ] || { echo "Python 3.11 or newer is needed" >&2; exit 2; }
    if [ ! -x .venv/bin/python ]; then
        "$base" -m venv .venv 2>/dev/null || {
            rm -rf .venv
            system_packages python3-venv
            "$base" -m venv .venv
        }
    fi
    python=$PWD/.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
    "$python" -m compileall -q bisync  # else each of many processes may compile all of it again
}
