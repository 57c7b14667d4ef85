"""Measure loss and bits per byte of held-out sets: validation sets at an interval, test sets once at the end."""

import logging
import math
from contextlib import nullcontext

import torch

from megatron_ledom.checkpoint.weight_ema import WeightEma
from megatron_ledom.data.dataset.batch import batch_iterators
from megatron_ledom.data.dataset.blend_samples import BlendSamples
from megatron_ledom.parallel.collectives import gathered_weights
from megatron_ledom.storage.records import Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.trainer import run_schedule

log = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]
"""Metrics by set or task."""


class Validation(Callback):
    """Evaluates the validation sets every `train.eval_interval` iterations and at the end."""

    def wants_record(self, run: TrainingRun) -> bool:
        """Return True if a validation is due."""
        due = run.is_last_iteration() or run.state.iteration % run.state.config.train.eval_interval == 0
        return due and bool(run.state.valid_datasets)

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Evaluate the sets and add the results, if a validation is due."""
        if self.wants_record(run):
            with run.pause("validating"):
                add_results(record, "validation", evaluate(run.state, run.state.valid_datasets))
                if run.state.ema is not None:
                    add_results(record, "validation_ema", evaluate(run.state, run.state.valid_datasets, ema=run.state.ema))


class FinalTest(Callback):
    """Evaluates the test sets once, at the end of the run."""

    def wants_record(self, run: TrainingRun) -> bool:
        """Return True if the run ends and has test sets."""
        return run.is_last_iteration() and bool(run.state.test_datasets)

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Evaluate the sets and add the results to the last record of the run."""
        if self.wants_record(run):
            with run.pause("testing"):
                add_results(record, "test", evaluate(run.state, run.state.test_datasets))
                if run.state.ema is not None:
                    add_results(record, "test_ema", evaluate(run.state, run.state.test_datasets, ema=run.state.ema))


def add_results(record: Record, kind: str, results: Results) -> None:
    """Add the results of each set if they are finite; log the others, and list them under "not_finite"."""
    is_finite = {name: all(map(math.isfinite, values.values())) for name, values in results.items()}
    record[kind] = {name: values for name, values in results.items() if is_finite[name]}
    for name in [name for name in results if not is_finite[name]]:
        record.setdefault("not_finite", []).append(f"{kind}/{name}")
        log.warning(
            "iteration %d: %s of %s is not finite and is not recorded: %s", record["iteration"], kind, name, results[name]
        )


@torch.no_grad()
def evaluate(state: TrainState, datasets: dict[str, BlendSamples], ema: WeightEma | None = None) -> Results:
    """Return lm_loss and bits_per_byte over all samples of each dataset, by its name. Call on every rank.

    ema: the moving average to evaluate in place of the weights.
    """
    for chunk in state.model:
        chunk.eval()
    with gathered_weights(state.model), nullcontext() if ema is None else ema.in_place_of_weights(state.model):
        results = {name: _measure(state, dataset) for name, dataset in datasets.items()}
    for chunk in state.model:
        chunk.train()
    return results


def _measure(state: TrainState, dataset: BlendSamples) -> dict[str, float]:
    device, eod_id = state.platform.device, state.provenance.eod_id
    iterators = batch_iterators(state.config, dataset, 0, len(dataset), state.groups, device, eod_id)
    loss_sum, num_tokens = 0.0, 0.0
    size = state.config.train.global_batch_size  # also while a schedule trains with other batches: same samples, same numbers
    for _ in range(len(dataset) // size):
        one_sum, one_count = run_schedule(
            state.config, state.model, iterators, state.groups, global_batch_size=size, forward_only=True
        )
        loss_sum, num_tokens = loss_sum + one_sum, num_tokens + one_count
    lm_loss = loss_sum / num_tokens
    return {
        "lm_loss": lm_loss,
        "bits_per_byte": bits_per_byte(lm_loss, dataset.blend.bytes_per_token(state.config.data)),
    }


def bits_per_byte(lm_loss: float, bytes_per_token: float) -> float:
    """Convert the mean loss in nats per token to bits per UTF-8 byte of text.

    The bytes of the evaluated samples are not known. bytes_per_token is the ratio of whole shards, with eods as tokens, even if
    the set has only some of their documents or samples.
    """
    return lm_loss / math.log(2) / bytes_per_token
