"""Answers the other end's calls with a root of this machine.

What comes was taken apart by its schema; what it may mean here is decided here: which root, which
filters, what of the ancestor is sound.
"""

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.declared import Declared
from bisync.core.hot import Allowance
from bisync.core.ignore import Matcher
from bisync.core.node import ROOT, Node, Place, Side
from bisync.core.node import Kind as NodeKind
from bisync.core.path import STATE_DIR, STORE_DIR, display, valid_name
from bisync.core.plan import (
    Exchange,
    Make,
    Move,
    Replace,
    SetAttributes,
    Transition,
    place_of,
)
from bisync.core.rows import check_rows
from bisync.endpoint.calls import BY_NUMBER, CALLS, Call, Done, Opening
from bisync.endpoint.channel import Channel
from bisync.endpoint.content import ContentServer, RemoteContent
from bisync.endpoint.glance import AT_A_TIME, Around, Glance, Peers, around
from bisync.endpoint.inline import Inline, changed
from bisync.endpoint.interface import Ending, Hello, Read
from bisync.endpoint.local import LocalEndpoint
from bisync.endpoint.stream import Stream
from bisync.endpoint.watching import Teller
from bisync.errors import EndpointError, Interrupted, UsageError
from bisync.fs.archive import Archive, Chain, Commit
from bisync.fs.claim import Claim
from bisync.fs.conflicts import Quarrel
from bisync.fs.content import ContentSource
from bisync.fs.database import translated
from bisync.fs.displaced import Probed
from bisync.fs.pace import Pace
from bisync.fs.replica import Options
from bisync.fs.result import Result
from bisync.fs.root import enclosing_root
from bisync.fs.walk import ScanRules
from bisync.linux.limits import workers
from bisync.watch.choose import Kind, watch
from bisync.watch.interface import Coverage, Spot, Watcher
from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain, refuse

_SOME = 20_000  # values in one part of an answer
_RESULTS = 500
_LOOK_S = 0.2  # between two looks whether who drives is still there, while somebody waits
_UNHEARD_S = 10.0  # of beats that come each second


class ContentOnly:
    """Gives content of a side, and answers nothing: what the driving end offers."""

    def __init__(self, source: Callable[[], ContentSource]) -> None:
        self._source = source
        self._content = ContentServer(source)

    def want(self, stream: Stream, first: Piece) -> None:
        """Give content."""
        self._content.want(stream, first)

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer whether what is to be read at one instant moved on."""
        del part
        call = CALLS["moved"]
        if letter.about != call.number:
            refuse("a call that nobody answers here")
        (nodes,) = call.takes.unpack(letter.body)
        return call.gives.pack(self._source().moved(nodes))

    def told(self, letter: Letter) -> None:
        """Nothing is told here."""
        refuse(f"word {letter.about} that nobody takes here")


class FarContent(RemoteContent):
    """The content of the other end, from where its files are changed."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._far = channel

    def moved(self, nodes: set[int]) -> bool:
        """Whether files that are to be read at one instant moved on while they were read."""
        if not nodes:
            return False
        call = CALLS["moved"]
        answer = self._far.call(call.number, call.takes.pack((nodes,)))
        return bool(call.gives.unpack(answer))


class Policy(Struct, frozen=True):
    """What the other end may ask for, whatever it wants."""

    changes: bool = True  # anything at all
    prunes: bool = True  # let kept versions go
    devices: bool = True  # make device nodes
    set_id: bool = True  # give bits and attributes that lend power: set-id, capabilities
    commands: bool = True  # run what freezes and thaws programs
    chooses_store: bool = True  # say where kept versions go


ANYTHING = Policy()


