"""The scenario of the sweeps: a pair in agreement, then changed at both sides.

`base` fills alpha; one run brings beta to agreement. `perturb` then lets both users work, so that
the next run has about eighty operations to do: each kind of change the engine knows, at both
sides, and the conflicts between them. Everything here ends in agreement by the default policy:
exit code 0, nothing withheld, no problem. The numbers are rows of the project's list of cases.
"""

from .ledger import Ledger
from .place import Pair
from .user import Mint, User

LARGE = 300 * 1024
HUGE = (4 << 20) + 5000  # such a file is sent block by block


def prepare(pair: Pair) -> Ledger:
    """Bring the pair to agreement, then perturb it; return the ledger of what must survive."""
    mint = Mint()
    alpha, beta = User("alpha", pair.alpha, mint), User("beta", pair.beta, mint)
    ledger = Ledger({"alpha": pair.alpha, "beta": pair.beta})
    base(alpha)
    ledger.user_changed("alpha")
    ledger.pin("alpha", "still")
    pair.agree()
    complaints = ledger.engine_ran()
    assert not complaints, f"the first run of all went wrong: {complaints}"
    perturb(alpha, beta)
    ledger.user_changed("alpha")
    ledger.user_changed("beta")
    return ledger


def base(user: User) -> None:
    """Make the tree both sides agree on."""
    for number in range(30):
        user.write(f"still/{number // 10}/quiet-{number:02d}.txt", 40 + 137 * number)
    for name in _SMALL:
        user.write(name, 100 + 29 * len(name))
    for name in ("doc/large.bin", "doc/large-over.bin", "mv/large.bin", "conf/large.bin"):
        user.write(name, LARGE)
    user.write("doc/huge.bin", HUGE)
    for name in ("empty/empty-stays", "empty/empty-goes", "empty/empty-filled"):
        user.empty(name)
    for name in ("keep", "turned", "goes", "to-file"):
        user.symlink(f"sym/{name}")
    user.symlink("sym/inside", "../doc/quiet.txt")
    for first in ("group-1", "split-1", "drop-1", "b-group-1"):
        user.link(f"links/{first}", f"links/{first[:-1]}2")
    user.link("links/group-1", "links/sub/group-3")
    user.mkdir("dirs/bare")
    user.mkdir("del/bare")
    user.set_xattr("meta/xattr-changed.txt", "user.colour", b"blue")
    user.set_xattr("meta/xattr-removed.txt", "user.colour", b"blue")
    user.set_xattr("meta/folder", "user.folder", b"yes")


_SMALL = """
doc/quiet.txt doc/inplace.txt doc/over.txt doc/backup.txt doc/unseen.txt doc/b-inplace.txt
doc/b-over.txt doc/b-backup.txt
mv/plain.txt mv/cross.txt mv/over-source.txt mv/over-target.txt mv/edited.txt mv/met-by-edit.txt
mv/both.txt mv/one.txt mv/two.txt mv/chain-1 mv/chain-2 mv/b-plain.txt mv/b-edited.txt mv/saved.txt
dirs/plain/1 dirs/plain/2 dirs/plain/sub/3 dirs/nested/in/1 dirs/nested/in/2 dirs/host/h
dirs/grown/1 dirs/edited/1 dirs/edited/2 dirs/reborn/1 dirs/reborn/2 dirs/b-plain/1 dirs/b-plain/2
dirs/outer/inner/1 dirs/outer/2 dirs/dissolved/sub/1 dirs/dissolved/2
swap/p swap/q swap/folder-p/1 swap/folder-q/1 swap/b-p swap/b-q rot/1 rot/2 rot/3
del/file.txt del/tree/1 del/tree/2 del/tree/sub/3 del/b-file.txt del/b-tree/1 del/both.txt
del/reborn.txt
dve/a-deletes.txt dve/b-deletes.txt dve/folder/edited dve/folder/1 dve/folder/2 dve/left/moved
dve/left/1 dve/a-moves.txt
links/solo links/base links/group-1 links/split-1 links/drop-1 links/b-group-1
meta/mode.txt meta/owner.txt meta/touched.txt meta/xattr-added.txt meta/xattr-changed.txt
meta/xattr-removed.txt meta/mode-and-edit.txt meta/both-modes.txt meta/b-mode.txt meta/b-owner.txt
meta/folder/1
kinds/file-to-folder kinds/folder-to-file/1 kinds/folder-to-file/2 kinds/file-to-link
kinds/link-target kinds/b-file-to-folder kinds/folder-to-link/1 kinds/file-meets-folder
conf/small.txt conf/touched.txt conf/replaced.txt conf/saved.txt
""".split()


