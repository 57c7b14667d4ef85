#!/usr/bin/env python3
"""Export the models of one seed of the two-way part, and measure them: losses, facts, answers and their rewards.

Each model is asked in every direction that it reads token by token. One process does it all, because most of the time of so small
models is the start of a process.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lines import read_lines, write_lines
from sampling_options import add_sampling
from valued import with_values

from megatron_ledom.errors import run_command
from megatron_ledom.storage.files import write_file

BATCH = 64
TASKS = ("reversal", "reversal_written")
CONTEXT = 256
"""Tokens of a sample in the study's recipe."""


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", required=True, nargs="+", type=Path, metavar="RUN", help="runs; the name of a folder is that of its model"
    )
    parser.add_argument("--models", required=True, type=Path, metavar="DIR", help="folder of the exported models")
    parser.add_argument(
        "--pairs", required=True, nargs="+", metavar="A,B", help="models A answers and B scores, by their names"
    )
    parser.add_argument("--held-out", required=True, type=Path, metavar="FILE", help="JSON lines with `text`")
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE", help="JSON lines with `prompt` and `answer`")
    parser.add_argument("--facts", required=True, type=Path, metavar="DIR", help="folder of the set `reversal`")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    add_sampling(parser, 16, "answers to each question", 64)
    return parser.parse_args()


def main() -> None:
    """Export, then measure."""
    args = parse()
    from megatron_ledom.convert.hf_export import export_hf

    for run in args.runs:
        export_hf(str(run), str(args.models / run.name), overwrite=True)
    args.output.mkdir(parents=True, exist_ok=True)
    loaded = {run.name: load(args.models / run.name) for run in args.runs}
    texts = [record["text"] for record in read_lines(args.held_out)]
    losses = {name: {way: losses_of(model, texts) for way, model in found.items()} for name, found in loaded.items()}
    facts = {name: {way: right_facts(model, args.facts) for way, model in found.items()} for name, found in loaded.items()}
    write_file(args.output / "losses.json", json.dumps(losses))
    write_file(args.output / "facts.json", json.dumps(facts))
    rank(args, loaded)


def load(folder: Path) -> dict[str, Any]:
    """Return the model in each direction that it reads token by token."""
    from megatron_ledom.inference import ForwardLM, ReverseLM

    loaders: dict[str, Callable[..., Any]] = {"forward": ForwardLM.from_pretrained, "reverse": ReverseLM.from_pretrained}
    readings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["readings"]
    ways = [reading["direction"] for reading in readings if reading["unit"] == "token"]
    return {way: loaders[way](folder, device="cpu") for way in ways}


def losses_of(model: Any, texts: Sequence[str]) -> list[float]:
    """Return the loss of each text in nats per token, without its first and last token, which the other direction reads first."""
    from megatron_ledom.evaluation.loss_difference import document_losses

    ids = [model.tokenizer.encode(text) for text in texts]
    scores = document_losses(model, ids, context=CONTEXT, batch_size=BATCH)
    return [-sum(one.token_logprobs[1:-1]) / (len(one.token_logprobs) - 2) for one in scores]


def right_facts(model: Any, folder: Path) -> dict[str, list[tuple[str, bool]]]:
    """Return for each task the group of each question, and True if the model is right."""
    from megatron_ledom.evaluation import LanguageTaskModel, evaluate_task, load_task
    from megatron_ledom.evaluation.multiple_choice import chosen

    found: dict[str, list[tuple[str, bool]]] = {}
    for name in TASKS:
        task, records = load_task(name, folder), list[dict[str, Any]]()
        evaluate_task(LanguageTaskModel(model, BATCH), task, keep=records.extend)
        way = task.task.main_way
        rights = [
            one["is_right"] if not way else chosen(one["scores"][way], task.task.normalization) == one["gold"]
            for one in records
        ]
        found[name] = [(record["group"], bool(right)) for record, right in zip(records, rights, strict=True)]
    return found


def rank(args: argparse.Namespace, loaded: dict[str, dict[str, Any]]) -> None:
    """Write the ranked answers of each pair of models. Answers that are there already, with another scorer, are not written again."""
    from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
    from megatron_ledom.inference.generation import Sampling
    from megatron_ledom.inference.reverse_reward.reranking import RerankSettings, rerank_file

    options = {"temperature": args.temperature, "num_return_sequences": args.num_samples, "seed": args.seed}
    answering = RerankSettings(sampling=Sampling(max_new_tokens=args.max_new_tokens, **options), greedy=True)
    answered: dict[str, Path] = {}
    for pair in args.pairs:
        names = pair.split(",")
        models = zip(("forward", "reverse"), names, strict=True)
        forward, reverse = (TransformersEngine(loaded[name][way], BATCH) for way, name in models)
        questions, settings, output = args.questions, answering, args.output / f"{names[0]} {names[1]}.jsonl"
        if names[0] in answered:
            questions, settings = args.output / f"candidates {names[0]}.jsonl", RerankSettings()
            write_lines(questions, with_values(answered[names[0]]))
        rerank_file(lambda both=(forward, reverse): both, questions, output, settings, overwrite=True)
        answered.setdefault(names[0], output)


if __name__ == "__main__":
    run_command(main)
