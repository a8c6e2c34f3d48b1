"""Completions and the manual page are made from the parser, so they say what it knows."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bisync.cli.main import build_parser
from tests.trees import run


def _complete(script: Path, *words: str) -> set[str]:
    text = f"""
    source {script}
    COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
    _bisync
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash(tmp_path: Path):
    """Commands, and the options of each command."""
    script = tmp_path / "bisync"
    script.write_text(run("completion", "bash").stdout)
    assert {"sync", "mirror", "restore", "rollback"} <= _complete(script, "bisync", "''")
    assert _complete(script, "bisync", "rest") == {"restore"}
    assert {"--delete", "--delete-excluded"} <= _complete(script, "bisync", "mirror", "--del")
    assert "--at" in _complete(script, "bisync", "restore", "--")
    assert run("completion", "zsh").stdout.startswith("#compdef bisync")


def test_man(tmp_path: Path):
    """Every command has its section; the page is well-formed where a formatter can tell."""
    page = run("man").stdout
    for name in ("sync", "plan", "mirror", "history", "restore", "why", "verify", "rollback"):
        assert f".SS bisync {name}\n" in page
    if shutil.which("groff") is None:
        return
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_every_option_has_a_text():
    """No option without a word of help."""
    parser = build_parser()
    for action in parser._actions:
        for command in getattr(action, "choices", None) or {}:
            for option in action.choices[command]._actions:
                assert option.help, f"{command} {option.dest}"