def perturb(alpha: User, beta: User) -> None:
    """Let both users work on the agreed tree."""
    create(alpha, beta)
    edit(alpha, beta)
    move_files(alpha, beta)
    move_folders(alpha, beta)
    exchange_names(alpha, beta)
    delete(alpha, beta)
    delete_against_change(alpha, beta)
    change_links(alpha, beta)
    change_attributes(alpha, beta)
    change_kinds(alpha, beta)
    disagree(alpha, beta)


def create(alpha: User, beta: User) -> None:
    alpha.write("new/a.txt")
    alpha.write("new/a-large.bin", LARGE)
    alpha.empty("new/empty-a")
    alpha.write("new/deep/er/still/a.txt")
    alpha.write("odd/ leading and trailing ")
    alpha.write("odd/line\nbreak\x1b[1m")
    alpha.write("odd/not-utf8-\udcff\udcfe")
    alpha.write(f"odd/{'n' * 255}")
    beta.write("b-new/b.txt")
    beta.write("b-new/b-large.bin", LARGE)
    beta.empty("b-new/empty-b")
    beta.write("still/beside-quiet.txt")


def edit(alpha: User, beta: User) -> None:
    alpha.edit("doc/inplace.txt")
    alpha.edit("doc/large.bin")
    alpha.edit("doc/huge.bin")
    alpha.save_over("doc/over.txt")
    alpha.save_over("doc/large-over.bin", LARGE + 7)
    alpha.save_backup("doc/backup.txt")
    alpha.edit_unseen("doc/unseen.txt")
    alpha.write("empty/empty-filled", 321)
    beta.edit("doc/b-inplace.txt")
    beta.save_over("doc/b-over.txt")
    beta.save_backup("doc/b-backup.txt")


def move_files(alpha: User, beta: User) -> None:
    alpha.move("mv/plain.txt", "mv/plain-moved.txt")
    alpha.move("mv/large.bin", "elsewhere/large-moved.bin")  # 17
    alpha.move("mv/cross.txt", "doc/crossed.txt")
    alpha.move("mv/over-source.txt", "mv/over-target.txt")  # 14
    alpha.move("mv/edited.txt", "mv/edited-moved.txt")  # 7
    alpha.edit("mv/edited-moved.txt")
    alpha.move("mv/met-by-edit.txt", "mv/met-moved.txt")  # 8
    beta.edit("mv/met-by-edit.txt")
    alpha.move("mv/both.txt", "mv/both-at-alpha.txt")  # 10
    beta.move("mv/both.txt", "mv/both-at-beta.txt")
    alpha.move("mv/one.txt", "mv/wanted.txt")  # 13
    beta.move("mv/two.txt", "mv/wanted.txt")
    alpha.move("mv/chain-2", "mv/chain-3")  # 4
    alpha.move("mv/chain-1", "mv/chain-2")
    alpha.write("mv/chain-1")
    alpha.save_backup("mv/saved.txt")  # 81 against an edit: the edit meets the name
    beta.edit("mv/saved.txt")
    beta.move("mv/b-plain.txt", "mv/b-moved.txt")
    beta.move("mv/b-edited.txt", "mv/b-edited-moved.txt")
    beta.edit("mv/b-edited-moved.txt")


def move_folders(alpha: User, beta: User) -> None:
    alpha.move("dirs/plain", "dirs/plain-moved")
    alpha.move("dirs/nested/in", "dirs/host/in")
    alpha.edit("dirs/host/in/1")
    alpha.move("dirs/grown", "dirs/grown-moved")  # 20
    beta.write("dirs/grown/new")
    alpha.move("dirs/edited", "dirs/edited-moved")  # 21
    beta.edit("dirs/edited/1")
    alpha.move("dirs/reborn", "dirs/reborn-moved")  # 29
    alpha.write("dirs/reborn/1")
    alpha.write("dirs/reborn/2")
    alpha.move("dirs/outer/inner", "dirs/inner")  # 28
    alpha.move("dirs/outer", "dirs/inner/outer")
    alpha.move("dirs/dissolved/sub", "dirs/rescued")  # 27
    alpha.delete_tree("dirs/dissolved")
    beta.move("dirs/b-plain", "dirs/b-host/b-plain-moved")


