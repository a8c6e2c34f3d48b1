"""``destination := source``, once: walk the sources, observe the destination, make it so."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator

from bisync.core.groups import Together, databases_in
from bisync.core.ignore import Matcher
from bisync.core.items import Item
from bisync.core.mirror import Doomed, Mirror, MirrorPlan
from bisync.core.node import ROOT, Kind, NodeId, Side
from bisync.core.pairing import Pairing, Pairs
from bisync.core.path import STORE_DIR, display
from bisync.core.plan import Make, Park, Remove, Replace, Transition, keys_of
from bisync.core.safety import HOUR_NS, DeleteLimit, withhold
from bisync.core.safety import Wanted as WantedDeletions
from bisync.core.wish import Held, Seen
from bisync.delta.digest import digest_of
from bisync.endpoint.destination import Destination
from bisync.endpoint.interface import Tree
from bisync.errors import BisyncError, EndpointError, Interrupted
from bisync.fs.memory import Lesson
from bisync.fs.replica import Options
from bisync.fs.result import Result, Status
from bisync.fs.walk import ScanRules
from bisync.session.mirrorconfig import MirrorConfig, MirrorReport
from bisync.session.mirrorplace import (
    MirrorPlace,
    backup_place,
    find_place,
    refuse_overlap,
    refuse_own_source,
)
from bisync.session.origin import LocalOrigin, Origin
from bisync.session.protection import Protection
from bisync.session.report import Change, Listener, Met, Progress, met_from
from bisync.session.storemerge import is_store, merge_into

_BATCH = 2000  # steps applied at a time
_BATCH_SIZE = 1 << 30  # bytes of content
_ROUNDS = 3  # how often what changed under our hands is looked at again
_LIMIT = DeleteLimit()


class MirrorRun:
    """One run. ``destination`` is spelled as on rsync's command line."""

    def __init__(
        self,
        origin: Origin,
        destination: bytes,
        config: MirrorConfig,
        listener: Listener,
        *,
        dry: bool,
        place: MirrorPlace | None = None,
    ) -> None:
        self.place = place  # instead of what rsync's rules make of the destination
        self.origin = origin
        self.destination = destination
        self.config = config
        self.tell = listener
        self.dry = dry
        self.report = MirrorReport()

    def run(self) -> MirrorReport:
        """Make the destination what the sources are.

        Raises:
            UsageError: the request makes no sense.
            RootLockedError, HaltError, EndpointError: as for a session.
        """
        try:
            self._run()
        except OSError as error:
            raise EndpointError(f"{error.filename or 'a folder'}: {error.strerror}") from error
        except BisyncError as error:
            self.report.error = str(error)
            self.report.exit_code = error.exit_code
            if isinstance(error, Interrupted):
                self.report.exit_code = 128 + error.signum
            self.report.finish()
            error.report = self.report  # type: ignore[attr-defined]
            raise
        self.report.finish()
        return self.report

    # -- opening -------------------------------------------------------------

    def _run(self) -> None:
        tree = self._walk(None)
        if tree.root is None and not any(each.entries for each in tree.listings):
            self._tell_source(tree)  # nothing to make anything of
            if self.destination.endswith(b"/") and not self.dry:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.destination)
            tree.close()
            return
        try:
            place = self.place
            if place is None:
                place = find_place(self.destination, tree, self.config, dry=self.dry)
                target = MirrorPlace(os.path.realpath(self.destination), b"")
                refuse_overlap(self.origin.paths, place or target, self.config)
                if not self.origin.paths and not tree.only_named:
                    refuse_own_source((place or target).folder, set(tree.identity.split(" ")))
        except BaseException:
            tree.close()
            raise
        if place is None:
            self._pretend(tree)
            return
        try:
            self._go(tree, place)
        finally:
            tree.close()

    def _go(self, tree: Tree, place: MirrorPlace) -> None:
        if place.name is not None:
            tree.rename_single(place.name)
        side = Destination(place.root, place.below, self._options(place), dry=self.dry)
        try:
            side.open()
            for text in side.messages:
                self._note(b"", text)
            for path, reason in side.problems:
                self._met(Met("beta", "problem", path, reason))
            for number in range(_ROUNDS):
                stale = self._round(side, tree, first=number == 0)
                if not stale:
                    return
                if number == _ROUNDS - 1:
                    for path, reason in stale.items():
                        self._met(Met("beta", "busy", path, reason))
                    return
                tree.close()
                tree = self._walk(place.name)
        finally:
            tree.close()
            side.close()

    def _options(self, place: MirrorPlace) -> Options:
        c = self.config
        store, day = STORE_DIR, None
        if c.backup_dir is not None:
            store, day = backup_place(c.backup_dir, place)
        return Options(
            rules=ScanRules(Matcher(()), store, specials=True, devices=True),
            store=store,
            store_day=day,
            state_dir=c.state_dir,
            workers=c.workers,
            fsync=c.fsync,
            whole_files=c.whole_files,
            apply=c.apply,
            stop=c.stop,
            wait_s=c.wait_s,
            arrived=lambda name, done, total, literal: self.tell(
                Progress("file", 0, done, display(name), total, literal)
            ),
        )

    def _walk(self, name: bytes | None) -> Tree:
        """Walk the sources; a single file may get another name."""
        began = time.monotonic()
        tree = self.origin.walk(self.config)
        self.report.walk_s = time.monotonic() - began
        if name is not None:
            tree.rename_single(name)
        return tree

    def _pretend(self, tree: Tree) -> None:
        """A dry run into a destination that is not there: everything would be new."""
        try:
            self._tell_source(tree)
            wish = self.config.wish
            for each in tree.listings:
                for seen in each.entries:
                    if wish.existing or not wish.within_size(seen):
                        continue
                    letter = {Kind.FILE: ">f", Kind.DIR: "cd", Kind.SYMLINK: "cL"}
                    path = each.path + b"/" + seen.name if each.path else seen.name
                    letters = letter.get(seen.kind, "cD") + "+++++++++"
                    target = seen.content.target or None
                    size = seen.content.size
                    self.report.items.append(Item(letters, path, seen.is_dir, target, size=size))
                    self.report.created += 1
        finally:
            tree.close()

    # -- one round -----------------------------------------------------------

    def _round(self, side: Destination, tree: Tree, *, first: bool) -> dict[bytes, str]:
        """Compare and apply; return what has to be looked at again, and why."""
        if first:
            self._tell_source(tree)
        found = side.scan(lambda n: self.tell(Progress("scan", n)))
        self.report.files_scanned += found.entries if first else 0
        for problem in found.problems:
            if problem.kind in ("problem", "boundary"):
                self._met(met_from("beta", problem))
        identity = tree.identity
        before = side.remember(digest_of(tree.location).hex(), identity)
        assert side.memory is not None
        protection = Protection(self.config.filters, side, self._complete(tree))
        pairing = Pairing(
            self.config.wish,
            side.memory,
            tree,
            side.base,
            lambda held: not protection.covers(held),
        )
        self._pair(pairing, tree)
        pairs = pairing.finish()
        folders = {each.key: each for each in tree.listings}
        for seen, reason in pairs.blocked:
            if folders[seen.key].entries:
                self._met(Met("beta", "problem", folders[seen.key].path, reason))
        mirror = Mirror(
            self.config.wish,
            pairs,
            side.memory,
            protection,
            (tree.digest, side.digest),
            time.time_ns(),
        )
        doomed = self._judge(mirror, side, tree, changed=bool(before) and before != identity)
        plan = mirror.plan(side.side.numbers(), tree.root)
        self._tell_plan(plan, doomed)
        if self.dry:
            return {}
        results = self._apply(side, tree, plan)
        failed = _failed(results)
        doomed = [each for each in doomed if each.key not in failed]
        self._tell_deleted(doomed)
        self._settle(pairs, plan, results)
        self._set_times(side, plan, results)
        side.finish(
            self._lessons(side, tree, pairs, plan, results), self._count(doomed), time.time_ns()
        )
        for path in side.side.probe_displaced(min_age_ns=HOUR_NS).back:
            self._met(Met("beta", "busy", path, "was written while it was replaced; both stay"))
        if self.config.retention is not None:
            for text in side.side.tend(self.config.retention):
                self._note(b"", text)
        for result in results:
            if not self.config.keep and result.kept is not None:  # rsync's way
                side.store.discard(result.kept)
        return self._stale(side, plan, results)

    def _complete(self, tree: Tree) -> dict[bytes, bool]:
        """The directories of the source by path, and whether all they hold was seen."""
        return {
            each.path: each.complete and not self._is_partial(each.key, tree)
            for each in tree.listings
        }

    def _pair(self, pairing: Pairing, tree: Tree) -> None:
        refused: set[int] = set()
        complete_at = self._complete(tree)
        for listed in tree.listings:
            if listed.key in refused:
                refused.update(s.key for s in listed.entries if s.is_dir)
                continue
            complete = complete_at[listed.path]
            onwards = pairing.directory(
                listed.key, listed.entries, listed.passed, complete=complete
            )
            refused |= {s.key for s in listed.entries if s.is_dir} - {s.key for s in onwards}

    @staticmethod
    def _is_partial(key: int, tree: Tree) -> bool:
        """The top of a destination that gets single names keeps what else it has."""
        return key == ROOT and tree.only_named

    # -- what goes -----------------------------------------------------------

    def _judge(
        self, mirror: Mirror, side: Destination, tree: Tree, *, changed: bool
    ) -> list[Doomed]:
        """Let the guards speak about the deletions; what they withhold stays."""
        doomed = list(mirror.deletions())
        if not doomed:
            return doomed
        c = self.config
        if tree.failed and not c.ignore_errors:
            self._note(b"", "the source could not be read completely; nothing is deleted")
            mirror.spare({d.key for d in doomed})
            return []
        reason = None
        empty = not any(each.entries for each in tree.listings)
        if changed and not c.yes:
            reason = "the source is another one than last time"
        elif empty and not c.yes:
            reason = f"the source is completely empty; {len(doomed)} deletions withheld"
        elif c.max_delete is None and not c.yes:
            wanted = WantedDeletions(
                count=len(doomed),
                done_this_hour=side.deleted_since(time.time_ns() - HOUR_NS),
                entries=side.entries(),
                emptied=False,
            )
            reason = withhold(wanted, _LIMIT)
        spared: set[int] = set()
        if reason is not None:
            spared = {d.key for d in doomed}
            reason = f"{reason}; approve with --yes"
        elif c.max_delete is not None and len(doomed) > c.max_delete:
            spared = {d.key for d in doomed[c.max_delete :]}
            reason = f"{len(spared)} deletions skipped due to --max-delete={c.max_delete}"
        if reason is not None:
            self.report.withheld += len(spared)
            self._met(Met("beta", "withheld", b"", reason))
            mirror.spare(spared)
        return [d for d in doomed if d.key not in spared]

    def _count(self, doomed: list[Doomed]) -> int:
        for each in doomed:
            self.report.deleted_kinds[each.is_dir] = (
                self.report.deleted_kinds.get(each.is_dir, 0) + 1
            )
        return len(doomed)

    # -- doing it ------------------------------------------------------------

    def _apply(self, side: Destination, tree: Tree, plan: MirrorPlan) -> list[Result]:
        results: list[Result] = []
        steps = plan.plan.steps[Side.BETA]
        databases = databases_in(steps, tree.database)
        for batch, mine in _batches(steps, databases):
            done = side.apply(batch, tree, mine)
            for result in done:
                self._tell_result(side, plan, result)
            results += done
            self.tell(Progress("apply", len(results), self.report.transferred_bytes))
        return results

    def _tell_result(self, side: Destination, plan: MirrorPlan, result: Result) -> None:
        step, report = result.step, self.report
        item = plan.items.get(step.key)
        path = item.path if item is not None else side.side.path(step.node) or b"?"
        match result.status:
            case Status.DONE:
                report.bytes_sent += result.size
                report.literal_bytes += result.size
                report.matched_bytes += result.matched
                report.kept += result.kept is not None
                if result.reason:
                    self._met(Met("beta", "problem", path, result.reason))
                for text in result.missed:
                    self._note(path, f"not set: {text}")
            case Status.STALE:
                pass  # looked at again
            case status:
                self._met(Met("beta", status.value, path, result.reason))

    @staticmethod
    def _stale(side: Destination, plan: MirrorPlan, results: list[Result]) -> dict[bytes, str]:
        """What changed under our hands, by path."""
        found = {}
        for result in results:
            if result.status is Status.STALE:
                item = plan.items.get(result.step.key)
                path = item.path if item is not None else side.side.path(result.step.node)
                found[path or b"?"] = result.reason
        return found

    def _settle(self, pairs: Pairs, plan: MirrorPlan, results: list[Result]) -> None:
        """Count what was done."""
        failed = _failed(results)
        for key, item in plan.items.items():
            if key in failed:
                continue
            seen = pairs.seen.get(key)
            self.report.items.append(item)
            if seen is None:
                continue
            self._count_item(seen, plan, item)
        for doomed in (r.step for r in results if r.status is Status.DONE):
            if isinstance(doomed, Remove):
                self.report.deleted += 1 + len(doomed.members)

    def _count_item(self, seen: Seen, plan: MirrorPlan, item: Item) -> None:
        report = self.report
        new = item.letters.endswith("+++++++++")
        if item.old_path is not None:
            report.moves += 1
        if new:
            report.created += 1
            report.created_kinds[seen.kind] = report.created_kinds.get(seen.kind, 0) + 1
        elif item.old_path is None:
            report.updated += 1
        if seen.key in plan.copies and seen.kind is Kind.FILE:
            report.transferred += 1
            report.transferred_bytes += seen.content.size
        action = "create" if new else "move" if item.old_path is not None else "update"
        if not new and item.letters[0] == "." and item.old_path is None:
            action = "attributes"
        self.tell(Change("beta", action, item.path, "", item.old_path, seen.content.size))

    def _set_times(self, side: Destination, plan: MirrorPlan, results: list[Result]) -> None:
        """Directory times, deepest first, when nothing else is left to do."""
        failed = _failed(results)
        nodes = {**plan.nodes, ROOT: side.base}
        times = [(nodes[k], t, True) for k, t in plan.times if k in nodes and k not in failed]
        _, bad = side.side.set_directory_times(list(reversed(times)))
        for node, reason in bad.items():
            path = side.side.path(node) or b"."
            self._met(Met("beta", "problem", path, reason))

    def _lessons(
        self,
        side: Destination,
        tree: Tree,
        pairs: Pairs,
        plan: MirrorPlan,
        results: list[Result],
    ) -> list[Lesson]:
        """What is equal now, and is not yet remembered so."""
        failed = _failed(results)
        fresh: list[tuple[Seen, NodeId]] = []
        for key, seen in pairs.seen.items():
            node = plan.nodes.get(key)
            if key in failed or node is None or key in pairs.shared:
                continue
            held = pairs.held[key]
            memory = held.memory if held is not None else None
            guessed = key not in plan.copies and memory is None and not seen.is_dir
            if guessed and held is not None and not self._is_told(seen, held):
                continue
            now = (seen.ino, seen.attributes.mtime_ns, seen.ctime_ns)
            known = memory is not None and (memory.ino, memory.mtime_ns, memory.ctime_ns) == now
            if known and key not in plan.copies:
                continue
            seen.handle = seen.handle or tree.handle(seen)
            if seen.handle:
                fresh.append((seen, node))
        nodes = side.side.nodes([node for _, node in fresh])
        found = []
        for seen, node in fresh:
            there = nodes.get(node)
            same = there is not None and there.kind is seen.kind
            if same and seen.kind is Kind.FILE and there is not None:
                same = there.content.size == seen.content.size
            if there is not None and same:
                found.append(Lesson(seen, there))
        return found

    def _is_told(self, seen: Seen, held: Held) -> bool:
        """Whether equal times, or contents that were read, say that a file is up to date.

        What is taken for equal within a ``--modify-window`` is looked at again the next time.
        """
        wish = self.config.wish
        same = seen.attributes.mtime_ns == held.node.attributes.mtime_ns
        return wish.times and (same or wish.checksum)

    # -- telling -------------------------------------------------------------

    def _tell_source(self, tree: Tree) -> None:
        for path, reason in tree.problems:
            self._met(Met("alpha", "problem", path, reason))
        for path, text in tree.notes:
            self._note(path, text)
        self.report.listed = [seen for each in tree.listings for seen in each.entries]
        if tree.root is not None:
            self.report.listed.insert(0, tree.root)
        self.report.files_scanned += len(self.report.listed)

    def _tell_plan(self, plan: MirrorPlan, doomed: list[Doomed]) -> None:
        for path, reason in plan.problems:
            self._met(Met("beta", "problem", path, reason))
        for _, _, reason in plan.plan.blocked:
            self._met(Met("beta", "problem", b"", reason))
        if self.dry:
            self._tell_deleted(doomed)
            self.report.items += plan.items.values()
            self.report.deleted += len(doomed)
            for item in plan.items.values():
                new = item.letters.endswith("+++++++++")
                self.report.created += new
                self.report.moves += item.old_path is not None
                self.report.updated += not new and item.old_path is None

    def _tell_deleted(self, doomed: list[Doomed]) -> None:
        for each in doomed:
            self.report.items.append(Item("*deleting  ", each.path, each.is_dir))
            self.tell(Change("beta", "delete", each.path, "not in the source"))

    def _met(self, met: Met) -> None:
        if self.report.add(met):
            self.tell(met)

    def _note(self, path: bytes, text: str) -> None:
        self.tell(Met("", "note", path, text))


