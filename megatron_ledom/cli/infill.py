"""Write the text between a prefix and a suffix, with a forward and a reverse model that meet in the middle.

Reads JSON lines with `prompt` and `suffix`; writes them with `middle`, `met` and all texts that were found, with their scores.
"""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size, add_overwrite


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--forward", metavar="DIR", help="folder of the forward model")
    parser.add_argument("--reverse", metavar="DIR", help="folder of the reverse model, with the same tokenizer")
    parser.add_argument("--model", metavar="DIR", help="folder of a two-way model, instead of --forward and --reverse")
    parser.add_argument("--input", required=True, metavar="FILE", help='JSON lines, such as {"prompt": "...", "suffix": "..."}')
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="JSON lines: the input with the texts; the same command resumes it"
    )
    parser.add_argument(
        "--overlap-tokens",
        type=int,
        default=3,
        metavar="N",
        help="the models meet where N tokens in a row of both texts are equal (default %(default)s)",
    )
    add_batch_size(parser)
    add_overwrite(parser, "an existing output, or unfinished work, of another input or other options")
    parser.add_argument(
        "--too-long",
        choices=("refuse", "skip"),
        default="refuse",
        help="lines with more tokens than a model has positions: refuse them at the start (default), or skip them",
    )
    sampling = parser.add_argument_group("writing, the same for both models")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=64, help="most tokens that each model writes (default %(default)s)"
    )
    sampling.add_argument(
        "--num-samples",
        type=int,
        default=1,
        help="texts of each model; each pair may meet; more than one needs a temperature (default %(default)s)",
    )
    sampling.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 always takes the most likely token (default)"
    )
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default %(default)s: off)")
    sampling.add_argument(
        "--top-k", type=int, default=0, help="sample from the k most likely tokens (default %(default)s: off)"
    )
    sampling.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    sampling.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="stop when one of these texts is generated; no text contains them"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.inference.infilling.command import infill_command

    infill_command(args)
