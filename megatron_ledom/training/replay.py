"""Replay one step of a run bit for bit, from the last checkpoint before it, and show the gradient norm of each parameter."""

import logging
import math
import os
import re
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.module import param_is_not_shared

from megatron_ledom.checkpoint.folder import own_checkpoints
from megatron_ledom.checkpoint.main_weights import single_optimizers, weight_pairs
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.checkpoint.store import unwrapped
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import config_from_dict, load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import RUN_TOKENIZER, Sources, load_sources
from megatron_ledom.data.dataset.blend_samples import index_cache, sample_origins
from megatron_ledom.data.dataset.sample_index import index_spec, prepare_indices
from megatron_ledom.data.shards.model_order import unit_order
from megatron_ledom.data.shards.shard import ShardManifest
from megatron_ledom.data.shards.shard import load_manifest as load_shard_manifest
from megatron_ledom.direction import Unit
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel.collectives import on_every_rank
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import Launch, read_launch
from megatron_ledom.reversal_units import UnitOrder
from megatron_ledom.storage.records import LAUNCHES, Record
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.training.history import load_skipped_iterations, read_bad_steps, read_launches, read_steps
from megatron_ledom.training.origin import find_origin, first_iteration
from megatron_ledom.training.state import TrainState, build_state, check_resumable
from megatron_ledom.training.step_policy import Action, StepPolicy, StepResult, Verdict
from megatron_ledom.training.trainer import compute_step, open_batches, run_iteration

MOST_PARAMETERS = 20
Numbers = tuple[float, float]
"""Loss and gradient norm."""


@torch.no_grad()
def squared_norms(model: list[Any], optimizer: Any) -> dict[str, float]:
    """Return the squared gradient norm of each parameter of the whole model, by name. Their sum is the squared total norm.

    Call on every rank, after `measure_gradient` and before the next step.
    """
    names = {id(param): name for chunk in model for name, param in _named_parameters(unwrapped(chunk))}
    total: dict[str, float] = defaultdict(float)
    for part, is_layer_wise in single_optimizers(optimizer):
        mine: dict[str, float] = defaultdict(float)
        for param, main in [] if getattr(part, "is_stub_optimizer", False) else weight_pairs(part):
            duplicate = not tensor_parallel.param_is_not_tensor_parallel_duplicate(main, getattr(part, "tp_group", None))
            if main.grad is not None and param_is_not_shared(main) and not duplicate:
                mine[names[id(param)]] += float(main.grad.double().square().sum())
        group = None if is_layer_wise else part.get_grad_stats_parallel_group()  # None: all ranks, as megatron-core does
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, dict(mine), group)
        for name, square in (pair for found in everyone for pair in found.items()):
            total[name] += square
    return dict(total)


