"""Whole matrices in the buffers of the layer-wise optimizer. tests/numerics/test_muon.py compares the packing with megatron-core's."""

from dataclasses import replace

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.planning.dry_run_rows import state_gibibytes
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.matrix_shards import matrix_shards, matrix_sizes
from megatron_ledom.planning.memory import GIB, buffer_elements, stage_parameters, stage_state_bytes
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.planning.schedule import PassTimes
from megatron_ledom.planning.shapes import Architecture, Layout, Muon, architecture_of, layout_of
from megatron_ledom.planning.step_time import data_comm_seconds, muon_seconds

MUON = ("optimizer.optimizer=muon", "parallel.use_distributed_optimizer=true")
TP = "parallel.tensor_model_parallel_size"


def tiny(data: int, **changed: object) -> tuple[Architecture, Layout]:
    """Return a layer with matrices of 24,576 (fc1), 12,288 (fc2), 6,144 (qkv) and 4,096 (proj) elements, two of it."""
    model = Architecture(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=1,
        head_dim=16,
        padded_vocab_size=128,
    )
    keys = {"seq_length": 8, "micro_batch_size": 1, "num_microbatches": 1, "muon": Muon(), "distributed_optimizer": True}
    return model, Layout(**{**keys, "data": data, **changed})  # type: ignore[arg-type]


def test_shards_by_hand() -> None:
    """Four ranks: two have fc1; the others fc2 each, then both qkv, then both proj. All shards are as long as fc1."""
    model, layout = tiny(4)
    assert matrix_sizes(model, layout) == {"fc2": 12288, "fc1": 24576, "qkv": 6144, "proj": 4096}
    shards = matrix_shards(model, layout, 0)
    assert [dict(rank) for rank in shards.ranks] == [{"fc1": 1}, {"fc1": 1}, *[{"fc2": 1, "qkv": 1, "proj": 1}] * 2]
    assert shards.padded == 4 * 24576
    assert shards.most({"fc1": 1.0, "fc2": 2.0, "qkv": 3.0, "proj": 4.0}) == 9.0


def test_a_bucket_of_the_overlap_waits_for_its_largest_matrix() -> None:
    """Two ranks, buckets of at least 1,000: a layer's fc2, fc1 and qkv are less than 0.9 of two shards as long as fc1; with proj they end
    the bucket. Without buckets two layers are packed together. Later stages have no buckets.
    """
    buckets = {"overlap_grad_reduce": True, "bucket_size": 1000}
    assert matrix_shards(*tiny(2, **buckets), 0).padded == 2 * 2 * 24576
    assert matrix_shards(*tiny(2), 0).padded == 2 * 2 * 23552
    assert matrix_shards(*tiny(2, pipeline=2, **buckets), 1).padded == 2 * 24576
    assert matrix_shards(*tiny(1, **buckets), 0).padded == 2 * 47104


@pytest.mark.parametrize("data", [1, 3, 8, 64])
def test_each_matrix_has_one_rank_and_one_rank_needs_no_padding(data: int) -> None:
    model, layout = tiny(data)
    shards = matrix_shards(model, layout, 0)
    assert {name: sum(rank[name] for rank in shards.ranks) for name in matrix_sizes(model, layout)} == dict.fromkeys(
        ("qkv", "proj", "fc1", "fc2"), 2
    )
    counts = stage_parameters(model, layout, 0)
    assert (shards.padded == counts["attention"] + counts["mlp"]) == (data == 1)


@pytest.mark.parametrize(
    ("tensor", "padded", "fullest", "gibibytes"),
    [(2, 4_831_838_208, 150_994_944, 29.30), (1, 9_663_676_416, 150_994_944, 57.40)],
)
def test_the_padding_of_ledom_7b_is_planned(tensor: int, padded: int, fullest: int, gibibytes: float) -> None:
    """64 ranks. The elements are those of megatron-core 0.19.2 for these matrices: 1.31 times as many as the model has."""
    config = load_config("ledom_7b", [*MUON, f"{TP}={tensor}", f"parallel.sequence_parallel={tensor > 1}".lower()])
    model, layout = architecture_of(config.model), layout_of(config, 64)
    shards = matrix_shards(model, layout, 0)
    assert (shards.padded, shards.most(matrix_sizes(model, layout))) == (padded, fullest)
    counts = stage_parameters(model, layout, 0)
    assert buffer_elements(model, layout, 0) == padded + counts["embedding"] + counts["norms"] + counts["output"]
    assert stage_state_bytes(model, layout, 0)[:2] == tuple(size * buffer_elements(model, layout, 0) for size in (2, 4))
    assert state_gibibytes(config, config.model, 64) == pytest.approx(gibibytes, abs=0.005)
    assert make_plan(config, 64, load_hardware("h100-sxm")).stages[0].state / GIB == pytest.approx(gibibytes, abs=0.005)


def test_the_seconds_of_a_step_are_those_of_the_fullest_rank_and_of_padded_buffers() -> None:
    """With as many ranks as matrices, one rank has a whole fc1, and more ranks help no further."""
    hardware = load_hardware("h100-sxm")
    alone, eight, sixteen = (muon_seconds(*tiny(data), hardware) for data in (1, 8, 16))
    assert eight == sixteen > alone / 8
    config = load_config("ledom_7b", [*MUON, f"{TP}=1", "parallel.sequence_parallel=false"])
    model, layout = (
        architecture_of(config.model),
        replace(layout_of(config, 64), overlap_grad_reduce=False, overlap_param_gather=False),
    )
    whole, cut = (
        data_comm_seconds(model, one, hardware, PassTimes([], [], 0.0)) for one in (layout, replace(layout, muon=None))
    )
    elements = buffer_elements(model, layout, 0), buffer_elements(model, replace(layout, muon=None), 0)
    assert whole / cut == pytest.approx(elements[0] / elements[1], rel=2e-3)
