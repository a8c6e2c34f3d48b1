#!/bin/sh
# See bisync at work: two trees, changes on both sides, a move, a conflict and its kept loser.
extras=""
. "$(dirname "$0")/../tests/environment.sh"
make_environment
bisync=$(dirname "$python")/bisync
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
alpha=$place/alpha beta=$place/beta

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ bisync %s\n' "$(echo "$*" | sed "s|$place/||g")"; "$bisync" "$@"; }

mkdir "$alpha" "$beta"
cp -a bisync "$alpha/code"
cp -a docs "$alpha/documents"
cp -a tests "$beta/checks"
head -c 3000000 /dev/urandom >"$beta/large.bin"

say "1. Two trees that never met: each gets what the other has"
run sync "$alpha" "$beta"

say "2. Work on both sides"
before=$(stat -c %i "$beta/code")
mv "$alpha/code" "$alpha/source"
mv "$beta/large.bin" "$beta/documents/image.bin"
echo "a line more" >>"$alpha/documents/glossary.md"
rm -r "$beta/checks/system"
echo "alpha's title" >"$alpha/documents/promises.md"
sleep 0.01
echo "beta's title" >"$beta/documents/promises.md"
run plan "$alpha" "$beta"

say "3. Merge them"
run sync -v --stats "$alpha" "$beta"

say "4. A move is a move: the renamed directory is the same object, no content was sent"
[ "$(stat -c %i "$beta/source")" = "$before" ] && echo "beta/source is still inode $before"

say "5. The conflict, and where its loser is kept"
run conflicts list --root "$alpha"
find "$alpha/rsync-rollback" -name promises.md -printf 'alpha/rsync-rollback/%P: ' -exec cat {} \;

say "6. Take the loser after all"
run conflicts resolve documents/promises.md --take kept --root "$alpha"
run sync "$alpha" "$beta"
printf 'both sides now say: '
cat "$beta/documents/promises.md"

say "7. Nothing left to do"
run sync "$alpha" "$beta"
diff -r --exclude=.bisync --exclude=rsync-rollback "$alpha" "$beta" && echo "the trees are equal"
