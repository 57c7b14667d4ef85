#!/usr/bin/env python3
"""Train a verifier: a forward model with a head that judges an answer, from right and wrong answers.

It reads as many tokens as the training of another scorer. Of the states after each pass over the answers, the one with the lowest loss on
a fifth of the questions, which it does not learn from, is kept. The folder has `training.json` beside the model.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from lines import read_lines
from problems import GOLD

from megatron_ledom.errors import run_command

HELD_OUT_SHARE = 5
"""One of so many questions chooses the state that is kept."""
WEIGHT_DECAY = 0.01
Example = tuple[list[int], float]
"""Ids of a question with an answer, and 1 if the answer is right."""


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the forward model")
    parser.add_argument("--answers", required=True, type=Path, metavar="FILE", help="problems with candidates")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the verifier")
    parser.add_argument("--tokens", required=True, type=int, metavar="N", help="tokens to read")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of a step, about (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="the first, it falls to 0 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    return parser.parse_args()


def load_verifier(folder: str | Path, forward: Any) -> Any:
    """Return the model of a folder with a head for one number, of a forward model or of a trained verifier."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # transformers warns that the head is new
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=forward.stop_ids[0], local_files_only=True, trust_remote_code=False
    )


def batch_of(texts: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Return the inputs of the model for texts of ids, padded at the end."""
    import torch

    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[pad_id] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    """Train, keep the best state, and write it."""
    args = parse()
    import torch

    from megatron_ledom.inference import ForwardLM

    torch.manual_seed(args.seed)
    forward = ForwardLM.from_pretrained(args.model, device="cpu")
    kept, held_out = examples(forward, list(read_lines(args.answers)), Random(args.seed))
    model = load_verifier(args.model, forward)
    report = train(model, kept, held_out, args, forward.stop_ids[0])
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(report), encoding="utf-8")


def examples(forward: Any, records: list[dict[str, Any]], random_: Random) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn from and those that choose the state, of other questions. Empty answers do not count."""
    from megatron_ledom.evaluation.grading.answers import answers_by, is_right

    number, found = answers_by("number"), list[list[Example]]()
    for record in random_.sample(records, len(records)):
        texts = [text for text in record["candidates"] if text]
        marks = [float(is_right(number, str(record[GOLD]), text)) for text in texts]
        found.append([(forward.tokenizer.split(record["prompt"], t)[0], m) for t, m in zip(texts, marks, strict=True)])
    size = max(1, len(found) // HELD_OUT_SHARE)
    held_out, kept = ([one for question in part for one in question] for part in (found[:size], found[size:]))
    return kept, held_out


def train(model: Any, kept: list[Example], held_out: list[Example], args: argparse.Namespace, pad_id: int) -> dict[str, Any]:
    """Train in place, leave the best state in the model, and return a report."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=WEIGHT_DECAY)
    random_, read, losses = Random(args.seed), 0, list[float]()
    best = copy.deepcopy(model.state_dict())
    while read < args.tokens:
        model.train()
        for batch in batches(random_.sample(kept, len(kept)), args.batch_tokens):
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * max(0.0, 1 - read / args.tokens)
            loss = loss_of(model, batch, pad_id)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            read += sum(len(text) for text, _ in batch)
            if read >= args.tokens:
                break
        model.eval()
        with torch.inference_mode():
            sums = [loss_of(model, part, pad_id).item() * len(part) for part in batches(held_out, 16 * args.batch_tokens)]
        losses.append(sum(sums) / max(1, len(held_out)))
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    right = sum(mark for _, mark in kept) / max(1, len(kept))
    return {"tokens": read, "num_examples": len(kept), "share_right": right, "held_out_losses": losses}


def batches(found: list[Example], num_tokens: int) -> Iterator[list[Example]]:
    """Yield consecutive examples of about `num_tokens` tokens together."""
    batch, size = list[Example](), 0
    for one in found:
        batch.append(one)
        size += len(one[0])
        if size >= num_tokens:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def loss_of(model: Any, batch: Sequence[Example], pad_id: int) -> Any:
    """Return the mean cross-entropy of the judgements."""
    import torch

    logits = model(**batch_of([text for text, _ in batch], pad_id)).logits[:, 0]
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([mark for _, mark in batch]))


if __name__ == "__main__":
    run_command(main)
