#!/usr/bin/env python3
"""Write what came before a text, with a reverse model; the whole text goes to stdout."""

import argparse

from megatron_ledom.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reverse model")
    parser.add_argument("--following", required=True, metavar="TEXT", help="the text whose beginning is wanted")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default %(default)s: off)")
    parser.add_argument("--top-k", type=int, default=0, help="(default %(default)s: off)")
    parser.add_argument("--num-samples", type=int, default=1, help="more than one needs a temperature (default %(default)s)")
    parser.add_argument("--seed", type=int, help="makes samples repeatable")
    return parser


def main() -> None:
    """Parse, then load and write."""
    args = build_parser().parse_args()

    from megatron_ledom.inference import ReverseLM

    results = ReverseLM.from_pretrained(args.model).generate_preceding(
        args.following,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        num_return_sequences=args.num_samples,
        seed=args.seed,
    )
    for number, result in enumerate(results, 1):
        if len(results) > 1:
            print(f"--- {number} of {len(results)}" + (" (from its beginning)" if result.stopped else ""))
        print(result.text)


if __name__ == "__main__":
    run_command(main)
