"""Replay one step of a run from the last checkpoint before it, bit for bit, and show the gradient norm of each parameter."""

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

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.module import param_is_not_shared

from megatron_ledom.checkpoint.folder import finished_checkpoints
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.checkpoint.store import unwrapped
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import config_from_dict, load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import RUN_TOKENIZER, Sources, load_sources
from megatron_ledom.data.dataset.blend_samples import index_cache, sample_origins
from megatron_ledom.data.dataset.sample_index import index_spec, prepare_indices
from megatron_ledom.direction import to_text_order
from megatron_ledom.errors import UsageError
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import Launch, read_launch
from megatron_ledom.storage.records import LAUNCHES, Record
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.training.history import load_skipped_iterations, read_bad_steps, read_launches, read_steps
from megatron_ledom.training.state import TrainState, build_state, check_resumable
from megatron_ledom.training.step_policy import Action, StepPolicy, StepResult, Verdict
from megatron_ledom.training.trainer import compute_step, open_batches, run_iteration

MOST_PARAMETERS = 20
Numbers = tuple[float, float]
"""Loss and gradient norm."""


@torch.no_grad()
def squared_norms(model: list[Any], optimizer: Any) -> dict[str, float]:
    """Return the squared gradient norm of each parameter of the whole model, by name; they add up to the squared gradient norm.

    Call on every rank, after `measure_gradient` and before the next step.
    """
    names = {id(param): name for chunk in model for name, param in _named(unwrapped(chunk))}
    total: dict[str, float] = defaultdict(float)
    for part in optimizer.chained_optimizers:
        mine: dict[str, float] = defaultdict(float)
        for param, main in [] if part.is_stub_optimizer else _pairs(part):
            duplicate = not tensor_parallel.param_is_not_tensor_parallel_duplicate(main, getattr(part, "tp_group", None))
            if main.grad is not None and param_is_not_shared(main) and not duplicate:
                mine[names[id(param)]] += float(main.grad.double().square().sum())
        group = part.get_grad_stats_parallel_group()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, dict(mine), group)
        for name, square in (pair for found in everyone for pair in found.items()):
            total[name] += square
    return dict(total)


