#!/usr/bin/env python3
"""Write problems from their result: a reverse model gets `#### N` and writes the solution, then the question."""

import argparse
from pathlib import Path

from lines import write_lines
from sampling_options import add_sampling

from megatron_ledom.errors import run_command


def main() -> None:
    """Parse the options, load the model, and write JSON lines with `result` and `text`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reverse model")
    parser.add_argument("--results", required=True, type=int, nargs="+", metavar="N", help="results of the problems")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines")
    add_sampling(parser, 8, "problems per result", 200)
    args = parser.parse_args()

    from megatron_ledom.inference import ReverseLM

    model = ReverseLM.from_pretrained(args.model)
    written = model.generate_preceding(
        [f"#### {result}" for result in args.results],
        num_return_sequences=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=64,
    )
    results = [result for result in args.results for _ in range(args.num_samples)]
    write_lines(args.output, [{"result": n, "text": one.text} for n, one in zip(results, written, strict=True)])


if __name__ == "__main__":
    run_command(main)
