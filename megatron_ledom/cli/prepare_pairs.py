"""Pack pairs of prompt and answer into a shard to fine-tune a scorer. `data.loss_tokens` selects the tokens of the loss."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines with one pair each")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer of the model, such as RUN/tokenizer")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the shard without extension")
    parser.add_argument(
        "--seq-length", type=int, required=True, metavar="N", help="data.seq_length of the training run, in tokens"
    )
    parser.add_argument(
        "--prompt-template", metavar="T", help="prompt with {field} for the fields of a line (default {question} and a newline)"
    )
    parser.add_argument("--answer-template", metavar="T", help="answer, directly after the prompt (default {answer})")
    parser.add_argument("--direction", choices=["reverse", "forward"], help="direction of the model (default reverse)")
    policies = ("refuse", "skip", "cut")
    text = "a pair longer than a sample: refuse it (default), skip it, or cut the far end of the part that is not scored"
    parser.add_argument("--too-long", choices=policies, help=text)
    parser.add_argument("--eod-token", metavar="TOKEN", help="token that ends each pair (eod; default: the tokenizer's eos)")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
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
