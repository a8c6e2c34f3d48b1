"""Modules and functions stay small enough to read: a noun is hiding in what outgrows this."""

import ast
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).resolve().parents[2] / "bisync"
_MODULE = 620  # lines; most are below 300
_FUNCTION = 80
MODULES = sorted(_PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(_PACKAGE)))
def test_size(path: Path):
    """One module: its length, and the lengths of its functions."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= _MODULE
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        node.name: lines
        for node in functions
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > _FUNCTION
    }
    assert not long


def test_half_of_the_modules_are_short():
    """The median says more than the longest."""
    lengths = sorted(path.read_text(encoding="utf-8").count("\n") for path in MODULES)
    assert lengths[len(lengths) // 2] < 200
