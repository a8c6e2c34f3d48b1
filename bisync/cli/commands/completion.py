"""``bisync completion`` and ``bisync man``: made from the parser, so they say what it knows."""

import argparse

from bisync.cli.output import line

_BASH = """# bash completion for bisync: source it, or put it into bash-completion's folder
_bisync() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
        return
    fi
    case $command in
{cases}
    esac
    case $cur in
        -*) COMPREPLY=($(compgen -W "$words" -- "$cur")) ;;
        *) COMPREPLY=($(compgen -f -- "$cur")) ;;
    esac
}}
complete -o filenames -F _bisync bisync"""

_ZSH = """#compdef bisync
autoload -U +X bashcompinit && bashcompinit
{bash}"""


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bisync.cli.main import build_parser  # noqa: PLC0415 - it imports the commands' words

    parser = build_parser()
    commands = _commands(parser)
    if options.command == "man":
        line(_man(parser, commands))
    else:
        cases = "\n".join(
            f'        {name}) words="{" ".join(_options(command))}" ;;'
            for name, command in commands.items()
        )
        text = _BASH.format(commands=" ".join(commands), cases=cases)
        line(_ZSH.format(bash=text) if options.shell == "zsh" else text)
    return 0


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise LookupError("the parser has no commands")


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.help != argparse.SUPPRESS]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in _shown(parser) for name in action.option_strings]


def _man(parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser]) -> str:
    out = [
        '.TH BISYNC 1 "" "bisync" "User Commands"',
        ".SH NAME",
        "bisync \\- " + _plain(parser.description or ""),
        ".SH SYNOPSIS",
        ".B bisync",
        ".I COMMAND",
        "[options] ...",
        ".SH COMMANDS",
    ]
    for name, command in commands.items():
        out += [f".SS bisync {name}"]
        for action in _shown(command):
            names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = f" {action.metavar}" if action.option_strings and action.metavar else ""
            text = (action.help or "").replace("%%", "%")
            out += [".TP", f".B {_plain(names + value)}", _plain(text)]
    out += [".SH EXIT STATUS", ".nf", _plain(parser.epilog or ""), ".fi"]
    return "\n".join(out)


def _plain(text: str) -> str:
    """Text that roff takes as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + row if row[:1] in (".", "'") else row for row in text.splitlines())
