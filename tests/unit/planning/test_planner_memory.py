"""Planned memory: equal to the published tables to the last digit, and to the bytes that the real layers keep."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ledom.config.load import load_config
from megatron_ledom.planning.memory import (
    GIB,
    activation_bytes,
    chunk_bytes,
    counting_for,
    layer_tensors,
    logits_bytes,
    stage_parameters,
    state_bytes,
)
from megatron_ledom.planning.shapes import Layout, architecture_of, layout_of
from megatron_ledom.planning.validation.accuracy import planned_peak
from megatron_ledom.planning.validation.published import UncertainPoint, published
from tests.support.paths import ROOT

TABLE = {  # GiB of parameters and optimizer; of activations without recompute; with sequence parallelism and selective recompute
    "22B": (45.56, 59.25, 9.56),
    "175B": (45.56, 66.84, 12.35),
    "530B": (31.64, 114.02, 23.08),
    "1T": (32.96, 131.25, 26.56),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_memory_to_the_last_digit(name: str) -> None:
    state, everything, selective = TABLE[name]
    model, shape, _ = published().table_3[name]
    matrices = (
        12 * model.num_layers * model.hidden_size**2 // (shape["tensor"] * shape.get("pipeline", 1))
    )  # as the paper counts
    layout = Layout(**shape)
    assert round(sum(state_bytes(model, layout, matrices)) / GIB, 2) == state
    assert round(activation_bytes(model, layout, 0, "published")[0] / GIB, 2) == everything
    saving = Layout(**shape, sequence_parallel=True, recompute="selective")
    assert round(activation_bytes(model, saving, 0, "published")[0] / GIB, 2) == selective


def test_a_layer_by_the_published_formulas() -> None:
    """The formulas of arXiv 2205.05198, table 2, per s b h of one layer, at t = 8."""
    model, shape, _ = published().table_3["175B"]
    shape = {**shape, "pipeline": 1, "chunks": 1}
    unit = shape["seq_length"] * shape["micro_batch_size"] * model.hidden_size
    scores = 5 * model.num_attention_heads * shape["seq_length"] / model.hidden_size

    def layer(**changed: Any) -> float:
        layout = Layout(**{**shape, **changed})
        return chunk_bytes(model, layout, "published", True, True) / model.num_layers / unit

    assert layer(tensor=1) == pytest.approx(34 + scores)
    assert layer() == pytest.approx(10 + 24 / 8 + scores / 8)
    assert layer(sequence_parallel=True) == pytest.approx((34 + scores) / 8)
    assert layer(recompute="selective") == pytest.approx(10 + 24 / 8)
    assert layer(recompute="full") == pytest.approx(2)
    assert layer(recompute="full", sequence_parallel=True) == pytest.approx(2 / 8)


def test_llama_layer_on_a_gpu_by_hand() -> None:
    """SwiGLU, grouped queries, flash attention, no dropout; docs/planner.md derives the numbers."""
    config = load_config(str(ROOT / "examples/configs/ledom_7b.yaml"))
    model, layout = architecture_of(config.model), layout_of(config, 64)
    s, h, f, t, heads, width = 8192, 3072, 24576, 2, 16, 192
    spread = s // t * (4 * 2 * h + 2 * 4)  # inputs of two norms and of the next products; statistics
    attention = s * (2 + 2 + 6 + 2) * heads * width // t + 4 * s * heads // t + 4 * 2 * s * width
    assert sum(tensor.num_bytes for tensor in layer_tensors(model, layout, "cuda")) == spread + attention + 3 * 2 * s * f // t
    unfused = replace(model, layers="unfused")  # model.transformer_impl=torch
    assert sum(tensor.num_bytes for tensor in layer_tensors(unfused, layout, "cuda")) == spread + attention + 5 * 2 * s * f // t


TINY = {
    "run_dir": "x",
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "vocab_size": 500,
        "transformer_impl": "torch",
    },
    "data": {"seq_length": 128},
    "optimizer": {"lr_warmup_iters": 2},
    "train": {"train_iters": 20, "global_batch_size": 16, "micro_batch_size": 2, "num_threads": 1},
}
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=2"]
FUSED = "model.transformer_impl=fused"
SELECTIVE = "parallel.recompute_granularity=selective"


def parallel(**sizes: object) -> list[str]:
    """Return overrides: `tensor=2` gives parallel.tensor_model_parallel_size=2."""
    names = {"sp": "sequence_parallel", "virtual": "virtual_pipeline_model_parallel_size", "context": "context_parallel_size"}
    return [f"parallel.{names.get(key, f'{key}_model_parallel_size')}={str(size).lower()}" for key, size in sizes.items()]


CASES: dict[str, tuple[int, int, list[str]]] = {  # rank, ranks, overrides
    "one process": (0, 1, []),
    "fp32": (0, 1, ["model.params_dtype=fp32"]),
    "dropout": (0, 1, ["model.hidden_dropout=0.1"]),
    "multi-query": (0, 1, ["model.num_query_groups=1"]),
    "multi-head, wide heads": (0, 1, ["model.num_query_groups=8", "model.kv_channels=24"]),
    "tied": (0, 1, ["model.share_embeddings_and_output_weights=true"]),
    "TP2": (0, 2, parallel(tensor=2)),
    "TP2 SP": (1, 2, parallel(tensor=2, sp=True)),
    "TP4 SP, fewer key-value heads": (0, 4, parallel(tensor=4, sp=True)),
    "CP2": (1, 2, parallel(context=2)),
    "CP4 TP2 SP": (3, 8, parallel(context=4, tensor=2, sp=True)),
    "PP2 first": (0, 2, parallel(pipeline=2)),
    "PP2 last": (1, 2, parallel(pipeline=2)),
    "PP4 middle, fp32": (1, 4, [*parallel(pipeline=4), "model.params_dtype=fp32"]),
    "PP2 two chunks, TP2 SP": (3, 4, parallel(pipeline=2, virtual=2, tensor=2, sp=True)),
    "selective core": (0, 1, [SELECTIVE]),
    "selective core and mlp": (0, 2, [*parallel(tensor=2, sp=True), SELECTIVE, "parallel.recompute_modules=[core_attn,mlp]"]),
    "fused": (0, 1, [FUSED]),
    "fused, fp32": (0, 1, [FUSED, "model.params_dtype=fp32"]),
    "fused, TP2 SP": (1, 2, [FUSED, *parallel(tensor=2, sp=True)]),
    "fused, mlp again": (0, 1, [FUSED, SELECTIVE, "parallel.recompute_modules=[core_attn,mlp]"]),
    "full uniform": (0, 1, [*FULL, "parallel.recompute_method=uniform"]),
    "full block": (0, 2, [*parallel(tensor=2, sp=True), *FULL, "parallel.recompute_method=block"]),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, python: Path) -> dict[str, dict[str, Any]]:
    """Return the bytes on the rank of each case, all counted in one process."""
    file = tmp_path_factory.mktemp("counted") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    cases = [{"rank": rank, "world_size": ranks, "overrides": overrides} for rank, ranks, overrides in CASES.values()]
    command = [python, "-m", "tests.support.counted_memory", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("counted ") for line in done.stdout.splitlines() if line.startswith("counted ")]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kept_bytes_are_those_counted_on_the_real_layers(name: str, counted: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    rank, ranks, overrides = CASES[name]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    config = load_config(str(tmp_path / "tiny.yaml"), overrides)
    model, layout = architecture_of(config.model), layout_of(config, ranks)
    stage = rank // (ranks // layout.pipeline)
    for chunk, found in enumerate(counted[name]["kept"]):
        is_first, is_last = stage == chunk == 0, stage == layout.pipeline - 1 and chunk == layout.chunks - 1
        expected = chunk_bytes(model, layout, counting_for(model, layout, is_cpu=True), is_first, is_last) + (
            logits_bytes(model, layout) if is_last else 0
        )
        assert expected == pytest.approx(found, rel=0.01), f"{expected / found - 1:+.3%}"
    weights, gradients, _ = state_bytes(model, layout, sum(stage_parameters(model, layout, stage).values()))
    assert (weights, gradients) == pytest.approx((counted[name]["weights"], counted[name]["gradients"]), rel=0.01)


@pytest.mark.parametrize("peak", published().peaks, ids=lambda peak: f"{peak.name}, {peak.gpu}")
def test_planned_peaks_are_within_five_per_cent_of_those_measured_on_gpus(peak: UncertainPoint) -> None:
    assert planned_peak(peak) == pytest.approx(peak.num_bytes, rel=0.05)


def test_every_tensor_parallel_rank_of_the_first_stage_has_all_learned_positions() -> None:
    peak = published().peaks[0]
    without = replace(peak.model, learned_positions=0)
    known = peak.variants[0][0]
    for layout, stage, expected in ((known, 0, 8192 * 4096), (replace(known, pipeline=2), 1, 0)):
        found = [sum(stage_parameters(model, layout, stage).values()) for model in (peak.model, without)]
        assert found[0] - found[1] == expected
