"""Compare Reverse Reward with its baselines on reranked files, or explain one ranking step by step. Writes JSON, Markdown and HTML."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="outputs of `ledom rerank`, one for each sampling seed")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--gold-key", metavar="KEY", help="field with the correct answer")
    kinds = ("number", "text", "math")
    parser.add_argument(
        "--answers", choices=kinds, default="number", help="compare answers as numbers, texts or formulas (default %(default)s)"
    )
    parser.add_argument("--beam", metavar="FILE", help="output of `ledom rerank --beam` for the same prompts")
    parser.add_argument(
        "--folds",
        type=int,
        default=5,
        help="number of folds of the questions; lambda for a fold is chosen on the others (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of folds and bootstrap (default %(default)s)")
    parser.add_argument("--explain", type=int, metavar="LINE", help="only explain the ranking in this line of the first file")
    parser.add_argument("--reverse", metavar="DIR", help="with --explain: folder of the reverse model")
    parser.add_argument(
        "--reverse-eod-id", type=int, metavar="ID", help="with --explain: eod of a reverse model that records no direction"
    )
    parser.add_argument(
        "--step-delimiter", default="newline", metavar="D", help="with --explain: end of a step (default %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.reports.rerank import report_rerank

    report_rerank(args)
