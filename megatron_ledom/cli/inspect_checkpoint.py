"""Show the contents of a checkpoint: position, layout, tensors and files. --verify reads every file again."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "where", metavar="DIR", help="a checkpoint to show, or a run folder, to list its checkpoints and show the latest"
    )
    parser.add_argument(
        "--verify", action="store_true", help="check the sha256 of every file; exit with 1 if a file is damaged"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.checkpoint.inspection import inspect_checkpoint

    inspect_checkpoint(arguments.where, verify=arguments.verify)
