#!/usr/bin/env python3
"""Write the answers of forward models to prompts, as JSON lines of one object per answer: `model`, `prompt` and `answer`."""

import argparse
from pathlib import Path

from lines import read_lines, write_lines

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", nargs=2, metavar=("NAME", "DIR"), help="a forward model")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="JSON lines with `prompt`")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--max-new-tokens", required=True, type=int)
    parser.add_argument("--num-samples", type=int, help="sampled answers to each prompt (default: one, the most likely)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Answer with each model."""
    args = parse()
    from megatron_ledom.inference import ForwardLM

    prompts = [record["prompt"] for record in read_lines(args.prompts)]
    sampling = (
        {} if args.num_samples is None else {"num_return_sequences": args.num_samples, "temperature": 1.0, "seed": args.seed}
    )
    found = []
    for name, folder in args.model:
        model = ForwardLM.from_pretrained(folder, device="cpu")
        written = model.generate_following(prompts, max_new_tokens=args.max_new_tokens, batch_size=256, **sampling)
        each = args.num_samples or 1
        pairs = zip((prompt for prompt in prompts for _ in range(each)), written, strict=True)
        found += [{"model": name, "prompt": prompt, "answer": one.text.removeprefix(prompt).strip()} for prompt, one in pairs]
    write_lines(args.output, found)


if __name__ == "__main__":
    run_command(main)