def _named_parameters(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a model chunk with their names; layers are numbered as in the whole model."""
    for name, param in chunk.named_parameters():
        found = re.match(r"decoder\.layers\.(\d+)\.", name)
        if found is None:
            yield name, param
        else:
            number = chunk.decoder.layers[int(found[1])].layer_number - 1
            yield f"decoder.layers.{number}.{name[found.end() :]}", param


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step as its run recorded it."""

    numbers: Numbers | None
    skip_iterations: frozenset[int]
    """Iterations that the run skipped when it did the step."""
    world_size: int | None
    config: RunConfig
    """The config of the launch that did the step; config.yaml is that of the last launch."""


def replay_step(run_dir: str, iteration: int, show: int, *, allow_long: bool) -> int:
    """Replay `iteration` of a run on the launched ranks and print it. Returns 1 if it differs from the record, else 0.

    Writes nothing into the run folder. Raises UsageError if more steps than those between two checkpoints must be repeated,
    unless `allow_long` is set.
    """
    launch = read_launch()
    logging.basicConfig(level=logging.WARNING, format=f"[rank {launch.rank}] %(message)s", stream=sys.stderr)
    config_file = os.path.join(run_dir, "config.yaml")
    if not os.path.exists(config_file):
        raise UsageError(f"--run {run_dir} has no config.yaml; give the folder of a run, its run_dir")
    recorded = read_recorded_step(load_config(config_file, [f"run_dir={run_dir}"]), iteration)
    config = recorded.config
    if recorded.world_size not in (None, launch.world_size):
        raise UsageError(
            f"iteration {iteration} was done on {recorded.world_size} ranks, but {launch.world_size} are launched. Other layouts"
            f" round differently: start the replay with torchrun --nproc-per-node {recorded.world_size}"
        )
    check_config(config, launch.world_size)
    checkpoint = last_checkpoint_before(config, iteration)
    summary = _check_length(config, checkpoint, iteration, allow_long)
    if launch.rank == 0:
        print(summary, flush=True)
    return _replay(launch, recorded, checkpoint, iteration, show)


def read_recorded_step(config: RunConfig, iteration: int) -> RecordedStep:
    """Return the record of an iteration: its last bad step, or else its ordinary one. Raises UsageError if out of range."""
    if not 1 <= iteration <= config.train.train_iters:
        raise UsageError(f"--iteration {iteration} is not in this run; it can be 1 to {config.train.train_iters}")
    launches = read_launches(config.run_dir)
    for bad in reversed(read_bad_steps(config.run_dir)):
        if bad["iteration"] == iteration:
            numbers = (float(bad["lm_loss"]), float(bad["grad_norm"]))
            then = _config_then(config, iteration, launches[bad["launch"] - 1] if "launch" in bad else None)
            return RecordedStep(numbers, frozenset(bad["left_out"]), bad["world_size"], then)
    found = [(step.lm_loss, step.grad_norm) for step in read_steps(config.run_dir) if step.iteration == iteration]
    before = [launch for launch in launches if launch.get("from_iteration", 0) < iteration]
    launch = before[-1] if before else None
    then = _config_then(config, iteration, launch)
    skip_iterations = frozenset({*then.train.skip_iterations, *load_skipped_iterations(config.run_dir).iterations})
    return RecordedStep(found[0] if found else None, skip_iterations, launch["world_size"] if launch else None, then)


def _config_then(config: RunConfig, iteration: int, launch: Record | None) -> RunConfig:
    """Return the config of the launch; without one, of the checkpoint before the step; without both, the given config."""
    checkpoint = last_checkpoint_before(config, iteration)
    if launch is not None and "config" in launch:
        then = config_from_dict(launch["config"], os.path.join(config.run_dir, LAUNCHES))
    elif checkpoint is not None:
        then = load_manifest(checkpoint).run_config(checkpoint)
    else:
        return config
    then.run_dir = config.run_dir  # the folder may have been moved
    return then


def last_checkpoint_before(config: RunConfig, iteration: int) -> str | None:
    """Return the newest finished checkpoint before the iteration; None if a replay begins with the initial weights."""
    folder = checkpoint_folder(config)
    before = [name for number, name in own_checkpoints(folder).items() if number < iteration]
    return os.path.join(folder, before[-1]) if before else None


def _check_length(config: RunConfig, checkpoint: str | None, iteration: int, allow_long: bool) -> str:
    """Return one line about the length of the replay. Raises UsageError if it exceeds the interval between checkpoints."""
    start = first_iteration(config) if checkpoint is None else load_manifest(checkpoint).iteration
    steps, usual = iteration - start, config.checkpoint.save_interval
    begins = f"from {checkpoint or 'the initial weights'}, iteration {start}"
    if steps > usual and not allow_long:
        raise UsageError(
            f"the replay of iteration {iteration} would begin {begins}, and repeat {steps} steps, more than"
            f" checkpoint.save_interval={usual}: the checkpoints in between are gone. Add --allow-long to replay it anyway"
        )
    return f"iteration {iteration} is replayed {begins}: {steps} steps"


@contextmanager
def _sample_index(config: RunConfig, sources: Sources, launch: Launch) -> Iterator[None]:
    """Set `config.data.path_to_cache` to a folder with a complete sample index: the run's, or a temporary one on each node."""
    node, cache = socket.gethostname(), index_cache(config)
    with ExitStack() as stack:

        def choose_folder() -> str | None:
            """Return the folder for this node, on its first rank."""
            if launch.local_rank > 0:
                return None
            is_whole = all(index_spec(config, blend).is_intact(cache) for blend in sources.all_blends())
            return cache if is_whole else stack.enter_context(tempfile.TemporaryDirectory(prefix="sample_index_"))

        folders: list[Any] = [None] * launch.world_size
        dist.all_gather_object(folders, (node, on_every_rank(choose_folder)))
        config.data.path_to_cache = next(path for where, path in folders if where == node and path is not None)
        prepare_indices(config, sources, index_cache(config), launch)
        yield


def _replay(launch: Launch, recorded: RecordedStep, checkpoint: str | None, iteration: int, show: int) -> int:
    config = recorded.config
    platform = prepare_platform(config.train.num_threads, launch)
    sources = load_sources(config)
    origin = find_origin(config, sources.provenance, None) if checkpoint is None else None
    sources, _ = check_resumable(config, sources, checkpoint, origin)
    groups = start_distributed(platform, config.parallel, launch)
    try:
        with _sample_index(config, sources, launch):
            state = build_state(config, sources, platform, groups, choose_layers(config), checkpoint, origin)
            return _compare(state, recorded, iteration, show)
    finally:
        stop_distributed()


def _compare(state: TrainState, recorded: RecordedStep, iteration: int, show: int) -> int:
    """Compute the step and print it. Returns 1 if it, or a step before it, differs from the record, else 0."""
    result, differs = _compute_recorded_step(state, iteration, recorded)
    norms = squared_norms(state.model, state.optimizer)
    if dist.get_rank() == 0:
        print("\n".join(_comparison_lines(result, recorded, differs)))
        print("\n".join(_parameter_lines(norms)))
        print("\n".join(_sample_lines(state, show)))
    return int(bool(differs) or (recorded.numbers is not None and not _same(_numbers(result), recorded.numbers)))


def _compute_recorded_step(state: TrainState, iteration: int, recorded: RecordedStep) -> tuple[StepResult, list[int]]:
    """Repeat the steps before `iteration` and compute that step without its update.

    Returns its result, and the steps before it that differ from their records.
    """
    policy = StepPolicy(state.config.train, state.platform.device)
    past = read_steps(state.config.run_dir)
    policy.resume_from(step for step in past if step.iteration <= state.iteration)
    recorded_numbers = {step.iteration: (step.lm_loss, step.grad_norm) for step in past}
    differs = []
    batches = open_batches(state)
    while state.iteration < iteration - 1:
        number = state.iteration + 1
        result = run_iteration(state, batches, policy, recorded.skip_iterations)
        if result is not None and not result.verdict.is_accepted:
            raise UsageError(
                f"iteration {number}, which must be repeated first, is a bad step ({result.verdict.reason}); replay that one"
            )
        if result is not None and number in recorded_numbers and not _same(_numbers(result), recorded_numbers[number]):
            differs.append(number)
    no_update = Verdict(Action.STOP, "replayed")
    return compute_step(state, batches, lambda *_: no_update), differs


def _numbers(result: StepResult) -> Numbers:
    return result.lm_loss, result.grad_norm


def _same(one: Numbers, other: Numbers) -> bool:
    """Return True if the numbers are equal to the last bit; NaN equals NaN."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


def _comparison_lines(result: StepResult, recorded: RecordedStep, differs: list[int]) -> Iterator[str]:
    yield f"{'':10}  {'loss':>22}  {'gradient norm':>22}"
    if recorded.numbers is not None:
        yield f"{'recorded':10}  {recorded.numbers[0]!r:>22}  {recorded.numbers[1]!r:>22}"
    yield f"{'replayed':10}  {result.lm_loss!r:>22}  {result.grad_norm!r:>22}"
    if recorded.numbers is None:
        yield "the run has no record of this step to compare with"
    elif _same(_numbers(result), recorded.numbers):
        yield "equal bit for bit"
    else:
        yield "NOT equal"
    if differs:
        yield f"earlier steps that differ from their records, first ones: {differs[:8]}; was the run resumed with another config?"


def _parameter_lines(norms: dict[str, float]) -> Iterator[str]:
    total = sum(norms.values())
    yield "\nlargest gradient norms of parameters, and their part of the squared total norm:"
    ranked = sorted(norms.items(), key=lambda item: (not math.isfinite(item[1]), item[1]), reverse=True)
    for name, square in ranked[:MOST_PARAMETERS]:
        part = f"{square / total:7.2%}" if math.isfinite(total) and total > 0 else ""
        yield f"  {math.sqrt(square) if math.isfinite(square) else square:12.5g}  {part:>8}  {name}"


def _sample_lines(state: TrainState, show: int) -> Iterator[str]:
    """Yield the ids of the step's samples, and the first `show` samples as text with their sources."""
    first = state.consumed_train_samples
    samples = range(first, first + state.next_batch_size)
    yield f"\nsamples {samples[0]} to {samples[-1]}"
    folder = os.path.join(state.config.run_dir, RUN_TOKENIZER)
    tokenizer = load_tokenizer(folder) if os.path.isdir(folder) else None
    for origin in sample_origins(state.train_dataset, samples[:show]):
        yield f"\nsample {origin['sample']} of {origin['source']}, documents {origin['documents']}"
        ids = [int(number) for number in state.train_dataset[origin["sample"]]["tokens"]]
        yield from (f"  {text}" for text in _texts(ids, tokenizer, state, load_shard_manifest(origin["source"])))


def _texts(ids: list[int], tokenizer: Tokenizer | None, state: TrainState, manifest: ShardManifest) -> Iterator[str]:
    """Yield the parts of documents in a sample, each in text order; all have the model order of its shard."""
    needs_words = manifest.model_order.unit in (Unit.WORD, Unit.ENTITY)
    order = None if needs_words and tokenizer is None else unit_order(manifest.model_order, tokenizer)
    part_ids: list[int] = []
    for number in [*ids, state.provenance.eod_id]:
        if number != state.provenance.eod_id:
            part_ids.append(number)
        elif part_ids:
            text_ids = _in_text_order(part_ids, order)
            yield repr(tokenizer.decode(text_ids)) if tokenizer is not None else str(text_ids)
            part_ids = []


def _in_text_order(ids: list[int], order: UnitOrder | None) -> list[int]:
    """Return a part of a document in text order, without its marker. A part that is cut within an entity stays as it is."""
    if order is None:
        return ids
    kept = ids[1:] if ids[0] == order.reading.marker_id else ids
    try:
        return [int(id_) for id_ in order.text_ids(np.array(kept, np.int64))]
    except DataError:
        return kept
