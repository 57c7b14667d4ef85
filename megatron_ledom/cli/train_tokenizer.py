"""Train a SentencePiece BPE tokenizer (byte fallback, single digits, no text normalization) with the special tokens of LEDOM."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import INPUT_HELP, add_bad_records, add_text_template


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help=INPUT_HELP)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="number of pieces; the five special tokens are added to it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--text-key",
        default="text",
        help="field or column of the text; a.b is field b of the object in field a (default %(default)s)",
    )
    add_text_template(parser)
    add_bad_records(parser)
    parser.add_argument(
        "--max-sentences", type=int, metavar="N", help="number of lines to train on, drawn at random (default: all)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging

    from megatron_ledom.data.preprocess.train_tokenizer import TrainTokenizerSettings, train_tokenizer
    from megatron_ledom.data.readers.text_template import from_command_line

    if arguments.text_template is not None:
        arguments.text_template = from_command_line(arguments.text_template)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_tokenizer(TrainTokenizerSettings(**vars(arguments)))
