"""The options with which the study's scripts sample texts."""

import argparse


def add_sampling(parser: argparse.ArgumentParser, num_samples: int, each: str, max_new_tokens: int) -> None:
    """Add number of samples, their length, temperature and seed, with these defaults. each: what one sample is, for the help."""
    parser.add_argument("--num-samples", type=int, default=num_samples, help=f"{each} (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
