#!/usr/bin/env python3
"""Score answers with the forward model and with every scorer of the controls. Adds `scores` to the records of each file.

All values are log-probabilities in nats, or log-odds of the verifier; null for an empty answer.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lines import read_lines, write_lines

from megatron_ledom.errors import run_command

BATCH = 64
Pair = tuple[str, str]
"""A prompt and an answer."""
Scorer = Callable[[Sequence[Pair]], list[float]]


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", required=True, metavar="DIR", help="F1, the model that answered")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="R")
    parser.add_argument("--second", required=True, metavar="DIR", help="F2, a forward model of another seed")
    parser.add_argument("--swapped", required=True, metavar="DIR", help="S, a forward model that read the answer first")
    parser.add_argument("--verifier", required=True, metavar="DIR", help="F1 with a head that judges answers")
    parser.add_argument("--answers", required=True, nargs="+", type=Path, metavar="FILE", help="JSON lines with candidates")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the scores")
    return parser.parse_args()


def main() -> None:
    """Score every file."""
    args = parse()
    scorers = load(args)
    for path in args.answers:
        records = list(read_lines(path))
        pairs = [(record["prompt"], text) for record in records for text in record["candidates"]]
        distinct = sorted({pair for pair in pairs if pair[1]})
        found = {name: dict(zip(distinct, scorer(distinct), strict=True)) for name, scorer in scorers.items()}
        for record in records:
            own = [(record["prompt"], text) for text in record["candidates"]]
            record["scores"] = {name: [values.get(pair) for pair in own] for name, values in found.items()}
        write_lines(args.output / path.name, records)


def load(args: argparse.Namespace) -> dict[str, Scorer]:
    """Return the scorers by name. PMI needs no model of its own, but reads each answer alone."""
    from megatron_ledom.inference import ForwardLM, ReverseLM

    forward, second, swapped = (
        ForwardLM.from_pretrained(folder, device="cpu") for folder in (args.forward, args.second, args.swapped)
    )
    reverse = ReverseLM.from_pretrained(args.reverse, device="cpu")

    def _of(model: Any, change: Callable[[Pair], Pair] = lambda pair: pair, with_eod: bool = False) -> Scorer:
        return lambda pairs: [one.logprob for one in model.span_scores([change(pair) for pair in pairs], with_eod, BATCH)]

    def _less(alone: Scorer) -> Scorer:
        """Return log P_F1(y|x) - log P(y)."""
        return lambda pairs: [one - other for one, other in zip(given(pairs), alone(pairs), strict=True)]

    given = _of(forward, with_eod=True)  # the end of the answer counts: without it a beginning of an answer is always likelier
    return {
        "F1": given,
        "R": _of(reverse),
        "F2": _of(second, with_eod=True),
        "S": _of(swapped, lambda pair: (f"{pair[1]}\n", pair[0].removesuffix("\n"))),
        "PMI": _less(_of(forward, lambda pair: ("", pair[1]), with_eod=True)),
        "PMI, P(y) of S": _less(_of(swapped, lambda pair: ("", f"{pair[1]}\n"))),  # S ends an answer with a line break
        "verifier": _verifier(forward, args.verifier),
    }


def _verifier(forward: Any, folder: str) -> Scorer:
    """Return the log-odds that an answer is right."""
    import torch
    from control_verifier import batch_of, load_verifier

    model = load_verifier(folder, forward).eval()

    def _score(pairs: Sequence[Pair]) -> list[float]:
        texts = [forward.tokenizer.split(*pair)[0] for pair in pairs]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        values = [0.0] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                logits = model(**batch_of([texts[number] for number in chosen], forward.stop_ids[0])).logits[:, 0]
                for number, value in zip(chosen, logits.tolist(), strict=True):
                    values[number] = value
        return values

    return _score


if __name__ == "__main__":
    run_command(main)
