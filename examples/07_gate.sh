#!/bin/sh
# A gate for a failover script: start a service only where all that the other site wrote has come.
#
# Usage: sh examples/07_gate.sh SESSION COMMAND [ARGUMENT ...]
#
# A site whose peer is down has to decide by itself: it gets 4 and starts nothing.
set -u
session=$1
shift
bisync wait --timeout "${GATE_TIMEOUT:-30}" "$session"
case $? in
0) exec "$@" ;;
24) echo "gate: files are being written to; stop their programs first" >&2 && exit 24 ;;
25) echo "gate: a guard waits for a person: bisync status $session" >&2 && exit 25 ;;
*) echo "gate: not complete; see bisync status $session" >&2 && exit 4 ;;
esac
