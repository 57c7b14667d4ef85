"""Checks of a run before torch is imported: can it write, is every package there, is it complete already."""

import importlib.util

from megatron_ledom.checkpoint.folder import advising_another
from megatron_ledom.checkpoint.manifest import check_fits, check_same_samples, check_sizes, load_manifest
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Sources
from megatron_ledom.errors import UsageError
from megatron_ledom.training.run_folder import check_writable


def check_environment(config: RunConfig) -> None:
    """Refuse a run that cannot write its folder, or lacks a package that the config asks for. Makes nothing."""
    check_writable(config.run_dir)
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError("logging.wandb_project is set but wandb is not installed: pip install 'megatron-ledom[wandb]'")


def is_complete(config: RunConfig, sources: Sources, checkpoint: str | None) -> bool:
    """Return whether the checkpoint is one of this run, and its last. Raises LedomError for one that does not fit."""
    if checkpoint is None:
        return False
    with advising_another(checkpoint):
        if load_manifest(checkpoint).iteration != config.train.train_iters:
            return False
        manifest = check_sizes(checkpoint)
    check_fits(manifest, config, sources.provenance, checkpoint)
    check_same_samples(manifest, config, sources.train_shards(), checkpoint)
    return True
