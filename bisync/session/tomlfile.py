"""What the files that people write have in common: TOML, and words that are nearly right."""

import difflib
import tomllib
from collections.abc import Iterable
from typing import Any

from bisync.errors import UsageError


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error


def meant(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for a word that is not known; empty if none is near."""
    near = difflib.get_close_matches(word, sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
