"""What a run will ask the other machine about, told from what changed on this one."""

from bisync.core.node import ROOT, NodeId, Place, Side
from bisync.endpoint.glance import AT_A_TIME, Peers
from bisync.endpoint.local import LocalEndpoint
from bisync.session.commit import Ledger
from bisync.watch.interface import Spot

_MOST = 500  # changed nodes; of more it asks in the usual way


def peers(
    ledger: Ledger, here: LocalEndpoint, side: Side, spots: set[Spot], *, contents: bool = True
) -> Peers:
    """Look at directories of a side that is here, and find out whom that concerns there.

    That is: what was agreed to be the same, the directories that it is in, what is where it is
    now, and where it was.

    Args:
        side: which one is here.
        spots: what the run will look at on that side.
        contents: whether what changed there may come here.
    """
    found = set(here.foresee(ledger.archives[side], spots))
    if not found or len(found) > _MOST:
        return Peers(contents=contents)
    names_of = here.view.names_of(found)
    parents = {parent for names in names_of.values() for parent, _ in names}
    keys = ledger.lead.by_side(side, found | parents)
    mine = {keys[node] for node in found if node in keys}
    agreed_names = ledger.lead.names_of(mine)
    agreed_parents = {parent for names in agreed_names.values() for parent, _ in names}
    agreed = ledger.lead.nodes({*keys.values(), *agreed_parents})

    def there(key: int | None) -> NodeId | None:
        node = None if key is None else agreed.get(key)
        return None if node is None else node.ids[side.other]

    places: set[Place] = set()
    for names in names_of.values():
        places.update(_at(ROOT if p == ROOT else there(keys.get(p)), name) for p, name in names)
    for names in agreed_names.values():
        places.update(_at(ROOT if p == ROOT else there(p), name) for p, name in names)
    nodes = {there(key) for key in keys.values()} - {None}
    places.discard(_NOWHERE)
    if len(nodes) + len(places) > AT_A_TIME:  # of files with many names
        return Peers(contents=contents)
    return Peers([node for node in nodes if node is not None], list(places), contents)


_NOWHERE: Place = (0, b"")


def _at(parent: NodeId | None, name: bytes) -> Place:
    return _NOWHERE if parent is None else (parent, name)
