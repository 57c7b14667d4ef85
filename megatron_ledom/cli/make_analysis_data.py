"""Make the data of an analysis: training text in reading order, questions for `ledom evaluate`, and a manifest with hashes."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    from megatron_ledom.evaluation.synthetic.generators import GENERATORS  # the choices of --task

    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--task", required=True, choices=sorted(GENERATORS), help="what to make")
    parser.add_argument("--output", "--out", required=True, metavar="FOLDER", help="a folder of its own for each set")
    parser.add_argument("--num", type=int, required=True, metavar="N", help="facts, problems, texts or worlds, by the task")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same bytes (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, then make."""
    args = build_parser(prog).parse_args(argv)
    from megatron_ledom.evaluation.synthetic.generators import make_analysis_data

    make_analysis_data(args.task, args.output, args.num, args.seed)