class RootService:
    """One root of this machine, worked on by the other end.

    Args:
        locate: which directory a path of the other end means; raises if none.
    """

    def __init__(
        self,
        channel: Channel,
        locate: Callable[[bytes], bytes],
        policy: Policy = ANYTHING,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._asked_to_stop = stop
        self._locate = locate
        self._policy = policy
        self._side: LocalEndpoint | None = None
        self._opening: Opening | None = None
        self._claims: dict[int, Claim] = {}
        self._watcher: Watcher | None = None
        self._teller: Teller | None = None
        self._resting = False  # nothing is in hand, and whoever wants the root may have it
        self._in_hand = threading.RLock()
        self._archives: dict[int, Archive] = {}
        self._content = ContentServer(lambda: self.side)
        self._far = FarContent(channel)

    @property
    def side(self) -> LocalEndpoint:
        """The root.

        Raises:
            ProtocolError: none was opened.
        """
        if self._side is None:
            refuse("a call before a root was opened")
        return self._side

    # -- what the channel asks -----------------------------------------------

    def want(self, stream: Stream, first: Piece) -> None:
        """Give content."""
        self._content.want(stream, first)

    def told(self, letter: Letter) -> None:
        """Nothing is told here."""
        refuse(f"word {letter.about} that nobody takes here")

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer a call."""
        name = BY_NUMBER.get(letter.about)
        if name is None:
            refuse(f"call {letter.about} is not known")
        call = CALLS[name]
        values = call.takes.unpack(letter.body)
        send: Callable[[Any], None] = lambda _value: None  # noqa: E731
        if call.part is not None:
            pack = call.part.pack

            def send(value: Any) -> None:
                part(pack(value))

        with self._in_hand:
            return self._answer(name, call, values, send)

    def _answer(
        self, name: str, call: Call, values: tuple[Any, ...], send: Callable[[Any], None]
    ) -> Plain:
        agreed = name.startswith("agreed.")
        act = getattr(self, "_" + name.replace(".", "_"), None)
        with translated("the state"):
            if act is not None:
                answer = act(*values, send) if call.part is not None else act(*values)
            elif agreed:
                answer = getattr(self._archive_of(values[0]), name[7:])(*values[1:])
            else:
                answer = getattr(self.side, name)(*values)
        return call.gives.pack(
            () if answer is None and call.gives is CALLS["close"].gives else answer
        )

    def close(self) -> None:
        """Give the root back."""
        with self._in_hand:
            side, self._side = self._side, None
            self._archives.clear()
            if side is not None:
                side.close()

    # -- watching --------------------------------------------------------------

    def _watch(self, kind: str, poll_ms: int) -> Coverage:
        """Tell the other end of changes from now on; it goes on while the root is given away."""
        try:
            chosen = Kind(kind)
        except ValueError:
            refuse("a kind of watcher that is not known")
        if self._watcher is not None:
            refuse("to watch what is watched")
        self._teller = Teller(self._channel)
        self._watcher = watch(chosen, self.side.scope(poll_ms / 1000), self._teller)
        return self._watcher.coverage()

    def _drive(self, pair: int, who: str) -> str:
        if pair in self._claims:
            return ""
        found = self.side.drive(self._archive_of(pair), who)
        if isinstance(found, str):
            return found
        self._claims[pair] = found
        if len(self._claims) == 1:
            threading.Thread(target=self._drop_claims, name="bisync-claims", daemon=True).start()
        return ""

    def _drop_claims(self) -> None:
        """Who drives may come again on another connection before this one is known to be dead.

        If it is heard again it has to come again, too: somebody else may drive now.
        """
        channel = self._channel
        while self._claims and not (channel.broken or channel.unheard_s > _UNHEARD_S):
            time.sleep(_LOOK_S)
        if not self._claims:
            return
        self._give_up_claims()
        while not channel.broken and channel.unheard_s > _UNHEARD_S:
            time.sleep(_LOOK_S)
        if not channel.broken:
            channel.give_up("another session may drive")

    def _give_up_claims(self) -> None:
        claims, self._claims = self._claims, {}
        for each in claims.values():
            each.close()

    def _token(self, number: int) -> bool:
        return self._watcher is not None and self._watcher.send_token(number)

    def _coverage(self) -> Coverage:
        if self._watcher is None:
            refuse("what nobody watches")
        return self._watcher.coverage()

    def end(self) -> None:
        """Nobody is at the other end any more."""
        if self._watcher is not None:
            self._watcher.close()
        if self._teller is not None:
            self._teller.close()
        self._give_up_claims()
        self.close()

    # -- turns ---------------------------------------------------------------

    def _wanted(self) -> None:
        """Somebody waits for the root: at rest, it goes at once; and who drives may be gone."""
        while not self._in_hand.acquire(timeout=_LOOK_S):
            if self._given_up():
                return
        try:
            if self._resting:
                self.close()
        finally:
            self._in_hand.release()
        while self._side is not None and self._side.replica.folder.is_wanted:
            if self._given_up():
                return
            time.sleep(_LOOK_S)

    def _given_up(self) -> bool:
        """Whether who drives was not heard for so long that somebody who waits goes first."""
        if self._channel.unheard_s > _UNHEARD_S:
            self._channel.give_up("somebody else waits for the root")
        return self._channel.broken

    def _rest(self) -> None:
        self._resting = True
        self.side.replica.rest()
        if self.side.replica.folder.is_wanted:
            self.close()

    def _wake(self, wait_ms: int | None) -> bool:
        opening = self._opening
        if opening is None:
            refuse("to wake what was not opened")
        self._resting = False
        if self._side is not None:
            return False
        self._start(replace(opening, wait_ms=wait_ms, set_aside=False))
        return True

    def _glance(
        self,
        wait_ms: int | None,
        pair: int,
        spots: set[Spot],
        peers: Peers,
        send: Callable[[Any], None],
    ) -> Glance | None:
        """Go on after a rest; say all that a run over a few directories begins with."""
        if len(peers.nodes) + len(peers.places) > AT_A_TIME:
            refuse("more at a time than is answered")
        if self._wake(wait_ms):
            return None
        choices = self.side.choices(archive := self._archive_of(pair))
        scanned, due = self.side.look(spots), list(self.side.changed(archive))
        for at in range(0, len(due), _SOME):
            send(due[at : at + _SOME])
        there = self.side.view.at(peers.places)
        contents = changed(self.side, self.side.view, archive, due) if peers.contents else {}
        said = around(self.side.view, {ROOT, *peers.nodes, *there.values(), *due[: AT_A_TIME - 1]})
        return Glance(choices, scanned, self.side.companions(), said, there, contents)

    # -- a side --------------------------------------------------------------

    def _open(self, opening: Opening) -> Hello:
        if self._side is not None:
            refuse("a root is open already")
        self._opening, self._resting = opening, False
        self._start(opening)
        return self.side.hello()

    def _start(self, opening: Opening) -> None:
        if opening.store != STORE_DIR and not self._policy.chooses_store:
            raise UsageError("this agent keeps versions in its own store only")
        if not _is_plain(opening.store):
            refuse("a store in what is the engine's own")
        path = self._locate(opening.path)
        above = enclosing_root(os.path.realpath(path))
        if above is not None:
            raise UsageError(
                f"{display(path)} lies inside the root {display(above)}; synchronise that one, "
                "or exclude the folder and move it out"
            )
        if not (self._policy.changes or opening.dry):
            raise UsageError("this agent is read-only: let it be the source of a mirror, or plan")
        if opening.bwlimit:
            self._channel.pace = Pace(opening.bwlimit)
        options = self._options(opening)
        if opening.set_aside and self._policy.changes:
            side = LocalEndpoint(path, options)
            try:
                side.replica.set_aside_if_damaged()
            finally:
                side.close()
        self._side = LocalEndpoint(path, options, dry=opening.dry)

    def _options(self, opening: Opening) -> Options:
        share = opening.hot_share
        return Options(
            rules=ScanRules(
                Matcher(opening.patterns),
                opening.store,
                specials=opening.specials,
                devices=opening.devices and self._policy.devices,
            ),
            store=opening.store,
            workers=workers(),
            fsync=opening.fsync,
            apply=opening.apply,
            hot=Matcher(opening.hot),
            allowance=None if share is None else Allowance(share=share / 1e6),
            base_clones=opening.base_clones,
            stop=self._stop,
            session=opening.session,
            wait_s=None if opening.wait_ms is None else opening.wait_ms / 1000,
            wanted=self._wanted,
        )

    def _stop(self) -> None:
        """The other end wants a stop, or is gone: what is in hand ends, nothing more begins."""
        self._asked_to_stop()
        if self._channel.stop_asked or self._channel.broken:
            raise Interrupted(15)

    def _establish(self, new_identity: bool, new_incarnation: bool) -> Hello:
        self._archives.clear()  # what is established anew may have another database
        return self.side.establish(new_identity=new_identity, new_incarnation=new_incarnation)

    def _archive(self, hello: Hello, column: int, flipped: bool) -> int:
        archive = self.side.archive(hello, column=column, flipped=flipped)
        self._archives[archive.pair] = archive
        return archive.pair

    def _archive_of(self, pair: int) -> Archive:
        archive = self._archives.get(pair)
        if archive is None:
            refuse("an ancestor that was not asked for")
        return archive

    def _recover(self, pair: int) -> object:
        return self.side.recover(self._archive_of(pair))

    def _scan(self, nodes: set[int] | None, send: Callable[[Any], None]) -> object:
        return self.side.scan(nodes, send)

    def _look(self, spots: set[Spot], send: Callable[[Any], None]) -> object:
        return self.side.look(spots, send)

    def _apply(
        self,
        pair: int,
        steps: list[Transition],
        updates: dict[int, str],
        together: tuple[Any, ...],
        contents: dict[int, Inline],
        send: Callable[[Any], None],
    ) -> dict[int, Node]:
        for text in updates.values():
            _checked([_loaded(text)])
        if not self._policy.changes:
            refuse("a change at a read-only agent")
        self._refuse_old_numbers(steps)
        steps = [self._allowed(step) for step in steps]
        self._far.learn(contents)
        try:
            results = self.side.apply(
                self._archive_of(pair), steps, updates, self._far, list(together)
            )
        finally:
            self._far.close()
        done = (self._done(i, result) for i, result in enumerate(results))
        while some := list(itertools.islice(done, _RESULTS)):
            send(some)
        return self.side.view.nodes({step.node for step in steps})

    def _refuse_old_numbers(self, steps: list[Transition]) -> None:
        """A new node has a number that was given out for it, and that nothing has."""
        for step in steps:
            if isinstance(step, Make | Replace):
                if step.content.kind is NodeKind.FILE and step.source is None:
                    refuse("a file that comes from nowhere")
                if (
                    step.content.kind in (NodeKind.CHAR, NodeKind.BLOCK)
                    and not self._policy.devices
                ):
                    refuse("a device node, which may not be made here")
        fresh = [step.node for step in steps if isinstance(step, Make)]
        index = self.side.view
        if len(set(fresh)) != len(fresh) or index.nodes(fresh) or index.names_of(fresh):
            refuse("a new node with the number of another")
        if any(node >= index.next_number for node in fresh):
            refuse("a number that was not given out")

    def _allowed(self, step: Transition) -> Transition:
        """A step without what the other end may not give here."""
        if self._policy.set_id or not isinstance(step, Make | Replace | SetAttributes):
            return step
        a = step.attributes
        mine = replace(
            a,
            mode=a.mode & ~0o6000,
            xattrs=tuple(x for x in a.xattrs if not x[0].startswith((b"security.", b"trusted."))),
        )
        return replace(step, attributes=mine)

    def _hold_declared(self, top: int, rule: Declared, nodes: Any, agreed: Any) -> Read:
        if rule.hooks is not None and not self._policy.commands:
            return Read(top, "problem", "this agent runs no commands of the other end")
        return self.side.hold_declared(top, rule, nodes, agreed)

    def _done(self, position: int, result: Result) -> Done:
        path, old = self._paths(result.step)
        return Done(
            position=position,
            status=result.status,
            reason=result.reason,
            size=result.size,
            matched=result.matched,
            kept=result.kept,
            missed=result.missed,
            beside=result.beside,
            path=path,
            old=old,
        )

    def _paths(self, step: Transition) -> tuple[bytes | None, bytes | None]:
        place = place_of(step)
        if place is None:
            return self.side.path(step.node), None
        old = step.old if isinstance(step, Move | Exchange) else None
        return self.side.place_path(place), None if old is None else self.side.place_path(old)

    def _around(self, ids: list[int]) -> Around:
        if len(ids) > AT_A_TIME:
            refuse("more at a time than is answered")
        return around(self.side.view, ids)

    def _read(self, ids: list[int]) -> object:
        return self.side.read(ids), self.side.view.nodes(ids)

    def _at(self, places: list[Place]) -> object:
        if len(places) > AT_A_TIME:
            refuse("more at a time than is answered")
        found = self.side.view.at(places)
        return found, around(self.side.view, found.values())

    def _children(self, ids: list[int], send: Callable[[Any], None]) -> tuple[()]:
        for node, entries in self.side.view.children(ids).items():
            for at in range(0, max(len(entries), 1), _SOME):
                send({node: entries[at : at + _SOME]})
        return ()

    def _numbers(self, count: int) -> int:
        return self.side.view.reserve(count)

    def _changed(self, pair: int, send: Callable[[Any], None]) -> tuple[()]:
        nodes = self.side.changed(self._archive_of(pair))
        while some := list(itertools.islice(nodes, _SOME)):
            send(some)
        return ()

    def _keep_pending(self, pair: int, pending: dict[int, str]) -> None:
        self.side.keep_pending(self._archive_of(pair), pending)

    def _finish(self, pair: int, ending: Ending) -> list[str]:
        if not self.side.has_read(pair) or self.side.dry:
            refuse("an end before anything was looked at")
        if not self._policy.prunes:
            ending = replace(ending, retention=None)
        return self.side.finish(self._archive_of(pair), ending)

    def _deletions_since(self, pair: int, column: int, time_ns: int) -> int:
        return self.side.deletions_since(self._archive_of(pair), column, time_ns)

    def _choices(self, pair: int) -> object:
        return self.side.choices(self._archive_of(pair))

    def _carry_out(self, pair: int, choice: Any) -> str:
        return self.side.carry_out(self._archive_of(pair), choice)

    def _add_conflicts(self, pair: int, rows: list[Quarrel]) -> None:
        for row in rows:
            if not all(p is None or _is_plain(p) for p in (row.path, row.kept, row.kept_as)):
                refuse("a conflict about what is the engine's own")
        self.side.add_conflicts(self._archive_of(pair), rows)

    def _probe_displaced(self, min_age_ns: int) -> Probed:
        # It may be asked for behind a call that would have opened the root, and could not.
        return Probed() if self._side is None else self._side.probe_displaced(min_age_ns=min_age_ns)

    def _close(self) -> None:
        self.close()

    # -- its copy of the ancestor --------------------------------------------

    def _agreed_by_side(self, pair: int, side: int, ids: Iterable[int]) -> dict[int, int]:
        return self._archive_of(pair).by_side(Side(side), ids)

    def _agreed_prepare(self, pair: int, commit: Commit) -> None:
        _checked(_loaded(commit.payload))
        self._archive_of(pair).prepare(commit)

    def _agreed_commit(self, pair: int, reasons: dict[int, str]) -> None:
        archive = self._archive_of(pair)
        archive.reasons = reasons
        try:
            archive.commit()
        except LookupError as error:
            raise EndpointError(str(error)) from error

    def _agreed_rows(self, pair: int, send: Callable[[Any], None]) -> tuple[()]:
        for rows in self._archive_of(pair).rows():
            send(json.dumps(rows, separators=(",", ":")).encode())
        return ()

    def _agreed_load(self, pair: int, data: bytes) -> None:
        self._archive_of(pair).load(_checked(_loaded(data)))

    def _agreed_adopt(self, pair: int, chain: Chain) -> None:
        self._archive_of(pair).adopt(chain)


def _is_plain(path: bytes) -> bool:
    """Whether a path leads to users' content, live or kept."""
    parts = path.split(b"/")
    inside = all(map(valid_name, parts)) and STATE_DIR not in parts
    return inside and parts[0] not in (b".store", b".manifest", b".modes")


def _loaded(data: bytes | str) -> Any:
    try:
        return json.loads(data, parse_constant=lambda _text: refuse("a number that is none"))
    except (ValueError, RecursionError) as error:
        refuse(f"rows that cannot be read: {error}")


def _checked(rows: Any) -> list[list[Any]]:
    """Rows of the ancestor that came from the other end, each exactly as it would be written here.

    Raises:
        ProtocolError: they are not.
    """
    try:
        return check_rows(rows)
    except (ValueError, TypeError) as error:
        refuse(str(error))
