"""The samples that the ranks of a real run train on, by step."""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from tests.support.tiny_runs import TinyData, start_ranks


def note_samples() -> None:
    """Write the tokens of every sample that the model of this rank gets, by step, into the run folder."""
    from megatron_ledom.training import trainer

    run_dir = next(text.partition("=")[2] for text in sys.argv if text.startswith("run_dir="))
    forward, advance, iteration = trainer.forward_step, trainer.TrainState.advance, [0]
    path = os.path.join(run_dir, f"seen-{os.getpid()}.jsonl")

    def noting_forward(z_loss_coeff, batches, model):  # type: ignore[no-untyped-def]
        batch = next(batches)
        with open(path, "a", encoding="utf-8") as file:
            for tokens in batch["tokens"].tolist():
                file.write(json.dumps([iteration[0], tokens]) + "\n")
        return forward(z_loss_coeff, iter([batch]), model)

    def noting_advance(state):  # type: ignore[no-untyped-def]
        advance(state)
        iteration[0] = state.iteration

    def noting_load(state, checkpoint):  # type: ignore[no-untyped-def]
        load(state, checkpoint)
        iteration[0] = state.iteration

    from megatron_ledom.training import state as state_module

    load = state_module.load_checkpoint
    state_module.load_checkpoint = noting_load
    trainer.forward_step = noting_forward
    trainer.TrainState.advance = noting_advance  # type: ignore[method-assign]


def run_and_note(data: TinyData, run_dir: Path, *overrides: str, num_ranks: int) -> dict[int, list[tuple[int, ...]]]:
    """Run one launch; return the tokens of the samples of each step, over all ranks."""
    ranks = start_ranks(data.config, run_dir, *overrides, num_ranks=num_ranks, hook=note_samples)
    assert ranks.wait() == [0] * num_ranks, ranks.output()
    steps = defaultdict(list)
    for file in run_dir.glob("seen-*.jsonl"):
        for line in file.read_text().splitlines():
            step, tokens = json.loads(line)
            steps[step].append(tuple(tokens))
        file.unlink()
    return dict(steps)
