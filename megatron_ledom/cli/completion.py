"""Print a script with which a shell completes commands, options, choices and paths.

bash, for this shell:     eval "$(ledom completion bash)"
bash, for every shell:    ledom completion bash > ~/.local/share/bash-completion/completions/ledom
zsh:                      ledom completion zsh > FOLDER/_ledom, where FOLDER is one of $fpath
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import cast

from megatron_ledom.cli.main import GROUPS, load

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = {"DIR", "FOLDER", "FORWARD_FOLDER", "PLACE", "REVERSE_FOLDER", "RUN", "RUN_OR_ITER"}
FILES = {"FILE", "FILE.png", "GLOB", "P", "PATH", "RECIPE"}
"""Metavars of arguments that are paths. P is the prefix of a shard."""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser with all commands as subparsers."""
    parser = argparse.ArgumentParser(prog="ledom")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(parser_class=cast("type[argparse.ArgumentParser]", _parser_of))
    for group in GROUPS.values():
        for name, text in group.items():
            commands.add_parser(name, help=text, command=name)
    return parser


def _parser_of(command: str, prog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = load(command).build_parser(prog)
    return parser


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every argument of a parser and of its subparsers."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    shell = build_parser(prog).parse_args(argv).shell
    import shtab

    parser = whole_parser()
    for action in actions(parser):
        if action.metavar in FOLDERS | FILES:
            vars(action)["complete"] = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
    print(shtab.complete(parser, shell))
