"""Write the text that precedes a given text, with a reverse model. Prints both as one text."""

import argparse
import sys
from collections.abc import Sequence

from megatron_ledom.cli.options import add_unrecorded_direction

CLEAR = "\x1b[H\x1b[2J"  # the terminal


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reverse model")
    parser.add_argument(
        "--following", required=True, metavar="TEXT", help="the end of the text; the model writes what precedes it"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest generated text, in tokens (default %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 always takes the most likely token (default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default %(default)s: off)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens (default %(default)s: off)")
    parser.add_argument(
        "--num-samples", type=int, default=1, help="number of texts; more than one needs a temperature (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="seed of sampling; equal seeds give equal texts")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="stop when one of these texts is generated")
    parser.add_argument("--stream", action="store_true", help="show the text on the terminal while it is generated")
    add_unrecorded_direction(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)

    from megatron_ledom.errors import UsageError, visible
    from megatron_ledom.inference import ReverseLM
    from megatron_ledom.inference.model_folder import COMMAND_OPTIONS

    if args.stream and (args.num_samples > 1 or not sys.stderr.isatty()):
        raise UsageError(
            "--stream shows one sample on a terminal, but stderr is not a terminal or --num-samples is above 1; remove it"
        )
    model = ReverseLM.from_pretrained(args.model, direction=args.direction, eod_id=args.eod_id, option_names=COMMAND_OPTIONS)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
    options["stop_strings"] = args.stop
    if args.stream:
        for result in model.stream_preceding(args.following, **options):
            print(f"{CLEAR}{visible(result.text)}", end="", file=sys.stderr, flush=True)
        print(CLEAR, end="", file=sys.stderr, flush=True)
        results = [result]
    else:
        results = model.generate_preceding(args.following, num_return_sequences=args.num_samples, **options)
    for number, result in enumerate(results, 1):
        if len(results) > 1:
            print(f"--- {number} of {len(results)}" + (" (from its beginning)" if result.stopped else ""))
        print(visible(result.text) if sys.stdout.isatty() else result.text)
