"""Everything a running training holds, built once from the config."""

import logging
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_ledom.checkpoint.manifest import (
    CheckpointManifest,
    changes_since,
    check_fits,
    check_same_samples,
    planned_samples,
)
from megatron_ledom.checkpoint.store import CheckpointStore, check_sizes, latest_checkpoint
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.dataset import BlendSamples, build_held_out_datasets, build_train_dataset, index_cache
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
    train_dataset: BlendSamples
    valid_datasets: dict[str, BlendSamples]
    test_datasets: dict[str, BlendSamples]
    """Evaluated once, at the end."""
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


def check_resumable(config: RunConfig, sources: Sources) -> tuple[Sources, list[str]]:
    """Refuse a run folder whose latest checkpoint is of another run, before anything in it is changed.

    Returns the sources, with the samples that the run will have drawn at its end, and what of the training data has changed
    with leave since the checkpoint.
    """
    latest = latest_checkpoint(checkpoint_folder(config))
    if latest is None:
        return sources, []
    manifest = check_sizes(latest)
    check_fits(manifest, config, sources.provenance, latest)
    changed = check_same_samples(manifest, config, sources.train_shards(), latest)
    return sources.of_samples(config, planned_samples(manifest, config)), changed


def build_state(
    config: RunConfig, sources: Sources, platform: Platform, groups: ParallelGroups, choice: LayerChoice
) -> TrainState:
    """Build model, optimizer, schedule and data; then take up the latest checkpoint of the run folder, if there is one.

    Call `check_resumable` and `prepare_indices` first.
    """
    seed_iteration(config.train.seed, 0, groups)
    cache = index_cache(config)
    model = wrap_for_training(config, build_model_chunks(config, sources.provenance.vocab_size, groups, choice))
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
        valid_datasets=build_held_out_datasets(config, sources, sources.valid, cache),
        test_datasets=build_held_out_datasets(config, sources, sources.test, cache),
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
