#!/usr/bin/env python3
"""Rank answers by Reverse Reward: JSON lines with prompts and candidates in, the same with scores and a ranking out."""

import argparse

from megatron_ledom.errors import UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward", required=True, metavar="DIR", help="folder of the forward model")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="folder of the reverse model")
    parser.add_argument("--input", required=True, metavar="FILE", help='JSON lines: {"prompt": ..., "candidates": [...]}')
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines: the input with scores, ranking, best")
    parser.add_argument("--weight", type=float, default=0.5, help="lambda, the reverse model's share (default %(default)s)")
    parser.add_argument("--sample", type=int, metavar="N", help="let the forward model write N candidates for each prompt")
    parser.add_argument("--temperature", type=float, help="of --sample (default 1.0)")
    parser.add_argument("--top-p", type=float, help="of --sample (default 1.0: off)")
    parser.add_argument("--max-new-tokens", type=int, help="of --sample (default 128)")
    parser.add_argument("--seed", type=int, help="of --sample (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="most sequences at once (default %(default)s)")
    return parser


def main() -> None:
    """Parse, then load and rank."""
    args = build_parser().parse_args()
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if options and args.sample is None:
        raise UsageError(f"--{next(iter(options)).replace('_', '-')} needs --sample: given candidates are not written anew")

    from megatron_ledom.inference.generation import Sampling
    from megatron_ledom.inference.reverse_reward import rerank_file

    sampling = None if args.sample is None else Sampling(num_return_sequences=args.sample, **{"temperature": 1.0, **options})
    rerank_file(
        args.forward,
        args.reverse,
        args.input,
        args.output,
        weight=args.weight,
        sampling=sampling,
        batch_size=args.batch_size,
    )


if __name__ == "__main__":
    run_command(main)