def _pairs(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each weight with the main weight that carries its gradient: itself, an fp32 copy, or this rank's piece."""
    if hasattr(part, "model_float16_groups"):  # distributed optimizer
        both = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif hasattr(part, "float16_groups"):
        same = part.fp32_from_fp32_groups
        both = [(part.float16_groups, part.fp32_from_float16_groups), (same, same)]
    else:
        groups = [group["params"] for group in part.param_groups]
        both = [(groups, groups)]
    for params, mains in both:
        for one, other in zip(params, mains, strict=True):
            yield from zip(one, other, strict=True)


def _named(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a model chunk, their layers numbered as in the whole model."""
    for name, param in chunk.named_parameters():
        found = re.match(r"decoder\.layers\.(\d+)\.", name)
        if found is None:
            yield name, param
        else:
            number = chunk.decoder.layers[int(found[1])].layer_number - 1
            yield f"decoder.layers.{number}.{name[found.end() :]}", param


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """The record of one step in a run folder."""

    numbers: Numbers | None
    skip_iterations: frozenset[int]
    """Iterations that were skipped when the step was done."""
    world_size: int | None
    config: RunConfig
    """The config of the launch that did the step; config.yaml is that of the last launch."""


def replay_step(run_dir: str, iteration: int, show: int, *, allow_long: bool) -> int:
    """Replay `iteration` of a run on the launched ranks and print it; 1 if it is not as recorded. The run folder is only read.

    Raises UsageError where more steps than lie between two checkpoints are to be repeated, unless `allow_long`.
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
            f"iteration {iteration} was done on {recorded.world_size} ranks, {launch.world_size} are launched; start it with torchrun"
            f" --nproc-per-node {recorded.world_size}, for other layouts take sums in another order"
        )
    check_config(config, launch.world_size)
    checkpoint = last_checkpoint_before(config, iteration)
    plan = _check_length(config, checkpoint, iteration, allow_long)
    if launch.rank == 0:
        print(plan, flush=True)
    return _replay(launch, recorded, checkpoint, iteration, show)


def read_recorded_step(config: RunConfig, iteration: int) -> RecordedStep:
    """Return the record of the last bad step of this number, or else of the ordinary one. Raises UsageError for one out of range."""
    if not 1 <= iteration <= config.train.train_iters:
        raise UsageError(f"--iteration {iteration} is not of this run; it can be 1 to {config.train.train_iters}")
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
    """Return the config of a launch; without launches that of the checkpoint before the step, or else of the last start."""
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
    before = [name for number, name in finished_checkpoints(folder).items() if number < iteration]
    return os.path.join(folder, before[-1]) if before else None


def _check_length(config: RunConfig, checkpoint: str | None, iteration: int, allow_long: bool) -> str:
    """Return a line on the length of the replay. Raises UsageError if it is longer than from one checkpoint to the next."""
    start = 0 if checkpoint is None else load_manifest(checkpoint).iteration
    steps, usual = iteration - start, config.checkpoint.save_interval
    begins = f"from {checkpoint or 'the initial weights'}, iteration {start}"
    if steps > usual and not allow_long:
        raise UsageError(
            f"the replay of iteration {iteration} would begin {begins}, and repeat {steps} steps; those between two checkpoints"
            f" (checkpoint.save_interval={usual}) are retired; give --allow-long if it shall"
        )
    return f"iteration {iteration} is replayed {begins}: {steps} steps"


@contextmanager
def _sample_index(config: RunConfig, sources: Sources, launch: Launch) -> Iterator[None]:
    """Make `config` name a folder with a whole sample index: the run's, or one on each node that is deleted at the end."""
    node, cache = socket.gethostname(), index_cache(config)
    with ExitStack() as stack:
        folder = None
        if launch.local_rank == 0:
            is_whole = all(index_spec(config, blend).is_intact(cache) for blend in sources.all_blends())
            folder = cache if is_whole else stack.enter_context(tempfile.TemporaryDirectory(prefix="sample_index_"))
        folders: list[Any] = [None] * launch.world_size
        dist.all_gather_object(folders, (node, folder))
        config.data.path_to_cache = next(path for where, path in folders if where == node and path is not None)
        prepare_indices(config, sources, index_cache(config), launch)
        yield


def _replay(launch: Launch, recorded: RecordedStep, checkpoint: str | None, iteration: int, show: int) -> int:
    config = recorded.config
    platform = prepare_platform(config.train.num_threads, launch)
    sources, _ = check_resumable(config, load_sources(config), checkpoint)
    groups = start_distributed(platform, config.parallel, launch)
    try:
        with _sample_index(config, sources, launch):
            state = build_state(config, sources, platform, groups, choose_layers(config), checkpoint)
            return _compare(state, recorded, iteration, show)
    finally:
        stop_distributed()


def _compare(state: TrainState, recorded: RecordedStep, iteration: int, show: int) -> int:
    """Go to the step, do it and print it; 1 if it is not as recorded."""
    result, differs = _go_to(state, iteration, recorded)
    norms = squared_norms(state.model, state.optimizer)
    if dist.get_rank() == 0:
        print("\n".join(_compared(result, recorded, differs)))
        print("\n".join(_parameters(norms)))
        print("\n".join(_samples(state, show)))
    return int(bool(differs) or (recorded.numbers is not None and not _same(_numbers(result), recorded.numbers)))


def _go_to(state: TrainState, iteration: int, recorded: RecordedStep) -> tuple[StepResult, list[int]]:
    """Repeat the steps before `iteration` and compute that one, without its update; also those that were not as recorded."""
    policy = StepPolicy(state.config.train, state.platform.device)
    past = read_steps(state.config.run_dir)
    policy.resume_from(step for step in past if step.iteration <= state.iteration)
    known = {step.iteration: (step.lm_loss, step.grad_norm) for step in past}
    differs = []
    batches = open_batches(state)
    while state.iteration < iteration - 1:
        number = state.iteration + 1
        result = run_iteration(state, batches, policy, recorded.skip_iterations)
        if result is not None and not result.verdict.is_accepted:
            raise UsageError(f"iteration {number} on the way is bad itself ({result.verdict.reason}); replay that one")
        if result is not None and number in known and not _same(_numbers(result), known[number]):
            differs.append(number)
    only_look = Verdict(Action.STOP, "replayed")
    return compute_step(state, batches, lambda *_: only_look), differs


def _numbers(result: StepResult) -> Numbers:
    return result.lm_loss, result.grad_norm


def _same(one: Numbers, other: Numbers) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


def _compared(result: StepResult, recorded: RecordedStep, differs: list[int]) -> Iterator[str]:
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
        yield f"steps on the way that are not as recorded, first ones: {differs[:8]}; was the run resumed with another config?"


def _parameters(norms: dict[str, float]) -> Iterator[str]:
    total = sum(norms.values())
    yield "\nlargest gradient norms of parameters, and their share of the square of the whole:"
    ranked = sorted(norms.items(), key=lambda item: (not math.isfinite(item[1]), item[1]), reverse=True)
    for name, square in ranked[:MOST_PARAMETERS]:
        share = f"{square / total:7.2%}" if math.isfinite(total) and total > 0 else ""
        yield f"  {math.sqrt(square) if math.isfinite(square) else square:12.5g}  {share:>8}  {name}"


def _samples(state: TrainState, show: int) -> Iterator[str]:
    """Yield the sources of the samples of the step, and the first samples as text."""
    first = state.consumed_train_samples
    samples = range(first, first + state.config.train.global_batch_size)
    yield f"\nsamples {samples[0]} to {samples[-1]}"
    folder = os.path.join(state.config.run_dir, RUN_TOKENIZER)
    tokenizer = load_tokenizer(folder) if os.path.isdir(folder) else None
    for origin in sample_origins(state.train_dataset, samples[:show]):
        yield f"\nsample {origin['sample']} of {origin['source']}, documents {origin['documents']}"
        ids = [int(number) for number in state.train_dataset[origin["sample"]]["tokens"]]
        yield from (f"  {text}" for text in _texts(ids, tokenizer, state))


def _texts(ids: list[int], tokenizer: Tokenizer | None, state: TrainState) -> Iterator[str]:
    """Yield the pieces of documents in a sample, each in reading order."""
    piece: list[Any] = []
    for number in [*ids, state.provenance.eod_id]:
        if number != state.provenance.eod_id:
            piece.append(number)
        elif piece:
            text_ids = to_text_order(piece, state.config.data.direction)
            yield repr(tokenizer.decode(text_ids)) if tokenizer is not None else str(text_ids)
            piece = []
