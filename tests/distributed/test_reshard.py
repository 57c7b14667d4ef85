"""A checkpoint of any layout of four ranks loads unchanged in any other, with its optimizer state.

The other layout saves at once what it has loaded; the tensors of both checkpoints are equal bit for bit. Each layout trains
from its own seed, so that a tensor which was not loaded is seen.
"""

import os
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.store import CheckpointStore
from megatron_ledom.config.load import load_config
from tests.support.tiny_runs import TinyData, free_ports, read_tensors, start_ranks

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
CHUNKS, SEQUENCE = "virtual_pipeline_model_parallel_size=2", "sequence_parallel=true"
LAYOUTS = {
    "TP4": [f"{TP}=4"],
    "PP4": [f"{PP}=4"],
    "CP4": [f"{CP}=4"],
    "DP4": [],
    "TP2 PP2": [f"{TP}=2", f"{PP}=2"],
    "TP2 CP2": [f"{TP}=2", f"{CP}=2"],
    "TP2 DP2 with sequence parallel": [f"{TP}=2", SEQUENCE],
    "PP2 CP2": [f"{PP}=2", f"{CP}=2"],
    "PP2 DP2": [f"{PP}=2"],
    "CP2 DP2": [f"{CP}=2"],
    "PP4 of 2 chunks": [f"{PP}=4", CHUNKS],
    "TP2 PP2 of 2 chunks": [f"{TP}=2", f"{PP}=2", CHUNKS],
    "PP2 of 2 chunks, CP2": [f"{PP}=2", f"{CP}=2", CHUNKS],
    "PP2 of 2 chunks, DP2": [f"{PP}=2", CHUNKS],
}
OPTIMIZERS = {
    "ordinary optimizer": [],
    "distributed optimizer": ["use_distributed_optimizer=true", "overlap_grad_reduce=true", "overlap_param_gather=true"],
}
MODEL = ("model.num_layers=8", "train.train_iters=2", "checkpoint.save_interval=2", "optimizer.lr_warmup_iters=1")
Visit = tuple[list[str], str, str, int]
"""Overrides of a layout, the run to load (or to train, if it is new), the folder to save to, and a port for the rendezvous."""


def visit(config_file: str, visits: list[Visit]) -> None:
    """Load and save in each layout in turn, as one rank."""
    from megatron_ledom.callbacks.build import build_callbacks
    from megatron_ledom.data.blends.sources import load_sources
    from megatron_ledom.data.dataset.blend_samples import index_cache
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.model.builder import checkpoint_metadata
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.platform.launch import read_launch
    from megatron_ledom.training.resilience import StopRequest
    from megatron_ledom.training.state import build_state, save_checkpoint
    from megatron_ledom.training.trainer import train
    from megatron_ledom.training.watchdog import Watchdog

    for overrides, run_dir, target, port in visits:
        os.environ["MASTER_PORT"] = str(port)
        config = load_config(config_file, [f"run_dir={run_dir}", *overrides])
        platform, launch = prepare_platform(1), read_launch()
        checkpoint = latest_checkpoint(f"{run_dir}/checkpoints")
        sources = load_sources(config)
        prepare_indices(config, sources, index_cache(config), launch)
        groups = start_distributed(platform, config.parallel, launch)
        state = build_state(config, sources, platform, groups, choose_layers(config), checkpoint)
        if target == run_dir:
            os.makedirs(run_dir, exist_ok=True)
            with Watchdog(config, launch) as watchdog:
                train(state, StopRequest(), build_callbacks(state, watchdog, {}))
        else:
            assert state.iteration == 2
            state.store = CheckpointStore(f"{target}/checkpoints", checkpoint_metadata(groups), config.checkpoint)
            save_checkpoint(state)
            state.store.finish()
        stop_distributed()


def overrides_of(name: str, optimizer: str) -> list[str]:
    seed = f"train.seed={list(LAYOUTS).index(name)}"
    return [*MODEL, seed, *(f"parallel.{setting}" for setting in [*LAYOUTS[name], *OPTIMIZERS[optimizer]])]


def run_visits(data: TinyData, folder: Path, visits: list[Visit]) -> None:
    ranks = start_ranks(data.config, folder / "log", num_ranks=4, instead=partial(visit, str(data.config), visits))
    assert ranks.wait() == [0] * 4, ranks.output()


def check_equal(found: Path, expected: Path) -> None:
    """Check that tensors, steps and schedule are the same."""
    tensors, wanted = read_tensors(found), read_tensors(expected)
    assert tensors.keys() == wanted.keys()
    assert sum("exp_avg_sq" in name for name in tensors) == sum("exp_avg" in name for name in tensors) / 2 > 0
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name])] == []
    assert common_state(found)["scheduler"] == common_state(expected)["scheduler"]


def common_state(run_dir: Path) -> dict[str, Any]:
    """Return the state that is the same on all ranks: schedule and steps."""
    loaded: dict[str, Any] = torch.load(f"{latest_checkpoint(f'{run_dir}/checkpoints')}/common.pt", weights_only=True)
    return loaded


def path_of(folder: Path, *names: str) -> str:
    return str(folder / " to ".join(names).replace(" ", "_").replace(",", ""))


@pytest.mark.parametrize(
    ("optimizer", "num_layouts"),
    [
        ("distributed optimizer", 8),
        *(pytest.param(optimizer, len(LAYOUTS), marks=pytest.mark.slow) for optimizer in OPTIMIZERS),
    ],
)
def test_a_checkpoint_passed_through_layouts_is_unchanged(
    data: TinyData, tmp_path: Path, optimizer: str, num_layouts: int
) -> None:
    """Each layout loads the checkpoint of the previous one; the first layout also loads the last checkpoint. Every run draws others."""
    names = random.sample(list(LAYOUTS), num_layouts)
    print("order:", names)
    first, run = overrides_of(names[0], optimizer), path_of(tmp_path, names[0])
    ports = iter(free_ports(len(names) + 1))
    visits: list[Visit] = [(first, run, run, next(ports))]
    for name in [*names[1:], names[0]]:
        target = path_of(tmp_path, f"{len(visits)}", name)
        visits.append((overrides_of(name, optimizer), run, target, next(ports)))
        run = target
    run_visits(data, tmp_path, visits)
    start = tmp_path / Path(visits[0][1]).name
    for _, _, target, _ in visits[1:]:
        check_equal(Path(target), start)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_in_every_other(data: TinyData, tmp_path: Path, name: str, optimizer: str) -> None:
    own = path_of(tmp_path, name)
    ports = iter(free_ports(len(LAYOUTS) + 1))
    visits: list[Visit] = [(overrides_of(name, optimizer), own, own, next(ports))]
    for other in LAYOUTS:
        visits.append((overrides_of(other, optimizer), own, path_of(tmp_path, name, other), next(ports)))
    run_visits(data, tmp_path, visits)
    for _, _, target, _ in visits[1:]:
        check_equal(Path(target), Path(own))


def test_the_comparison_sees_two_different_runs(data: TinyData, tmp_path: Path) -> None:
    runs = [path_of(tmp_path, name) for name in ("DP4", "TP4")]
    ones = zip(("DP4", "TP4"), runs, free_ports(2), strict=True)
    run_visits(data, tmp_path, [(overrides_of(name, "ordinary optimizer"), run, run, port) for name, run, port in ones])
    for one, other in product(runs, runs):
        if one != other:
            with pytest.raises(AssertionError):
                check_equal(Path(one), Path(other))
