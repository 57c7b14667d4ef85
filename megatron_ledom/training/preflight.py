"""Checks of a run before torch is imported: its folder is writable, packages are installed, it is not complete yet."""

import importlib.util
import os

from megatron_ledom.checkpoint.folder import advising_another
from megatron_ledom.checkpoint.manifest import check_fits, check_same_samples, check_sizes, load_manifest
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Sources
from megatron_ledom.errors import ConfigError
from megatron_ledom.platform.core_versions import check_core, check_muon
from megatron_ledom.training.run_folder import check_writable


def check_environment(config: RunConfig) -> None:
    """Refuse a run that cannot write its folder, or that lacks a package that the config needs. Creates no files."""
    check_writable(config.run_dir)
    check_core()
    if config.optimizer.optimizer == "muon":
        check_muon()
    logs = config.logging
    for key, value, extra, modules in (
        ("wandb_project", logs.wandb_project, "wandb", ("wandb",)),
        ("mlflow_experiment", logs.mlflow_experiment, "mlflow", ("mlflow",)),
        ("otlp_endpoint", logs.otlp_endpoint, "otlp", ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")),
    ):
        missing = None if value is None else next((name for name in modules if not _is_installed(name)), None)
        if missing is not None:
            raise ConfigError(f"logging.{key} is set but {missing} is not installed: pip install 'megatron-ledom[{extra}]'")
    if logs.mlflow_experiment is not None and logs.mlflow_uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "logging.mlflow_experiment is set, but no address: set logging.mlflow_uri or MLFLOW_TRACKING_URI, for example to"
            " http://mlflow:5000; without one MLflow would write into the current folder"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


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
