"""Train a SentencePiece BPE tokenizer (byte fallback, single digits, text kept as it is) with the specials LEDOM uses."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_bad_records, add_text_template


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="*.jsonl[.gz|.zst], *.parquet, *.txt")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces; five specials come on top")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--text-key", default="text", help="JSON key or Parquet column of the text")
    add_text_template(parser)
    add_bad_records(parser)
    parser.add_argument("--max-sentences", type=int, metavar="N", help="lines to learn from, drawn evenly; default: all")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    import logging

    from megatron_ledom.data.preprocess.train_tokenizer import TrainTokenizerSettings, train_tokenizer
    from megatron_ledom.data.readers.text_template import from_command_line

    if arguments.text_template is not None:
        arguments.text_template = from_command_line(arguments.text_template)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_tokenizer(TrainTokenizerSettings(**vars(arguments)))
