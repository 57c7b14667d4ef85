"""Count the bytes that autograd keeps for the real model of one rank.

`python -m tests.support.counted_memory FILE < CASES` reads and prints JSON. The rank is built alone, with fake process groups, so
one process can count any rank of any layout.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.model import builder
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel import groups
from megatron_ledom.parallel.groups import seed_iteration
from megatron_ledom.platform.device import prepare_platform

START = dist.init_process_group


@dataclass
class Counter:
    """The storages that autograd keeps, except weights; each counts once."""

    excluded: set[int]
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that autograd saves. It stays alive here, so that no other tensor reuses its address."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.excluded and address not in self.kept and tensor.numel():
            self.kept[address] = tensor
        return tensor

    @property
    def total(self) -> int:
        """Number of bytes kept."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def count_case(config_file: str, rank: int, world_size: int, overrides: list[str]) -> dict[str, Any]:
    """Return bytes of a rank: `kept` for one micro-batch by each model chunk; `weights`; `gradients`."""
    config = load_config(config_file, overrides)
    platform = prepare_platform(1)
    START("fake", store=FakeStore(), rank=rank, world_size=world_size)
    found = groups.start_distributed(platform, config.parallel)
    seed_iteration(config.train.seed, 1, found)
    assert config.model.vocab_size is not None
    chunks = builder.build_model_chunks(config, config.model.vocab_size, found, choose_layers(config))
    wrapped = builder.wrap_for_training(config, chunks)
    weights = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    totals = [count_chunk(config, found, index, wrapped, weights) for index in range(len(chunks))]
    buffers = [buffer for model in wrapped for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    state = {
        "weights": sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
    }
    groups.stop_distributed()
    return {"kept": totals, **state}


def count_chunk(config: RunConfig, found: Any, index: int, wrapped: list[Any], weights: set[int]) -> int:
    """Return the bytes kept after one forward pass of a chunk, with its received and sent tensors."""
    parallel, model = config.parallel, config.model
    batch, length = config.train.micro_batch_size, config.data.seq_length // parallel.context_parallel_size
    tokens, positions = torch.zeros(batch, length, dtype=torch.long), torch.arange(length).expand(batch, length).contiguous()
    counter = Counter(weights)
    if not found.has_first_stage(index):
        rows = length // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
        received = torch.zeros(rows, batch, model.hidden_size, dtype=PARAMS_DTYPES[model.params_dtype], requires_grad=True)
        module = wrapped[index].module
        (module.module if model.params_dtype == "bf16" else module).set_input_tensor(received)
        counter.keep(received)
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda tensor: tensor):
        result = wrapped[index](tokens, positions, None, labels=tokens)
    if not found.has_last_stage(index):
        counter.keep(result)
    return counter.total


def main() -> None:
    """Print one line of JSON for each case of the standard input."""
    groups.dist.init_process_group = lambda *args, **kwargs: None  # START already did this
    builder.initialize_weights = lambda *args: None
    for case in json.load(sys.stdin):
        print("counted", json.dumps(count_case(sys.argv[1], case["rank"], case["world_size"], case["overrides"])), flush=True)


if __name__ == "__main__":
    main()
