"""Run lm-evaluation-harness with a model of either direction; every option goes to `lm-eval run`, which also answers --help."""

import argparse
import sys
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, add_help=False)
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="of lm-eval run, except --model")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Hand all arguments over as they are."""
    from megatron_ledom.evaluation.harness.__main__ import main as run_harness

    if argv is not None:
        sys.argv = [prog or sys.argv[0], *argv]  # where the harness reads its options
    run_harness()
