#!/usr/bin/env python3
"""Fill gaps by every method of part 9: twins that meet, one two-way model, the forward model alone, and a FIM model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from infill_texts import STOPS, fim_text
from lines import read_lines, write_lines
from sampling_options import add_sampling

from megatron_ledom.errors import run_command

BATCH = 64


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("forward", "reverse", "fim"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR", help="folder of the model")
    parser.add_argument("--both", metavar="DIR", help="folder of the two-way model (default: none)")
    parser.add_argument("--items", required=True, type=Path, metavar="FILE", help="JSON lines: prompt, suffix, middle, kind")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="JSON lines: the items with `answers` and `met`"
    )
    add_sampling(parser, 4, "texts of each model", 40)
    return parser.parse_args()


def main() -> None:
    """Fill every gap and write the answers."""
    args = parse()
    from megatron_ledom.inference import ForwardLM, ReverseLM

    records = list(read_lines(args.items))
    answers: list[dict[str, str]] = [{} for _ in records]
    met: list[dict[str, bool]] = [{} for _ in records]
    forward = ForwardLM.from_pretrained(args.forward, device="cpu")
    for name, model, prompts in (
        ("forward only", forward, [record["prompt"] for record in records]),
        ("FIM", ForwardLM.from_pretrained(args.fim, device="cpu"), [fim_text(r["prompt"], "", r["suffix"]) for r in records]),
    ):
        for answer, text in zip(answers, _greedy(model, records, prompts, args.max_new_tokens), strict=True):
            answer[name] = text
    pairs: dict[str, tuple[Any, Any]] = {"twins": (forward, ReverseLM.from_pretrained(args.reverse, device="cpu"))}
    if args.both:
        one = ForwardLM.from_pretrained(args.both, device="cpu")
        pairs["two-way"] = (one, ReverseLM.sharing(one, args.both))
    for name, pair in pairs.items():
        for number, found in enumerate(_filled(*pair, records, args)):
            answers[number] |= {f"{name}{way}": text for way, (text, _) in found.items()}
            met[number] |= {f"{name}{way}": did for way, (_, did) in found.items() if did is not None}
    write_lines(args.output, [{**r, "answers": a, "met": m} for r, a, m in zip(records, answers, met, strict=True)])


def _greedy(model: Any, records: list[dict[str, Any]], prompts: list[str], max_new_tokens: int) -> list[str]:
    """Return what a forward model writes greedily, up to the end of the line or sentence."""
    from megatron_ledom.inference.generation import Sampling
    from megatron_ledom.inference.row_generation import RowRequest, write_rows

    rows = [
        RowRequest(text, Sampling(max_new_tokens=max_new_tokens, stop_strings=[STOPS[record["kind"]]]), "")
        for text, record in zip(prompts, records, strict=True)
    ]
    return [row.generation.following for row in write_rows(model, rows, BATCH)]


def _filled(forward: Any, reverse: Any, records: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return for each gap, by way of choice, the text and True if the models met in it (None where that is no question)."""
    from megatron_ledom.inference.generation import Sampling
    from megatron_ledom.inference.infilling.infiller import Gap, Infiller, InfillModel, InfillSettings

    infiller = Infiller(InfillModel.of(forward, BATCH), InfillModel.of(reverse, BATCH))
    greedy = Sampling(max_new_tokens=args.max_new_tokens)
    several = replace(greedy, temperature=args.temperature, num_return_sequences=args.num_samples)
    found: list[dict[str, Any]] = [{} for _ in records]
    for sampling in (greedy, several):
        gaps = [
            Gap(
                r["prompt"],
                r["suffix"],
                f"{args.seed}/{n}",
                InfillSettings(sampling=replace(sampling, stop_strings=[STOPS[r["kind"]]])),
            )
            for n, r in enumerate(records)
        ]
        for choices, filled in zip(found, infiller.fill(gaps), strict=True):
            best = filled.infillings[0]
            if sampling is greedy:
                choices[""] = (best.middle, best.met)
                continue
            choices[", samples"] = (best.middle, best.met)
            choices[", samples, score alone"] = (max(filled.infillings, key=lambda one: one.score).middle, None)
            onward = [one for one in filled.infillings if one.writer == "forward"]
            choices[", forward samples, score of both"] = (max(onward, key=lambda one: one.score).middle, None)
    return found


if __name__ == "__main__":
    run_command(main)
