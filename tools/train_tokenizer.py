#!/usr/bin/env python3
"""Train a SentencePiece BPE tokenizer (byte fallback, single digits, text kept as it is) with the specials LEDOM uses."""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line; see README and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="*.jsonl[.gz|.zst], *.parquet, *.txt")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces; five specials come on top")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--text-key", default="text", help="JSON key or Parquet column of the text")
    parser.add_argument(
        "--text-template",
        metavar="T",
        help=r"joins several keys to one text, such as '{question}\n{answer}'; \n is a line break, a doubled brace a brace",
    )
    parser.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="what to do with a bad record")
    parser.add_argument("--max-record-bytes", type=int, default=256 << 20, metavar="N", help="a longer record is a bad one")
    parser.add_argument("--max-sentences", type=int, metavar="N", help="lines to learn from, drawn evenly; default: all")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    import logging

    from megatron_ledom.data.preprocess.train_tokenizer import TrainTokenizerSettings, train_tokenizer
    from megatron_ledom.data.readers.text_template import from_command_line

    if arguments.text_template is not None:
        arguments.text_template = from_command_line(arguments.text_template)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_tokenizer(TrainTokenizerSettings(**vars(arguments)))


if __name__ == "__main__":
    run_command(main)
