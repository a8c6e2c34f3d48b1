"""Two-phase commits of the ancestor: prepared on both sides, then committed on both."""

import json
import os
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.node import ROOT, SIDES, NodeId, Side
from bisync.core.plan import Placements, Update, homeless
from bisync.core.rows import update_to_list
from bisync.endpoint.interface import AgreedCopy, Endpoint, Hello
from bisync.errors import HaltError
from bisync.fs.archive import Commit, Epoch
from bisync.fs.recovery import Recovered
from bisync.session.config import AfterRestore, Config

_MOST = 8 << 20  # bytes of one commit; what crosses to another machine has to fit a message
_KEEP_SIDES = "run again with --after-restore forward, keep or merge (see the documentation)"


class Ledger(Struct, frozen=True):
    """Both sides' copies of one ancestor."""

    archives: tuple[AgreedCopy, AgreedCopy]
    near: Side = Side.ALPHA  # whose copy lookups use: one that is near, if one is

    @property
    def lead(self) -> AgreedCopy:
        """The copy that lookups use; both are equal between commits."""
        return self.archives[self.near]

    def row(self, update: Update, versions: tuple[int, int]) -> list[Any]:
        """One update as it is written, in columns; a list for JSON."""
        if self.lead.flipped:
            swapped = Update(
                key=update.key,
                names=update.names,
                content=update.content,
                ids=(update.ids[1], update.ids[0]),
                attributes=(update.attributes[1], update.attributes[0]),
                presumed=update.presumed,
            )
            return update_to_list(swapped, (versions[1], versions[0]))
        return update_to_list(update, versions)

    def commit(self, rows: list[list[Any]], reasons: dict[int, str] | None = None) -> None:
        """Write rows on both sides, so that any crash leaves a state both can tell.

        Args:
            rows: see :meth:`row`.
            reasons: why, by archive number, for people.
        """
        if not rows:
            return
        payload = json.dumps(rows, separators=(",", ":")).encode()
        if len(payload) > _MOST and len(rows) > 1:
            # Each half stands for itself: what a crash leaves out is agreed on by the next run.
            half = len(rows) // 2
            self.commit(rows[:half], reasons)
            self.commit(rows[half:], reasons)
            return
        last = self.lead.state().epoch
        epoch = Epoch(last.number + 1, os.urandom(16).hex(), last.nonce)
        commit = Commit(epoch, payload)
        for archive in self.archives:
            archive.prepare(commit)
        for archive in self.archives:
            archive.reasons = reasons or {}
            archive.commit(rows)

    def settle(self) -> None:
        """Bring commits that a crash interrupted to one end on both sides."""
        waiting = [archive.prepared() for archive in self.archives]
        states = [archive.state() for archive in self.archives]
        for side in SIDES:
            mine, other = waiting[side], waiting[side.other]
            if mine is None:
                continue
            committed_there = states[side.other].epoch.nonce == mine.epoch.nonce
            both = other is not None and other.epoch.nonce == mine.epoch.nonce
            if committed_there or both:
                self.archives[side].commit()
            else:
                self.archives[side].drop_prepared()

    def compare(self, config: Config, paths: tuple[str, str]) -> list[str]:
        """Find out whether both copies stand at the same link; repair what can be.

        Returns:
            What a person should hear.

        Raises:
            HaltError: one side was restored from a backup, and nobody said what to do.
        """
        epochs = [archive.state().epoch for archive in self.archives]
        if epochs[0].nonce == epochs[1].nonce:
            return []
        for side in SIDES:
            mine, theirs = epochs[side], self.archives[side.other].nonces()
            if not mine.nonce:
                self.clear()
                return [f"{paths[side]}: its state was lost; {config.merging}"]
            if mine.nonce in theirs:
                return self._restored(side, config, paths[side])
        self.clear()
        return [f"the sides' histories differ; {config.merging}"]

    def _restored(self, older: Side, config: Config, path: str) -> list[str]:
        after = config.after_restore
        if after is None:
            raise HaltError(
                f"{path}: its state is older than its peer's, as after a restored backup or "
                f"snapshot; nothing was touched; {_KEEP_SIDES}"
            )
        if after is AfterRestore.MERGE:
            self.clear()
            return [f"{path}: restored; {config.merging}"]
        source = older if after is AfterRestore.FORWARD else older.other
        target = source.other
        for rows in self.archives[source].rows():
            self.archives[target].load(rows)
        self.archives[target].adopt(self.archives[source].chain())
        for archive in self.archives:
            archive.forget_ids(archive.column(older))
        return [
            f"{path}: restored; going on from the {'older' if source is older else 'newer'} state"
        ]

    def clear(self) -> None:
        """Forget everything agreed, on both sides."""
        for archive in self.archives:
            archive.forget()

    def leave_halfway(self, side: Side, placed: Placements, agreed: set[int]) -> None:
        """Remember what was moved but is not agreed on: no plan must take that for a wish.

        Only nodes that were at an agreed name before; where a user had moved one, what came
        of it since is still an answer to that.
        """
        waiting = {n: p for n, p in placed.items() if p.key not in agreed}
        names = self.lead.names_of({p.key for p in waiting.values()})
        parents = self.lead.nodes({parent for places in names.values() for parent, _ in places})
        local: dict[int, NodeId | None] = {key: node.ids[side] for key, node in parents.items()}
        local[ROOT] = ROOT
        found = {}
        for node, p in waiting.items():
            if p.first in {(local.get(parent), name) for parent, name in names.get(p.key, ())}:
                found[node] = p.last
        self.archives[side].leave_halfway(found)

    def _believed(
        self, side: Side, found: Recovered, sides: tuple[Endpoint, Endpoint]
    ) -> dict[int, tuple[Update, tuple[int, int]]]:
        """The rows of a log that count: of a far one, those that the other side does not deny.

        A log can only speak for its own side. What it says of the other one's content must not be
        what that side knows better. What was written to there since, or is gone from there, is an
        edit, or a deletion, of what was copied; what a killed run had read is not remembered.
        """
        mine, theirs = self.lead.column(side), self.lead.column(side.other)
        ids = [update.ids for update, _ in found.updates.values()]
        here = sides[side].nodes({each[mine] for each in ids if each[mine]})
        there = sides[side.other].nodes({each[theirs] for each in ids if each[theirs]})
        believed = {}
        for key, (update, versions) in found.updates.items():
            content, own = update.content, here.get(update.ids[mine] or 0)
            unread = content is not None and not content.known and not update.presumed
            if unread and own is not None and own.version == versions[mine]:
                # Its digest came with what was made.
                update = replace(update, content=own.content)
            node = there.get(update.ids[theirs] or 0)
            denied = False
            if node is not None and node.version == versions[theirs]:
                if node.content.known:
                    denied = node.content != update.content
                elif not update.presumed:
                    # Whether it had a writer is forgotten as well: it is read again, and compared.
                    versions = (-1, versions[1]) if theirs == 0 else (versions[0], -1)
            if not (update.names and denied and sides[side].is_far):
                believed[key] = update, versions
        return believed

    def replay(
        self, recovered: tuple[Recovered, Recovered], sides: tuple[Endpoint, Endpoint]
    ) -> None:
        """Let what both logs prove to be applied count as agreed."""
        failed = recovered[0].failed | recovered[1].failed
        parents = self.lead.nodes(
            {p for r in recovered for u, _ in r.updates.values() for p, _ in u.names}
        )
        found: dict[int, tuple[Update, tuple[int, int]]] = {}
        for side, r in zip(SIDES, recovered, strict=True):
            for key, row in self._believed(side, r, sides).items():
                if key in r.performed and key not in failed:
                    found.setdefault(key, row)
        lost = homeless({key: update for key, (update, _) in found.items()}, parents)
        done = found.keys() - lost
        rows = [update_to_list(*found[key]) for key in found if key in done]
        for side in SIDES:
            self.leave_halfway(side, recovered[side].placed, done)
        self.commit(rows)
        for archive in self.archives:
            archive.forget_results()


def open_ledger(sides: tuple[Endpoint, Endpoint], hellos: tuple[Hello, Hello]) -> Ledger:
    """Both copies of the ancestor of a pair.

    Columns follow the replica ids, so they stay what they are whichever side drives.
    """
    flipped = hellos[0].replica > hellos[1].replica
    columns = (1, 0) if flipped else (0, 1)
    return Ledger(
        (
            sides[0].archive(hellos[1], column=columns[0], flipped=flipped),
            sides[1].archive(hellos[0], column=columns[1], flipped=flipped),
        ),
        near=Side.BETA if sides[0].is_far and not sides[1].is_far else Side.ALPHA,
    )
