"""Write synthetic data for an analysis: training text in text order, questions for `ledom evaluate`, and a manifest."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    from megatron_ledom.evaluation.synthetic.generators import GENERATORS  # the choices of --task

    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--task", required=True, choices=sorted(GENERATORS), help="analysis for which to write data")
    parser.add_argument("--output", "--out", required=True, metavar="FOLDER", help="folder to write; each set needs its own")
    parser.add_argument(
        "--num", type=int, required=True, metavar="N", help="number of facts, problems, texts or worlds, depending on the task"
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds write equal bytes (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)
    from megatron_ledom.evaluation.synthetic.generators import make_analysis_data

    make_analysis_data(args.task, args.output, args.num, args.seed)
