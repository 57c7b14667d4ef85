"""The state of a run: model, optimizer, schedule, data and position, built once from the config."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_ledom.checkpoint.chain import continued_chain
from megatron_ledom.checkpoint.folder import advising_another
from megatron_ledom.checkpoint.manifest import (
    CheckpointManifest,
    check_fits,
    check_same_samples,
    check_sizes,
    samples_at_end,
)
from megatron_ledom.checkpoint.store import CheckpointStore
from megatron_ledom.checkpoint.weight_ema import WeightEma
from megatron_ledom.config.batch_schedule import batch_size_at
from megatron_ledom.config.derived import checkpoint_folder, without_stated_directions
from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Sources
from megatron_ledom.data.dataset.blend_samples import BlendSamples, build_held_out_datasets, build_train_dataset, index_cache
from megatron_ledom.model.auxiliary_head import HEAD
from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata, wrap_for_training
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.parallel.collectives import check_same, on_every_rank
from megatron_ledom.parallel.groups import ParallelGroups, seed_iteration
from megatron_ledom.platform.device import Platform
from megatron_ledom.provenance import Provenance
from megatron_ledom.reverse_teacher import ReverseTeacher, check_same_head, find_teacher, head_differences
from megatron_ledom.storage.jobs import differences
from megatron_ledom.storage.records import Record
from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
from megatron_ledom.training.origin import Origin

log = logging.getLogger(__name__)

OTHER_CHECKPOINT = "run_dir must be the same folder on all nodes; if it is, a node saw an old state of it: start again"


@dataclass(slots=True)
class TrainState:
    """The parts of a run in memory, and its position."""

    config: RunConfig
    platform: Platform
    groups: ParallelGroups
    provenance: Provenance
    model: list[Any]
    """This rank's model chunks, wrapped for training."""
    optimizer: Any
    scheduler: Any
    train_dataset: BlendSamples
    valid_datasets: dict[str, BlendSamples]
    test_datasets: dict[str, BlendSamples]
    """Sets that are evaluated once, at the end."""
    sources: Sources
    store: CheckpointStore
    teacher: ReverseTeacher | None = None
    """The frozen reverse model of `train.auxiliary`."""
    ema: WeightEma | None = None
    """The moving average of the weights, with `optimizer.ema_decay`."""
    iteration: int = 0
    """Number of iterations done, with or without an update."""
    consumed_train_samples: int = 0
    consumed_train_tokens: int = 0
    started_from: list[Record] = field(default_factory=list)
    """The checkpoints of other runs that this run started from, the oldest first."""
    last_batch_size: int = 0
    """Samples of the iteration that `advance` counted last; 0 before the first one of this launch."""

    @property
    def next_batch_size(self) -> int:
        """Samples of the next iteration, over all ranks: a function of the config and of the samples consumed so far."""
        return batch_size_at(self.config, self.consumed_train_samples)

    def advance(self) -> None:
        """Count one iteration, with or without an update, and its samples; advance the learning-rate schedule."""
        self.scheduler.step(increment=1)
        self.iteration += 1
        self.last_batch_size = self.next_batch_size
        self.consumed_train_samples += self.last_batch_size
        self.consumed_train_tokens += self.last_batch_size * self.config.data.seq_length


def check_resumable(
    config: RunConfig, sources: Sources, checkpoint: str | None, origin: Origin | None = None
) -> tuple[Sources, list[str]]:
    """Refuse a checkpoint of another run before anything is changed; None means that the run starts from scratch or `origin`.

    Returns the sources, with the samples that the run will have drawn at its end, and the changes of the training data since
    the checkpoint that data.allow_changed_data accepted.
    """
    teacher = find_teacher(config, sources.provenance)
    if checkpoint is None and origin is not None and origin.state != "weights":
        otherwise = "restore the settings, or set init_state=weights, with which the head starts afresh"
        check_same_head(origin.manifest, config, teacher, origin.checkpoint, otherwise)
    if checkpoint is None and origin is not None and origin.state == "all":
        checkpoint, manifest = origin.checkpoint, origin.manifest
    elif checkpoint is None:
        return sources, []
    else:
        with advising_another(checkpoint):
            manifest = check_sizes(checkpoint)
        check_fits(manifest, config, sources.provenance, checkpoint)
        otherwise = "restore the settings, or begin another run_dir, which can start from these weights with init_from"
        check_same_head(manifest, config, teacher, checkpoint, otherwise)
    changed = check_same_samples(manifest, config, sources.train_shards(), checkpoint)
    return sources.of_samples(config, samples_at_end(manifest, config)), changed