def exchange_names(alpha: User, beta: User) -> None:
    alpha.rotate("swap/p", "swap/q")  # 2
    alpha.rotate("swap/folder-p", "swap/folder-q")
    alpha.rotate("rot/1", "rot/2", "rot/3")  # 5
    beta.rotate("swap/b-p", "swap/b-q")


def delete(alpha: User, beta: User) -> None:
    alpha.delete("del/file.txt")
    alpha.delete_tree("del/tree")
    alpha.delete_tree("del/bare")
    alpha.delete("empty/empty-goes")
    alpha.delete("sym/goes")
    alpha.delete("del/reborn.txt")
    alpha.write("del/reborn.txt", 777)
    alpha.delete("del/both.txt")  # 48
    beta.delete("del/both.txt")
    beta.delete("del/b-file.txt")
    beta.delete_tree("del/b-tree")


def delete_against_change(alpha: User, beta: User) -> None:
    alpha.delete("dve/a-deletes.txt")  # 46
    beta.edit("dve/a-deletes.txt")
    beta.delete("dve/b-deletes.txt")
    alpha.edit("dve/b-deletes.txt")
    alpha.delete_tree("dve/folder")  # 47
    beta.edit("dve/folder/edited")
    alpha.delete_tree("dve/left")  # 23
    beta.move("dve/left/moved", "dve/moved-out")
    alpha.move("dve/a-moves.txt", "dve/a-moved.txt")  # 9
    beta.delete("dve/a-moves.txt")


def change_links(alpha: User, beta: User) -> None:
    alpha.link("links/base", "links/base-again")  # 67
    alpha.edit("links/sub/group-3")  # 65
    alpha.save_over("links/split-2")  # 66
    alpha.delete("links/drop-1")
    beta.link("links/solo", "links/sub/solo-again")
    beta.edit("links/b-group-2")
    alpha.symlink("sym/new")
    alpha.symlink("sym/turned")
    beta.symlink("sym/b-new", "nowhere/at all")


def change_attributes(alpha: User, beta: User) -> None:
    alpha.chmod("meta/mode.txt", 0o751)
    alpha.chown("meta/owner.txt", 4321, 4322)
    alpha.touch("meta/touched.txt")
    alpha.set_xattr("meta/xattr-added.txt", "user.shape", b"\x00round\xff")
    alpha.set_xattr("meta/xattr-changed.txt", "user.colour", b"red")
    alpha.remove_xattr("meta/xattr-removed.txt", "user.colour")
    alpha.chmod("meta/folder", 0o2770)
    alpha.chmod("meta/mode-and-edit.txt", 0o600)  # 57
    beta.edit("meta/mode-and-edit.txt")
    alpha.chmod("meta/both-modes.txt", 0o640)  # 58
    beta.chmod("meta/both-modes.txt", 0o604)
    beta.chmod("meta/b-mode.txt", 0o4755)
    beta.chown("meta/b-owner.txt", 4323, 0)


def change_kinds(alpha: User, beta: User) -> None:
    alpha.delete("kinds/file-to-folder")  # 63
    alpha.write("kinds/file-to-folder/1")
    alpha.delete_tree("kinds/folder-to-file")
    alpha.write("kinds/folder-to-file")
    alpha.delete("kinds/file-to-link")
    alpha.symlink("kinds/file-to-link", "link-target")
    alpha.delete_tree("kinds/folder-to-link")
    alpha.symlink("kinds/folder-to-link", "file-to-folder")
    alpha.delete("sym/to-file")
    alpha.write("sym/to-file")
    beta.delete("kinds/b-file-to-folder")
    beta.write("kinds/b-file-to-folder/1")
    alpha.delete("kinds/file-meets-folder")  # 59
    alpha.write("kinds/file-meets-folder/1")
    beta.edit("kinds/file-meets-folder")


def disagree(alpha: User, beta: User) -> None:
    alpha.edit("conf/small.txt")  # 41
    beta.edit("conf/small.txt")
    beta.edit("conf/large.bin")
    alpha.edit("conf/large.bin")
    alpha.touch("conf/touched.txt")  # 56
    beta.save_over("conf/touched.txt")
    alpha.delete("conf/replaced.txt")  # 51
    alpha.write("conf/replaced.txt")
    beta.edit("conf/replaced.txt")
    alpha.save_over("conf/saved.txt")
    beta.save_over("conf/saved.txt")
    alpha.write("conf/both-new.txt")  # 43
    beta.write("conf/both-new.txt")
    alpha.write("conf/both-new-folder/a")  # 44
    beta.write("conf/both-new-folder/b")
