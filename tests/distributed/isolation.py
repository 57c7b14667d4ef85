"""Measure how documents of one sample influence each other, in the ranks of any layout."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.legible import EOD_ID, legible_ids

LENGTHS = (9, 13, 7)
"""Tokens of documents 0, 1 and 2 of the sample, each followed by an eod: 32 positions in all."""
CHANGED = 4
"""Position, in document 0, whose token differs in the changed sample."""
TRAINED = 1
"""The one document that has a loss."""
Report = dict[str, dict[str, float]]


def sample_tokens() -> torch.Tensor:
    """Return [1, 32] ids: three legible documents that share only the id of eod."""
    ids = [[*legible_ids(document, length), EOD_ID] for document, length in enumerate(LENGTHS)]
    return torch.tensor([[number for document in ids for number in document]])


def measure_each(config: str, folder: str, layouts: list[list[str]], ports: list[int]) -> None:
    """Write, as the body of a rank, NUMBER-RANK.json for each layout, with `gradient` and `logits` by document, isolated and not.

    gradient: largest absolute gradient of the embedding of a document's tokens, where only document 1 has a loss. logits: largest
    change of a document's logits when a token of document 0 changes. Values that this rank does not have are omitted.
    """
    from megatron_ledom.config.load import load_config
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform

    for number, (overrides, port) in enumerate(zip(layouts, ports, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        run = load_config(config, ["run_dir=unused", "data.seq_length=32", "data.reset_attention_mask=true", *overrides])
        groups = start_distributed(prepare_platform(1), run.parallel)
        reports = {name: _measure(run, groups, isolated) for name, isolated in (("isolated", True), ("leaking", False))}
        Path(folder, f"{number}-{os.environ['RANK']}.json").write_text(json.dumps(reports))
        stop_distributed()


def _measure(run: Any, groups: Any, isolated: bool) -> Report:
    from megatron_ledom.model.builder import build_model_chunks, wrap_for_training
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import seed_iteration
    from megatron_ledom.training.trainer import run_schedule

    seed_iteration(1, 0, groups)
    chunks = build_model_chunks(run, 1024, groups, choose_layers(run))
    logits: list[torch.Tensor] = []
    if chunks[-1].post_process:
        chunks[-1].output_layer.register_forward_hook(lambda module, given, output: logits.append(output[0].detach()))
    model = wrap_for_training(run, chunks)
    tokens = sample_tokens()
    changed = tokens.clone()
    changed[0, CHANGED] = 999
    seen, size = [], run.train.global_batch_size
    for one in (tokens, changed):
        logits.clear()
        run_schedule(
            run, model, [_batches(one, groups, isolated) for _ in model], groups, global_batch_size=size, forward_only=True
        )
        seen += logits[:1]
    report: Report = {}
    if seen:
        positions = next(_batches(tokens, groups, True))["position_ids"][0]
        report["logits"] = _by_document((seen[0] - seen[1]).abs().amax((1, 2)), positions)
    run_schedule(
        run, model, [_batches(tokens, groups, isolated) for _ in model], groups, global_batch_size=size, forward_only=False
    )
    if chunks[0].pre_process:
        word = chunks[0].embedding.word_embeddings
        own_ids = range(word.vocab_start_index, word.vocab_end_index)
        size = word.weight.main_grad.abs().amax(1)
        rows = {
            position: size[int(number) - own_ids.start] for position, number in enumerate(tokens[0]) if int(number) in own_ids
        }
        inner = {position: value for position, value in rows.items() if int(tokens[0, position]) != EOD_ID}
        report["gradient"] = _by_document(torch.stack([*inner.values()]), torch.tensor([*inner])) if inner else {}
    return report


def _batches(tokens: torch.Tensor, groups: Any, isolated: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's part of the sample, again and again."""
    from megatron_ledom.data.dataset.batch import context_part, document_numbers

    documents = document_numbers(tokens, EOD_ID)
    batch = {
        "tokens": tokens,
        "labels": torch.roll(tokens, -1, 1),
        "loss_mask": (documents == TRAINED).float(),
        "position_ids": torch.arange(tokens.shape[1])[None],
    }
    batch = context_part(batch, groups.context.rank(), groups.context.size())
    while True:
        yield {**batch, **({"attention_mask": documents} if isolated else {})}


def _by_document(values: torch.Tensor, positions: torch.Tensor) -> dict[str, float]:
    """Return the largest of the values at positions of each document."""
    from megatron_ledom.data.dataset.batch import document_numbers

    of = document_numbers(sample_tokens(), EOD_ID)[0][positions]
    return {str(int(document)): float(values[of == document].max()) for document in of.unique()}
