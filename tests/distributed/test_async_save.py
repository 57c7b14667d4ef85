"""A checkpoint that is written while training continues contains the weights of its own step."""

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_runs import TinyData, read_tensors, start_ranks

OVERLAPPED = (
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)


def train_and_save(config_file: str, run_dir: str) -> None:
    """Save, as one rank, after steps 2 and 4, with the writer delayed for two steps; write the live weights to a file."""
    from megatron_ledom.checkpoint import writing
    from megatron_ledom.checkpoint.store import sharded_weights, unwrapped
    from megatron_ledom.config.derived import train_samples
    from megatron_ledom.config.load import load_config
    from megatron_ledom.data.blends.sources import load_sources
    from megatron_ledom.data.dataset.batch import batch_iterators
    from megatron_ledom.data.dataset.blend_samples import index_cache
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.collectives import gathered_weights
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.platform.launch import read_launch
    from megatron_ledom.training.state import build_state, save_checkpoint
    from megatron_ledom.training.step_policy import Action, Verdict
    from megatron_ledom.training.trainer import train_step

    write_now = writing._write_files

    def delayed(*arguments: Any, part: str, **how: Any) -> None:
        while not os.path.exists(f"{run_dir}/write{int(part.removesuffix('.part')[-7:])}"):
            time.sleep(0.01)
        write_now(*arguments, part=part, **how)

    writing._write_files = delayed
    config = load_config(config_file, [f"run_dir={run_dir}", *OVERLAPPED])
    platform, sources, launch = prepare_platform(1), load_sources(config), read_launch()
    prepare_indices(config, sources, index_cache(config), launch)
    groups = start_distributed(platform, config.parallel, launch)
    state = build_state(config, sources, platform, groups, choose_layers(config), None)
    batches = batch_iterators(
        config, state.train_dataset, 0, train_samples(config), groups, platform.device, state.provenance.eod_id
    )
    longest, judge = 0.0, lambda *_: Verdict(Action.UPDATE)
    assert state.store.seconds_to_finish() == 0
    for step in range(1, 7):
        train_step(config, state.model, state.optimizer, batches, groups, judge, global_batch_size=8)
        state.advance()
        if step in (2, 4):
            save_checkpoint(state)
            began = time.monotonic()
            with gathered_weights(state.model):
                entries = sharded_weights(state.model, state.store.metadata)["model"].items()
                names = {name: entry.key for name, entry in entries if hasattr(entry, "key")}
                live = {name: weight.clone() for name, weight in unwrapped(state.model[0]).named_parameters()}
            if groups.data.rank() == 0:
                torch.save({names.get(name, name): weight for name, weight in live.items()}, f"{run_dir}/live{step}.pt")
        state.store.poll()
        if step in (3, 5):  # two steps have changed the weights since
            assert len(multiprocessing.active_children()) == 1
            delay = time.monotonic() - began
            assert state.store.seconds_to_finish() >= max(longest, delay)  # the rest of this save, and one more
            torch.distributed.barrier()
            Path(f"{run_dir}/write{step - 1}").touch()
            state.store.finish()
            longest = max(longest, delay)
            assert state.store.seconds_to_finish() >= longest
    stop_distributed()


def test_two_saves_have_the_live_weights_of_their_steps(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    act = partial(train_and_save, str(data.config), str(run_dir))
    ranks = start_ranks(data.config, run_dir, num_ranks=2, instead=act)
    assert ranks.wait() == [0, 0], ranks.output()
    stored = {}
    for step in (2, 4):
        (run_dir / "checkpoints/latest").write_text(f"iter_{step:07d}\n")
        stored[step] = read_tensors(run_dir)
        live = torch.load(run_dir / f"live{step}.pt", weights_only=True)
        compared = 0
        for name, weight in live.items():
            if name in stored[step] and stored[step][name].shape == weight.shape:
                assert torch.equal(stored[step][name], weight), name
                compared += 1
        assert compared >= 3
    changed = [name for name in stored[2] if not torch.equal(stored[2][name], stored[4][name])]
    assert len(changed) == len(stored[2])
