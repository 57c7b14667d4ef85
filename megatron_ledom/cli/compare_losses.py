"""Report the loss of a forward model minus that of its reverse twin: by document, by position and by domain."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size, add_unrecorded_direction


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("forward", metavar="FORWARD_FOLDER", help="a forward model")
    parser.add_argument("reverse", metavar="REVERSE_FOLDER", help="a reverse model with the same tokenizer")
    parser.add_argument("--data", required=True, metavar="FILE", help="held-out documents: JSON Lines (also .gz) or Parquet")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for losses.jsonl and the report")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field of the text (default %(default)s)")
    parser.add_argument("--domain-key", metavar="KEY", help="field by which to group the documents")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents")
    context = (
        "longest input in tokens; longer documents are read in windows that overlap by half (default: the models' positions)"
    )
    parser.add_argument("--context", type=int, metavar="N", help=context)
    add_batch_size(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the confidence intervals (default %(default)s)")
    text = "allow different tokenizers, and compare whole documents in bits per byte"
    parser.add_argument("--different-tokenizers", action="store_true", help=text)
    add_unrecorded_direction(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.reports.losses import compare_losses

    compare_losses(args)
