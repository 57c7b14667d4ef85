"""Check that a run that was saved and resumed equals the uninterrupted one bit for bit. On GPUs: not yet run on hardware."""

import os
from collections.abc import Mapping, Sequence

import torch

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.curves import Record
from megatron_ledom.hardware_check.layouts import DISTRIBUTED
from megatron_ledom.hardware_check.training_runs import TrainingRuns, own_layers

WHOLE_STEPS, HALF = 6, 3
WHOLE, HALVES = "uninterrupted", "resumed"
SETTINGS = (
    f"train.train_iters={WHOLE_STEPS}",
    "model.hidden_dropout=0.1",  # the random states must be resumed too
    "model.attention_backend=unfused",  # a flash kernel adds the gradients of queries in any order
)


def check_resume(setting: Setting) -> Outcome:
    """Train six steps, and three with a save and, in new processes, three more; compare all metrics and stored tensors.

    Two ranks have a distributed optimizer.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same sums in every process
    num_ranks = min(2, setting.num_gpus)
    distributed = [f"parallel.{one}" for one in DISTRIBUTED] if num_ranks > 1 else []
    runs = TrainingRuns(setting, [own_layers(setting.device), *SETTINGS, *distributed])
    runs.prepare(num_ranks)
    runs.prepare(num_ranks)
    first = runs.train({WHOLE: [], HALVES: [f"train.exit_interval={HALF}"]}, num_ranks)
    second = runs.train({HALVES: []}, num_ranks)
    where = f"{num_ranks} ranks with the distributed optimizer" if num_ranks > 1 else "one rank"
    if step := first_different_step(first[HALVES], first[WHOLE][:HALF]):
        return failed(
            f"two runs from the same start differ at step {step} on {where}: this device or its collectives are not"
            " deterministic, so no resumed run can be bit-equal"
        )
    if step := first_different_step(second[HALVES], first[WHOLE]):
        return failed(f"the resumed run differs from the uninterrupted one at step {step} on {where}")
    found, expected = (stored_tensors(runs.run_dir(name)) for name in (HALVES, WHOLE))
    problem = first_different_tensor(found, expected)
    if problem is not None:
        return failed(f"after {WHOLE_STEPS} steps with equal losses on {where}: {problem}")
    return passed(
        f"{WHOLE_STEPS} steps, saved and resumed at {HALF}, on {where}: metrics and {len(found)} tensors are bit-equal",
        tensors=len(found),
        steps=WHOLE_STEPS,
        ranks=num_ranks,
    )


def first_different_step(found: Sequence[Record], expected: Sequence[Record]) -> int | None:
    """Return the first step whose loss or gradient norm is not the same to the last bit, or None."""
    for index, wanted in enumerate(expected):
        record = found[index] if index < len(found) else {}
        if any(record.get(key) != wanted[key] for key in ("iteration", "lm_loss", "grad_norm")):
            return int(wanted["iteration"])
    return int(found[len(expected)]["iteration"]) if len(found) > len(expected) else None


def stored_tensors(run_dir: str) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's last checkpoint by name, with those of the optimizer."""
    stored = StoredTensors(find_checkpoint(run_dir))
    return {name: stored.read(name) for name in stored.entries}


def first_different_tensor(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    """Return a sentence about the first tensor that is missing or not bit-equal, or None."""
    if others := sorted(found.keys() ^ expected.keys()):
        return f"only one checkpoint has the tensor {others[0]} ({len(others)} such tensors)"
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    if different:
        return f"{len(different)} of {len(expected)} tensors differ, first {different[0]}"
    return None
