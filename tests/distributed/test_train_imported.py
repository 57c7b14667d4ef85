"""A public model is imported and trained in reverse: in any layout, from its weights, with a fresh optimizer."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from tests.support.conversion_checks import check_same_folders, check_same_runs, core_weights
from tests.support.stock_folders import family_folder, stock_config, stock_folder
from tests.support.tiny_runs import TinyData, curve, free_ports, run_each_on_ranks, run_on_ranks, start_ranks

STEPS = [
    "train.train_iters=5",
    "train.global_batch_size=4",
    "data.seq_length=32",
    "train.num_threads=1",
    "optimizer.lr_warmup_iters=0",
]
QUIET = ["logging.log_interval=1", "logging.tensorboard=false", "logging.peak_tflops=1.0"]
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CASES = (pytest.param("Qwen2, tied", marks=pytest.mark.slow), "Qwen3")


def imported(folder: Path, case: str, *names: str) -> list[Path]:
    """Import the same weights into several runs, and return their folders."""
    source = family_folder(folder / "stock", case)
    for name in names:
        import_hf(str(source), str(folder / name), direction=Direction.REVERSE)
    return [folder / name for name in names]


@pytest.mark.parametrize("case", CASES)
def test_five_steps_from_imported_weights_are_alike_in_every_layout(data: TinyData, tmp_path: Path, case: str) -> None:
    alone, tensor, spread, pipeline = imported(tmp_path, case, "alone", "tensor", "spread", "pipeline")
    blend = f"data.train_blend=[[1.0,{data.shard('reverse_train')}]]"
    common = [*STEPS, *QUIET, blend]
    expected = curve(run_on_ranks(alone / "model.yaml", alone, *common))
    layouts = {
        tensor: [*common, f"{TP}=2", "parallel.sequence_parallel=true", f"data.tokenizer={tensor}/tokenizer"],
        spread: [*common, f"{TP}=1", "parallel.use_distributed_optimizer=true", f"data.tokenizer={spread}/tokenizer"],
        pipeline: [*common, f"{PP}=2", f"data.tokenizer={pipeline}/tokenizer"],
    }
    found = run_each_on_ranks(alone / "model.yaml", layouts, num_ranks=2)
    assert len(expected) == 5
    assert expected[-1][0] < expected[0][0]
    for run, records in found.items():
        assert [value for pair in curve(records) for value in pair] == pytest.approx(
            [value for pair in expected for value in pair], rel=2e-5
        ), run
    assert load_manifest(find_checkpoint(str(tensor))).iteration == 5
    for run in layouts:
        parity = export_hf(str(run), str(tmp_path / f"out_{run.name}"))
        assert parity is not None
        assert parity.largest_logit_difference <= 1e-4
        assert json.loads((tmp_path / f"out_{run.name}/config.json").read_text())["direction"] == "reverse"


def test_a_run_starts_from_exactly_these_weights_and_resumes_after_a_stop(data: TinyData, tmp_path: Path) -> None:
    (run,) = imported(tmp_path, "Llama", "run")
    before = core_weights(run)
    still = ["optimizer.lr=1e-30", "optimizer.min_lr=0.0", "optimizer.weight_decay=0.0"]
    common = [*STEPS, *QUIET, *still, f"data.train_blend=[[1.0,{data.shard('reverse_train')}]]"]
    run_on_ranks(run / "model.yaml", run, *common, "train.exit_interval=2", f"{TP}=2", num_ranks=2)
    assert load_manifest(find_checkpoint(str(run))).iteration == 2
    records = run_on_ranks(run / "model.yaml", run, *common)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    after = core_weights(run)
    assert [name for name, weight in before.items() if not torch.equal(weight, after[name])] == []
    manifest = load_manifest(find_checkpoint(str(run)))
    assert not manifest.weights_only
    assert [(record["iteration"], record["weights_only"]) for record in manifest.started_from] == [(0, True)]


def test_imported_weights_are_no_optimizer_state_to_return_to(data: TinyData, tmp_path: Path) -> None:
    from tests.support.injected_errors import inject

    (run,) = imported(tmp_path, "Llama", "run")
    overrides = [*STEPS, *QUIET, "train.on_nonfinite=roll_back", f"data.train_blend=[[1.0,{data.shard('reverse_train')}]]"]
    ranks = start_ranks(run / "model.yaml", run, *overrides, hook=partial(inject, "nan:2"))
    assert ranks.wait() == [1]
    assert "there is no checkpoint of this run to return to, only the imported weights" in ranks.output()


LAYOUTS: dict[str, tuple[list[str], int]] = {
    "TP2": ([f"{TP}=2"], 2),
    "TP4": ([f"{TP}=4"], 4),
    "TP2 PP2": ([f"{TP}=2", f"{PP}=2"], 4),
    "PP2 of 2 chunks": ([f"{PP}=2", "parallel.virtual_pipeline_model_parallel_size=2"], 2),
    "PP4": ([f"{PP}=4"], 4),
    "DP4": ([], 4),
}
Visit = tuple[str, str, list[str], int]
"""Run to load, run to save to, layout, port."""


def save_again(visits: list[Visit]) -> None:
    """Load each run in a layout, as one rank, and save its weights in that layout's shards."""
    import os

    from megatron_ledom.checkpoint.store import load_weights, sharded_weights
    from megatron_ledom.checkpoint.writing import CheckpointWriter
    from megatron_ledom.config.load import load_config
    from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata
    from megatron_ledom.model.layer_specs import LayerChoice
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.platform.launch import read_launch

    for source, target, overrides, port in visits:
        os.environ["MASTER_PORT"] = str(port)
        checkpoint = find_checkpoint(source)
        manifest = load_manifest(checkpoint)
        few = ["train.train_iters=1", "train.global_batch_size=4", "checkpoint.async_save=false"]
        config = load_config(f"{source}/model.yaml", [*few, *overrides])
        launch = read_launch()
        groups = start_distributed(prepare_platform(1, launch), config.parallel, launch)
        metadata = checkpoint_metadata(groups)
        ids = manifest.provenance.vocab_size
        chunks = build_model_chunks(config, ids, groups, LayerChoice("torch", "test"))
        load_weights(checkpoint, chunks, metadata)
        writer = CheckpointWriter(f"{target}/checkpoints", config.checkpoint, metadata["dp_cp_group"])
        writer.save(manifest, sharded_weights(chunks, metadata), {})
        writer.finish()
        stop_distributed()


