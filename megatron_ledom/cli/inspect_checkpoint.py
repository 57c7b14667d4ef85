"""Show what a checkpoint holds: position, layout, tensors by part, files; --verify reads everything again."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("where", metavar="DIR", help="one checkpoint, or a run folder: all are listed and the latest is shown")
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file; exit 1 on any fault")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.checkpoint.inspection import inspect_checkpoint

    inspect_checkpoint(arguments.where, verify=arguments.verify)
