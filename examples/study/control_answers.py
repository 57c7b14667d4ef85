#!/usr/bin/env python3
"""Sample answers to questions with a forward model. Writes the questions with `candidates` and `greedy`, one file for each input."""

import argparse
from pathlib import Path

from lines import read_lines, write_lines
from sampling_options import add_sampling

from megatron_ledom.errors import run_command

BATCH = 64


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a forward model")
    parser.add_argument("--questions", required=True, nargs="+", type=Path, metavar="FILE", help="JSON lines with `prompt`")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the answers")
    add_sampling(parser, 16, "answers to each question", 64)
    return parser.parse_args()


def main() -> None:
    """Sample the answers to every file."""
    args = parse()
    from megatron_ledom.inference import ForwardLM

    model, num = ForwardLM.from_pretrained(args.model, device="cpu"), args.num_samples
    for path in args.questions:
        records = list(read_lines(path))
        prompts = [record["prompt"] for record in records]
        options = {"max_new_tokens": args.max_new_tokens, "batch_size": BATCH}
        sampled = model.generate_following(
            prompts, num_return_sequences=num, temperature=args.temperature, seed=args.seed, **options
        )
        greedy = model.generate_following(prompts, **options)
        for number, (record, best) in enumerate(zip(records, greedy, strict=True)):
            own = sampled[number * num : (number + 1) * num]
            record["candidates"] = [one.text.removeprefix(record["prompt"]) for one in own]
            record["greedy"] = best.text.removeprefix(record["prompt"])
        write_lines(args.output / path.name, records)


if __name__ == "__main__":
    run_command(main)
