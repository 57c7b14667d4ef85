"""Pack prompts and answers from JSON lines into a shard for the fine-tuning of a scorer (data.loss_tokens chooses what counts)."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, one pair a line")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="of the model, such as RUN/tokenizer")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the shard without ending")
    parser.add_argument("--seq-length", type=int, required=True, metavar="N", help="data.seq_length of the run, in tokens")
    parser.add_argument(
        "--prompt-template", metavar="T", help="with {key} for a line's texts (default {question} and a newline)"
    )
    parser.add_argument("--answer-template", metavar="T", help="follows the prompt as it is (default {answer})")
    parser.add_argument("--direction", choices=["reverse", "forward"], help="of the model (default reverse)")
    policies = ("refuse", "skip", "cut")
    text = "a pair longer than a sample: refused, left out, or its given part cut at the end far from what is scored (default refuse)"
    parser.add_argument("--too-long", choices=policies, help=text)
    parser.add_argument("--eod-token", metavar="TOKEN", help="closes each pair (default: the tokenizer's eos)")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    given = {name: value for name, value in vars(build_parser(prog).parse_args(argv)).items() if value is not None}
    import logging

    from megatron_ledom.data.readers.text_template import from_command_line
    from megatron_ledom.direction import Direction
    from megatron_ledom.finetune.pairs import PairSettings, prepare_pairs

    for name in ("prompt_template", "answer_template"):
        if name in given:
            given[name] = from_command_line(given[name])
    if "direction" in given:
        given["direction"] = Direction(given["direction"])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_pairs(PairSettings(**given))
