"""Loads a checkpoint into Transformer Engine's layers and optimizer, and saves their state as a checkpoint of another run.

`python -m tests.support.te_without_extension tests.judges.te_resume CONFIG RUN_DIR OTHER_RUN_DIR`
"""

import sys
from dataclasses import replace

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.store import CheckpointStore, unwrapped
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.blend_samples import index_cache
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.launch import ALONE
from megatron_ledom.training.state import build_state, check_resumable, save_checkpoint
from tests.judges.te_models import TRANSFORMER_ENGINE, pretend_cuda


def move(config_file: str, run_dir: str, other_run_dir: str) -> None:
    """Resume the run in `run_dir` with Transformer Engine's layers, and save at once into `other_run_dir`."""
    config = load_config(config_file, [f"run_dir={run_dir}"])
    platform = replace(pretend_cuda(), backend="gloo")
    groups = start_distributed(platform, config.parallel, ALONE)
    checkpoint = latest_checkpoint(checkpoint_folder(config))
    sources, _ = check_resumable(config, load_sources(config), checkpoint)
    prepare_indices(config, sources, index_cache(config), ALONE)
    state = build_state(config, sources, platform, groups, TRANSFORMER_ENGINE, checkpoint)
    print(type(unwrapped(state.model[0]).decoder.layers[0].self_attention.linear_qkv).__name__)
    adam = type(getattr(state.optimizer.chained_optimizers[0], "optimizer", None))
    print(f"{adam.__module__}.{adam.__name__}")
    other = replace(config, run_dir=other_run_dir)
    state.store = CheckpointStore(checkpoint_folder(other), state.store.metadata, config.checkpoint)
    save_checkpoint(state)
    state.store.finish()
    stop_distributed()


if __name__ == "__main__":
    move(*sys.argv[1:])
