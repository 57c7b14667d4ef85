"""Run lm-evaluation-harness with a model of either direction. `lm-eval run` handles every option, including --help."""

import argparse
import sys
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, add_help=False)
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="option of `lm-eval run`, except --model")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Pass all arguments to the harness unchanged."""
    from megatron_ledom.evaluation.harness.__main__ import main as run_harness

    if argv is not None:
        sys.argv = [prog or sys.argv[0], *argv]  # the harness reads its options from here
    run_harness()