def draw_models(folder: Path, count: int, seed: int) -> list[tuple[Path, Path, str]]:
    """Return (stock folder, run, layout) of random shapes, with the layouts in turn; every layout can split every shape."""
    rng = random.Random(seed)
    drawn = []
    for index in range(count):
        heads, groups = rng.choice([(4, 4), (4, 2), (4, 1), (8, 8), (8, 4), (8, 2), (8, 1), (12, 4), (16, 1)])
        name = rng.choice(["Llama", "Mistral", "Qwen2", "Qwen3"])
        changed: dict[str, Any] = {"sliding_window": None} if name == "Mistral" else {}
        config = stock_config(
            name,
            num_hidden_layers=4,
            hidden_size=48,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=rng.choice([4, 6, 8]),
            tie_word_embeddings=rng.random() < 0.5,
            vocab_size=rng.choice([1001, 1024, 1100]),
            **changed,
        )
        dtype = rng.choice([torch.float32, torch.bfloat16])
        source = stock_folder(folder / f"stock{index}", config, seed=index, dtype=dtype)
        import_hf(str(source), str(folder / f"run{index}"), direction=Direction.REVERSE, verify=None)
        drawn.append((source, folder / f"run{index}", list(LAYOUTS)[index % len(LAYOUTS)]))
    return drawn


def check_through_layouts(data: TinyData, folder: Path, count: int) -> None:
    """Check HF -> mcore -> checkpoint of a layout -> HF -> mcore: the same bits after every conversion."""
    drawn = draw_models(folder, count, seed=count)
    for num_ranks in (2, 4):
        chosen = [(source, run, layout) for source, run, layout in drawn if LAYOUTS[layout][1] == num_ranks]
        ports = free_ports(len(chosen))
        visits: list[Visit] = [
            (str(run), f"{run}_spread", LAYOUTS[layout][0], port) for (_, run, layout), port in zip(chosen, ports, strict=True)
        ]
        ranks = start_ranks(data.config, folder / f"log{num_ranks}", num_ranks=num_ranks, instead=partial(save_again, visits))
        assert ranks.wait(600) == [0] * num_ranks, ranks.output()
    for source, run, layout in drawn:
        spread = Path(f"{run}_spread")
        check_same_runs(spread, run)
        (run / "tokenizer").rename(spread / "tokenizer")
        export_hf(str(spread), f"{run}_out", verify=None)
        check_same_folders(Path(f"{run}_out"), source)
        import_hf(f"{run}_out", f"{run}_again", verify=None)
        check_same_runs(Path(f"{run}_again"), spread)
        assert len(list(Path(find_checkpoint(str(spread))).glob("*.distcp"))) == LAYOUTS[layout][1]


def test_weights_stay_bit_equal_through_layouts(data: TinyData, tmp_path: Path) -> None:
    check_through_layouts(data, tmp_path, 6)


@pytest.mark.slow
def test_weights_of_many_shapes_stay_bit_equal_through_layouts(data: TinyData, tmp_path: Path) -> None:
    check_through_layouts(data, tmp_path, 48)
