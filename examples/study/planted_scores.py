#!/usr/bin/env python3
"""Measure a pair of twins on test problems: losses, and the scores of right and of wrong answers. Writes one JSON file."""

import argparse
import json
from pathlib import Path
from typing import Any

from lines import read_lines
from problems import GOLD

from megatron_ledom.errors import run_command

BATCH = 64


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", required=True, metavar="DIR", help="the forward model")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="the reverse model")
    parser.add_argument("--ranked", required=True, type=Path, metavar="FILE", help="the problems, with candidates")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON")
    return parser.parse_args()


def main() -> None:
    """Measure every problem and write the results."""
    args = parse()
    from megatron_ledom.inference import ForwardLM, ReverseLM
    from megatron_ledom.storage.files import write_file

    models = {
        "forward": ForwardLM.from_pretrained(args.forward, device="cpu"),
        "reverse": ReverseLM.from_pretrained(args.reverse, device="cpu"),
    }
    records = list(read_lines(args.ranked))
    found: dict[str, Any] = {}
    for term, model in models.items():
        found[f"loss_{term}"] = losses(model, records)
        found |= {f"{kind}_{term}": values for kind, values in answer_scores(model, records).items()}
    write_file(args.output, json.dumps({"questions": found}))


def losses(model: Any, records: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each problem with its solution, in nats per token, as training counts it.

    The end of the document counts. The first token in model order does not: training predicts it from another document.
    """
    from megatron_ledom.direction import to_model_order
    from megatron_ledom.inference.scoring import Span, score_spans

    texts = [model.tokenizer.split(record["prompt"], record[GOLD])[0] for record in records]
    spans = [Span([*to_model_order(text_ids, model.direction), model.stop_ids[0]], 1) for text_ids in texts]
    return [-sum(values) / len(values) for values in score_spans(model.model, spans, BATCH)]


def answer_scores(model: Any, records: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return the log-likelihood of each right solution, and the mean over the different wrong candidates, None without one.

    A forward model scores the answer, a reverse model the question.
    """
    from megatron_ledom.evaluation.grading.answers import answers_by, is_right

    number = answers_by("number")
    wrong = [sorted({text for text in r["candidates"] if text and not is_right(number, r[GOLD], text)}) for r in records]
    pairs = [(r["prompt"], text) for r, texts in zip(records, wrong, strict=True) for text in [r[GOLD], *texts]]
    values = iter([score.logprob for score in model.span_scores(pairs, False, BATCH)])
    found: dict[str, list[float | None]] = {"right": [], "wrong": []}
    for texts in wrong:
        found["right"].append(next(values))
        others = [next(values) for _ in texts]
        found["wrong"].append(sum(others) / len(others) if others else None)
    return found


if __name__ == "__main__":
    run_command(main)
