"""The dry run's table of ranks and its parameters by rank, compared with megatron-core."""

import subprocess
from pathlib import Path

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import ParallelConfig, RunConfig
from megatron_ledom.model.arithmetic import count_parameters
from megatron_ledom.planning.dry_run_rows import parameters_of_rank, rank_lines, rank_position, stage_layers
from tests.support.paths import ROOT

QUICKSTART = str(ROOT / "examples/configs/quickstart_reverse.yaml")


def load(*overrides: str) -> RunConfig:
    return load_config(QUICKSTART, ["model.vocab_size=500", *overrides])


@pytest.mark.parametrize(("tensor", "context", "pipeline", "data"), [(2, 1, 2, 4), (2, 2, 3, 2), (1, 2, 1, 4), (4, 1, 2, 1)])
def test_rank_positions_are_those_of_megatron_core(tensor: int, context: int, pipeline: int, data: int) -> None:
    sizes = {"tensor_model_parallel_size": tensor, "context_parallel_size": context, "pipeline_model_parallel_size": pipeline}
    parallel, world_size = ParallelConfig(**sizes), tensor * context * pipeline * data
    positions = [rank_position(rank, parallel, world_size) for rank in range(world_size)]
    groups = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for name, field in (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "pipeline")):
        for ranks in groups.get_ranks(name):
            assert [getattr(positions[rank], field) for rank in ranks] == list(range(len(ranks)))


def test_the_table_of_ranks_is_short() -> None:
    lines = rank_lines(load("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"), 8)
    assert [" ".join(line.split()) for line in lines] == [
        "0-1 TP 0-1 CP 0 DP 0 PP 0",
        "2-3 TP 0-1 CP 0 DP 1 PP 0",
        "4-5 TP 0-1 CP 0 DP 0 PP 1",
        "6-7 TP 0-1 CP 0 DP 1 PP 1",
    ]
    assert len(rank_lines(load(), 4096)) < 20


def test_layers_of_interleaved_stages() -> None:
    config = load("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    assert [list(map(list, stage_layers(config, stage))) for stage in (0, 1)] == [[[0], [2]], [[1], [3]]]


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_stages_contain_the_whole_model(tied: str) -> None:
    config = load("parallel.pipeline_model_parallel_size=4", f"model.share_embeddings_and_output_weights={tied}")
    total = sum(sum(parameters_of_rank(config, config.model, stage).values()) for stage in range(4))
    copy = 512 * config.model.hidden_size if tied == "true" else 0  # the last stage has a copy of the embedding
    assert total == count_parameters(config.model, 512) + copy


BUILD = """
import sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_ledom.config.load import load_config
from megatron_ledom.model import builder
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel import groups
from megatron_ledom.platform.device import prepare_platform
rank, world_size, *overrides = sys.argv[2:]
config = load_config(sys.argv[1], overrides)
platform = prepare_platform(1)
dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(world_size))
groups.dist.init_process_group = lambda *args, **kwargs: None
builder.initialize_weights = lambda *args: None  # needs the other ranks
chunks = builder.build_model_chunks(config, 512, groups.start_distributed(platform, config.parallel), choose_layers(config))
parts = {"embedding": "word_embeddings", "attention": "linear_proj linear_qkv", "mlp": "linear_fc", "norms": "norm",
         "output": "output_layer"}
named = [pair for chunk in chunks for pair in chunk.named_parameters()]
print({part: sum(p.numel() for name, p in named if any(word in name.split('.', 1)[1] or word in name for word in words.split()))
       for part, words in parts.items()}, sum(p.numel() for _, p in named))
"""


@pytest.mark.parametrize(
    ("rank", "world_size", "layout"),
    [(0, 4, {"tensor": 2, "pipeline": 2}), (3, 4, {"tensor": 2, "pipeline": 2}), (0, 4, {"tensor": 4, "pipeline": 1})],
    ids=["first stage", "last stage", "more ranks than key-value heads"],
)
def test_parameters_are_those_of_the_built_model(rank: int, world_size: int, layout: dict[str, int], python: Path) -> None:
    """Builds the model of one rank alone, with a fake process group."""
    overrides = [f"parallel.{name}_model_parallel_size={size}" for name, size in layout.items()]
    overrides += ["model.vocab_size=500", "model.params_dtype=fp32", "model.num_attention_heads=4", "model.ffn_hidden_size=768"]
    command = [str(python), "-c", BUILD, QUICKSTART, str(rank), str(world_size), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    config = load(*overrides)
    expected = parameters_of_rank(config, config.model, layout["pipeline"] - 1 if rank else 0)
    assert done.stdout.strip().splitlines()[-1] == f"{expected} {sum(expected.values())}"