def _failed(results: list[Result]) -> set[int]:
    """The keys with a step that was not done."""
    return {k for r in results if r.status is not Status.DONE for k in keys_of(r.step)}


def _batches(
    steps: list[Transition], databases: list[Together]
) -> Iterator[tuple[list[Transition], list[Together]]]:
    """Steps in batches, with the databases in them.

    A parked node gets its name again, and a database is done, in the batch that began it.
    """
    of_key = {key: group for group in databases for key in group.keys}
    left = Counter(of_key[step.key] for step in steps if step.key in of_key)
    batch: list[Transition] = []
    parked: set[NodeId] = set()
    begun: set[Together] = set()
    size = 0
    for step in steps:
        batch.append(step)
        if isinstance(step, Park):
            parked.add(step.node)
        elif not isinstance(step, Replace):
            parked.discard(step.node)
        group = of_key.get(step.key)
        if group is not None:
            begun.add(group)
            left[group] -= 1
        size += step.content.size if isinstance(step, Make | Replace) else 0
        full = len(batch) >= _BATCH or size >= _BATCH_SIZE
        if full and not parked and not any(left[group] for group in begun):
            yield batch, list(begun)
            batch, begun, size = [], set(), 0
    if batch:
        yield batch, list(begun)


def mirror_at(
    sources: list[bytes], place: MirrorPlace, config: MirrorConfig, listener: Listener
) -> MirrorReport:
    """Mirror into a folder of a root that is not looked up by its path: links are not followed."""
    origin = LocalOrigin(sources)
    return MirrorRun(origin, place.folder, config, listener, dry=False, place=place).run()


def mirror_from(
    origin: Origin, destination: bytes, config: MirrorConfig, listener: Listener, *, dry: bool
) -> MirrorReport:
    """Make a destination of this machine what an origin has; see :func:`bisync.mirror`."""
    if is_store(destination):
        return merge_into(origin, destination, config, listener, dry=dry)
    return MirrorRun(origin, destination, config, listener, dry=dry).run()
