"""Where a mirror's source is: folders of this machine, or what another one has."""

import os
from typing import Protocol

from bisync.endpoint.channel import Channel
from bisync.endpoint.interface import Tree
from bisync.endpoint.trees import FarTree, Order
from bisync.errors import PathError
from bisync.fs.pace import Pace
from bisync.fs.source import Rules, SourceTree
from bisync.fs.starts import Start, open_source
from bisync.session.mirrorconfig import MirrorConfig


class Origin(Protocol):
    """Sources that can be walked, again and again."""

    paths: list[bytes]
    """Those of this machine."""

    texts: list[bytes]
    """All of them, as they were given."""

    def walk(self, config: MirrorConfig) -> Tree:
        """Walk them.

        Raises:
            PathError: none of them is there.
        """
        ...


class LocalOrigin:
    """Sources of this machine, spelled as on rsync's command line."""

    def __init__(self, paths: list[bytes]) -> None:
        self.paths = self.texts = paths

    def walk(self, config: MirrorConfig) -> Tree:
        """Walk them."""
        starts: list[Start] = []
        missing: list[tuple[bytes, str]] = []
        c = config
        try:
            for text in self.paths:
                try:
                    starts.append(open_source(text))
                except OSError as error:
                    missing.append((text, error.strerror or str(error)))
            tree = SourceTree(
                starts,
                Rules(
                    c.wish,
                    c.filters,
                    c.one_file_system,
                    c.prune_empty,
                    c.files_from,
                    c.stop,
                    Pace(c.bwlimit) if c.bwlimit else lambda _n: None,
                    c.workers,
                ),
            )
        except BaseException:
            for start in starts:
                os.close(start.fd)
            raise
        if not starts:
            tree.close()
            text, reason = missing[0]
            raise PathError(f"{os.fsdecode(text)}: {reason}; nothing was touched")
        for text, reason in missing:
            tree.failed = True
            tree.problems.append((text, reason))
        try:
            tree.walk()
        except BaseException:
            tree.close()
            raise
        return tree


class FarOrigin:
    """Sources of another machine.

    Args:
        sources: spelled as on rsync's command line; ``None``: the other end knows.
        machine: its name.
    """

    def __init__(self, channel: Channel, sources: list[bytes] | None, machine: str) -> None:
        self.paths: list[bytes] = []
        self.texts = sources or []
        self._channel, self._sources, self._machine = channel, sources, machine

    def walk(self, config: MirrorConfig) -> Tree:
        """Walk them."""
        c, order = config, None
        if self._sources is not None:
            order = Order(
                sources=tuple(self._sources),
                wish=c.wish,
                filters=c.filters,
                one_file_system=c.one_file_system,
                prune_empty=c.prune_empty,
                files_from=c.files_from,
                bwlimit=c.bwlimit,
                names=not c.numeric_ids,
            )
        return FarTree(self._channel, order, c.wish, names=not c.numeric_ids, machine=self._machine)
