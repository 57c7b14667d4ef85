"""Reverse Reward beside its baselines over reranked files, as JSON, Markdown and HTML; or one choice explained step by step."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="outputs of ledom rerank, one for each sampling seed")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--gold-key", metavar="KEY", help="field of the right answer")
    kinds = ("number", "text", "math")
    parser.add_argument("--answers", choices=kinds, default="number", help="how answers are compared (default %(default)s)")
    parser.add_argument("--beam", metavar="FILE", help="output of ledom rerank --beam for the same prompts")
    parser.add_argument("--folds", type=int, default=5, help="lambda is chosen on the other folds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (default %(default)s)")
    parser.add_argument("--explain", type=int, metavar="LINE", help="instead: why the first file's line was ranked so")
    parser.add_argument("--reverse", metavar="DIR", help="of --explain: folder of the reverse model")
    parser.add_argument("--reverse-eod-id", type=int, metavar="ID", help="of --explain: eod of one that records no direction")
    parser.add_argument("--step-delimiter", default="newline", metavar="D", help="of --explain (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, then report."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.reports.rerank import report_rerank

    report_rerank(args)
