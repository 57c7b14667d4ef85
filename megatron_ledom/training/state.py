"""Everything a running training holds, built once from the config."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.manifest import CheckpointManifest, changes_since, check_fits, check_same_samples
from megatron_ledom.checkpoint.store import CheckpointStore, check_sizes
from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.dataset import build_train_dataset, build_valid_datasets
from megatron_ledom.data.sources import Sources
from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata, wrap_for_training
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.parallel.groups import ParallelGroups
from megatron_ledom.parallel.seeds import seed_iteration
from megatron_ledom.platform.device import Platform
from megatron_ledom.provenance import Provenance
from megatron_ledom.training.optimizer import build_optimizer, build_scheduler

log = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainState:
    """A run in memory: what it is made of, and how far it has come."""

    config: RunConfig
    platform: Platform
    groups: ParallelGroups
    provenance: Provenance
    model: list[Any]
    """This rank's model chunks, wrapped for training."""
    optimizer: Any
    scheduler: Any
    train_dataset: Any
    valid_datasets: dict[str, Any]
    sources: Sources
    store: CheckpointStore
    iteration: int = 0
    """Optimizer steps done."""
    consumed_train_samples: int = 0
    consumed_train_tokens: int = 0

    def advance(self) -> None:
        """Count one optimizer step."""
        self.iteration += 1
        self.consumed_train_samples += self.config.train.global_batch_size
        self.consumed_train_tokens += self.config.train.global_batch_size * self.config.data.seq_length


def checkpoint_folder(config: RunConfig) -> str:
    """Where the checkpoints of a run are."""
    return os.path.join(config.run_dir, "checkpoints")


def check_resumable(config: RunConfig, sources: Sources) -> None:
    """Refuse a run folder whose latest checkpoint is of another run, before anything in it is changed."""
    latest = latest_checkpoint(checkpoint_folder(config))
    if latest is not None:
        manifest = check_sizes(latest)
        check_fits(manifest, config, sources.provenance, latest)
        check_same_samples(manifest, config, sources.train_shards(), latest)


def build_state(
    config: RunConfig, sources: Sources, platform: Platform, groups: ParallelGroups, choice: LayerChoice
) -> TrainState:
    """Build model, optimizer, schedule and data; then take up the latest checkpoint of the run folder, if there is one.

    Call `check_resumable` first.
    """
    seed_iteration(config.train.seed, 0, groups)
    cache = config.data.path_to_cache or os.path.join(config.run_dir, "index_cache")
    padded = padded_vocab_size(sources.provenance.vocab_size, config.model.make_vocab_size_divisible_by)
    model = wrap_for_training(config, build_model_chunks(config, padded, groups, choice))
    optimizer = build_optimizer(config, model, groups)
    state = TrainState(
        config=config,
        platform=platform,
        groups=groups,
        provenance=sources.provenance,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        train_dataset=build_train_dataset(config, sources, cache),
        valid_datasets=build_valid_datasets(config, sources, cache),
        sources=sources,
        store=CheckpointStore(checkpoint_folder(config), checkpoint_metadata(groups), config.checkpoint),
    )
    _resume(state)
    return state


def _resume(state: TrainState) -> None:
    """Take up weights, optimizer, schedule and position from the latest checkpoint."""
    latest = state.store.latest()
    if latest is None:
        log.info("starting from scratch: no checkpoint in %s", state.store.folder)
        return
    manifest = state.store.load_manifest(latest)
    for change in changes_since(manifest, state.config):
        log.warning("changed since the checkpoint: %s", change)
    state.store.load(latest, state.model, state.optimizer, state.scheduler)
    state.iteration = manifest.iteration
    state.consumed_train_samples = manifest.consumed_train_samples
    state.consumed_train_tokens = manifest.consumed_train_tokens
    log.info("resumed from %s at iteration %d", latest, state.iteration)


def save_checkpoint(state: TrainState) -> None:
    """Begin a checkpoint of this iteration; `state.store` finishes it. Call on every rank."""
    manifest = CheckpointManifest.describe(
        state.config,
        state.provenance,
        state.sources.train_shards(),
        dist.get_world_size(),
        iteration=state.iteration,
        consumed_train_samples=state.consumed_train_samples,
        consumed_train_tokens=state.consumed_train_tokens,
    )
    state.store.save(manifest, state.model, state.optimizer, state.scheduler)
