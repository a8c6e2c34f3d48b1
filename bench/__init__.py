"""Measurements. Run one as ``python -m bench.NAME``."""

import compileall
import os

import bisync

# An installed program has its bytecode; without it each start would compile all of it again.
compileall.compile_dir(os.path.dirname(bisync.__file__), quiet=2)
