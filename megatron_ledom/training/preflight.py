"""Checks of a run before torch is imported: its folder is writable, packages are installed, it is not complete yet."""

import importlib.util

from megatron_ledom.checkpoint.folder import advising_another
from megatron_ledom.checkpoint.manifest import check_fits, check_same_samples, check_sizes, load_manifest
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Sources
from megatron_ledom.errors import UsageError
from megatron_ledom.platform.core_versions import check_core, check_muon
from megatron_ledom.training.run_folder import check_writable


def check_environment(config: RunConfig) -> None:
    """Refuse a run that cannot write its folder, or that lacks a package that the config needs. Creates no files."""
    check_writable(config.run_dir)
    check_core()
    if config.optimizer.optimizer == "muon":
        check_muon()
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError("logging.wandb_project is set but wandb is not installed: pip install 'megatron-ledom[wandb]'")


def is_complete(config: RunConfig, sources: Sources, checkpoint: str | None) -> bool:
    """Return True if the checkpoint is the last one of this run. Raises LedomError if it does not fit the run."""
    if checkpoint is None:
        return False
    with advising_another(checkpoint):
        if load_manifest(checkpoint).iteration != config.train.train_iters:
            return False
        manifest = check_sizes(checkpoint)
    check_fits(manifest, config, sources.provenance, checkpoint)
    check_same_samples(manifest, config, sources.train_shards(), checkpoint)
    return True
