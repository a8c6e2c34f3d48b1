"""How a new version of a big file gets to where the old one is."""

from enum import Enum

BASE_CLONES = 256  # big files of a root that may have a frozen clone of the version that is known


class Apply(Enum):
    """What a person may choose; see ``docs/decisions/0014-written-in-place.md``."""

    AUTO = "auto"  # by what the file system can do, and how much changes
    REPLACE = "replace"  # a whole new file, exchanged with the old one
    IN_PLACE = "in-place"  # what changed is written into the old one, which can be undone