def build_state(
    config: RunConfig,
    sources: Sources,
    platform: Platform,
    groups: ParallelGroups,
    choice: LayerChoice,
    checkpoint: str | None,
    origin: Origin | None = None,
) -> TrainState:
    """Build model, optimizer, schedule and data; then load a checkpoint of this run, or start from scratch with None.

    origin: the checkpoint of another run to start from, if there is none of this run. Call `check_resumable` and
    `prepare_indices` first. Raises RuntimeError if the ranks found different checkpoints.
    """
    check_same("the checkpoint to resume from", checkpoint, OTHER_CHECKPOINT)
    check_same("the checkpoint of init_from", origin and origin.chain, OTHER_CHECKPOINT)
    seed_iteration(config.train.seed, 0, groups)
    cache, teacher = index_cache(config), on_every_rank(lambda: _load_teacher(config, sources.provenance, groups, platform))
    width = None if teacher is None else teacher.folder.width
    chunks = build_model_chunks(config, sources.provenance.vocab_size, groups, choice, predicted_width=width)
    model = wrap_for_training(config, chunks)
    optimizer = build_optimizer(config, model, groups)
    state = TrainState(
        config=config,
        platform=platform,
        groups=groups,
        provenance=sources.provenance,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        train_dataset=on_every_rank(lambda: build_train_dataset(config, sources, cache)),
        valid_datasets=on_every_rank(lambda: build_held_out_datasets(config, sources, sources.valid, cache)),
        test_datasets=on_every_rank(lambda: build_held_out_datasets(config, sources, sources.test, cache)),
        sources=sources,
        teacher=teacher,
        ema=None if config.optimizer.ema_decay is None else WeightEma(optimizer, config.optimizer.ema_decay),
        store=CheckpointStore(checkpoint_folder(config), checkpoint_metadata(groups), config.checkpoint),
    )
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
    elif origin is not None:
        start_from(state, origin)
    else:
        log.info("starting from scratch: no checkpoint in %s", state.store.folder)
    return state


def _load_teacher(
    config: RunConfig, provenance: Provenance, groups: ParallelGroups, platform: Platform
) -> ReverseTeacher | None:
    """Return the teacher of `train.auxiliary` on this rank; None without one."""
    folder = find_teacher(config, provenance)
    return None if folder is None else ReverseTeacher(folder, config, provenance.eod_id, groups, platform.device)


def _unread(state: TrainState, manifest: CheckpointManifest, where: str) -> str | None:
    """Return the beginning of the names of weights that start afresh where only weights are read: those of another or no head."""
    if state.teacher is None:
        return None
    changed = head_differences(manifest, state.config, state.teacher.folder, where)
    if not changed:
        return None
    log.info("the auxiliary head starts afresh, it is not that of %s: %s", where, "; ".join(changed))
    return HEAD


def start_from(state: TrainState, origin: Origin) -> None:
    """Load the checkpoint of another run, as far as `init_state` says. Call on every rank."""
    only_weights = origin.state == "weights"
    state.store.start_from(
        origin.checkpoint,
        state.model,
        state.optimizer,
        state.scheduler,
        state.ema,
        only_weights=only_weights,
        unread=_unread(state, origin.manifest, origin.checkpoint) if only_weights else None,
    )
    _take_position(state, origin.manifest if origin.state == "all" else None)
    state.started_from = origin.chain
    log.info("started at iteration %d from %s", state.iteration, origin.describe())


def _take_position(state: TrainState, manifest: CheckpointManifest | None) -> None:
    """Set schedule and position to those of a checkpoint; to the beginning with None."""
    state.iteration = manifest.iteration if manifest else 0
    state.consumed_train_samples = manifest.consumed_train_samples if manifest else 0
    state.consumed_train_tokens = manifest.consumed_train_tokens if manifest else 0
    state.scheduler.num_steps = 0  # loading adds the stored position, which old checkpoints count in samples
    state.scheduler.step(increment=state.iteration)


def load_checkpoint(state: TrainState, checkpoint: str) -> None:
    """Load weights, optimizer, schedule and position from a checkpoint of this run. Call on every rank."""
    manifest = state.store.load_manifest(checkpoint)
    before, now = (to_dict(without_stated_directions(one)) for one in (manifest.run_config(checkpoint), state.config))
    for change in [] if manifest.weights_only else differences(before, now):
        log.warning("changed since the checkpoint: %s", change)
    unread = _unread(state, manifest, checkpoint) if manifest.weights_only else None
    state.store.load(checkpoint, state.model, state.optimizer, state.scheduler, state.ema, unread=unread)
    _take_position(state, manifest)
    state.started_from = continued_chain(checkpoint, manifest)
    log.info("%s %s at iteration %d", "weights of" if manifest.weights_only else "resumed from", checkpoint, state.iteration)


def save_checkpoint(state: TrainState) -> None:
    """Start saving a checkpoint of this iteration; `state.store` finishes it. Call on every rank."""
    manifest = CheckpointManifest.describe(
        state.config,
        state.provenance,
        state.sources.train_shards(),
        dist.get_world_size(),
        state.started_from,
        teacher=None if state.teacher is None else state.teacher.folder.record,
        iteration=state.iteration,
        consumed_train_samples=state.consumed_train_samples,
        consumed_train_tokens=state.consumed_train_tokens,
    )
    state.store.save(manifest, state.model, state.optimizer, state.scheduler, state.ema)
