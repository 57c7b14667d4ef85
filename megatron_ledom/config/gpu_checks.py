"""Check the keys of GPU runs (fp8, overlapped tensor parallelism, NCCL) and of recompute.

The rules are as in `checks.py`, which runs them: one sentence per problem. Requirements on the machine itself are checked when
the layers are chosen (`model/layer_specs.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ledom.config.derived import head_dim, next_multiple, query_groups
from megatron_ledom.config.schema import RunConfig

Problems = Iterator[str]
OWN_LAYERS = ("torch", "fused")
"""Values of model.transformer_impl that never use Transformer Engine."""
NCCL_GROUPS = ("tp", "cp", "dp", "dp_cp", "pp", "mp", "embd", "tp_dp", "tp_cp", "tp_dp_cp")
"""Process groups of this package's layouts, by their names in megatron-core."""
NCCL_SETTINGS = ("cga_cluster_size", "min_ctas", "max_ctas", "net_name", "is_high_priority_stream")


@dataclass(frozen=True, slots=True)
class Fp8Needs:
    """Requirements of an fp8 recipe on shapes, GPU and Transformer Engine."""

    multiple: int
    """Both sides of every matrix must be multiples of this."""
    capability: tuple[int, int]
    """Lowest CUDA compute capability."""
    gpu: str
    te_version: tuple[int, int]


FP8_NEEDS = {
    "delayed": Fp8Needs(16, (8, 9), "Ada, Hopper or newer", (1, 13)),
    "tensorwise": Fp8Needs(16, (8, 9), "Ada, Hopper or newer", (2, 2)),
    "blockwise": Fp8Needs(128, (9, 0), "Hopper or newer", (2, 3)),
    "mxfp8": Fp8Needs(32, (10, 0), "Blackwell or newer", (2, 1)),
}


def recompute(config: RunConfig) -> Problems:
    """Check that only full recompute has a method and a number of layers, and that selective recompute has its parts."""
    parallel, model = config.parallel, config.model
    granularity, modules = parallel.recompute_granularity, parallel.recompute_modules
    method, count = parallel.recompute_method, parallel.recompute_num_layers
    if granularity == "full":
        if method is None:
            yield "parallel.recompute_granularity=full needs parallel.recompute_method, found null; set uniform or block"
        here = model.num_layers // parallel.pipeline_model_parallel_size
        here //= parallel.virtual_pipeline_model_parallel_size or 1
        if count is None or count > here > 0:
            yield (
                f"parallel.recompute_num_layers={'null' if count is None else count}, expected 1 to {here}, the layers of a"
                " model chunk, with parallel.recompute_granularity=full"
            )
    else:
        for key, value in (("recompute_method", method), ("recompute_num_layers", count)):
            if value is not None:
                yield (
                    f"parallel.{key}={value} needs parallel.recompute_granularity=full, found"
                    f" {granularity or 'null'}; set that, or remove parallel.{key}"
                )
    if granularity == "selective" and (not modules or len(set(modules)) < len(modules)):
        yield f"parallel.recompute_modules={modules} with selective recompute; expected one part or more, each once"


def fp8(config: RunConfig) -> Problems:
    """Check that fp8 has Transformer Engine and bf16 weights, and that every matrix can be cut into the recipe's blocks."""
    model, parallel = config.model, config.parallel
    if model.fp8 is None:
        return
    if model.transformer_impl in OWN_LAYERS:
        found = f"model.transformer_impl={model.transformer_impl}"
        yield f"model.fp8={model.fp8} needs Transformer Engine, found {found}; set transformer_engine"
    if config.data.reset_attention_mask:
        yield (
            f"model.fp8={model.fp8} needs Transformer Engine, whose attention ignores the document mask, found"
            " data.reset_attention_mask=true; remove one of them"
        )
    if model.params_dtype != "bf16":
        yield f"model.fp8={model.fp8} needs model.params_dtype=bf16, found {model.params_dtype}; set bf16, or remove model.fp8"
    tensor, multiple = parallel.tensor_model_parallel_size, FP8_NEEDS[model.fp8_recipe].multiple
    rows = config.train.micro_batch_size * config.data.seq_length // parallel.context_parallel_size
    width = head_dim(model) * (model.num_attention_heads + 2 * query_groups(model))
    sides = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size over the tensor-parallel ranks": model.ffn_hidden_size // tensor,
        "the width of the queries over the tensor-parallel ranks": head_dim(model) * model.num_attention_heads // tensor,
        "the width of queries, keys and values over the tensor-parallel ranks": width // tensor,
        "the tokens of a micro-batch on a rank": rows // (tensor if parallel.sequence_parallel else 1),
    }
    for name, side in sides.items():
        if side % multiple:
            yield (
                f"{name}: {side} is not a multiple of {multiple}, which model.fp8_recipe={model.fp8_recipe} needs; the next"
                f" one is {next_multiple(side, multiple)}"
            )


def unfused_attention(config: RunConfig) -> Problems:
    """Check that unfused attention is used only with this package's own layers."""
    model = config.model
    wanted = {
        "model.transformer_impl=transformer_engine": model.transformer_impl == "transformer_engine",
        f"model.fp8={model.fp8}": model.fp8 is not None,
        "parallel.tp_comm_overlap=true": config.parallel.tp_comm_overlap,
    }
    if model.attention_backend == "unfused":
        for name in (name for name, is_set in wanted.items() if is_set):
            yield (
                f"model.attention_backend=unfused needs layers without Transformer Engine, found {name}; set"
                " model.attention_backend=auto, or remove the other key"
            )


def overlapped_tensor_parallel(config: RunConfig) -> Problems:
    """Check that overlapped tensor parallelism has Transformer Engine and sequence parallelism."""
    parallel = config.parallel
    if not parallel.tp_comm_overlap:
        return
    if not parallel.sequence_parallel:
        yield (
            "parallel.tp_comm_overlap=true needs parallel.sequence_parallel=true (and a tensor-parallel size above 1), found"
            " false; set that to true, or parallel.tp_comm_overlap=false"
        )
    if config.model.transformer_impl in OWN_LAYERS:
        found = f"model.transformer_impl={config.model.transformer_impl}"
        yield f"parallel.tp_comm_overlap=true needs Transformer Engine, found {found}; set transformer_engine"
    if config.data.reset_attention_mask:
        yield (
            "parallel.tp_comm_overlap=true needs Transformer Engine, whose attention ignores the document mask, found"
            " data.reset_attention_mask=true; remove one of them"
        )


def nccl(config: RunConfig) -> Problems:
    """Check that the file of NCCL settings exists and names known groups and settings."""
    groups = config.parallel.high_priority_stream_groups
    if len(set(groups)) < len(groups):
        yield f"parallel.high_priority_stream_groups={groups} names a group twice; name each once"
    path = config.parallel.nccl_communicator_config_path
    if path is None:
        return
    key = f"parallel.nccl_communicator_config_path={path}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        yield f"{key} cannot be read ({' '.join(str(error).split())}); expected YAML such as `dp_cp: {{max_ctas: 16}}`"
        return
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        yield f"{key} has no settings by process group; expected YAML such as `dp_cp: {{max_ctas: 16}}`"
        return
    for group, settings in content.items():
        if group not in NCCL_GROUPS:
            yield f"{key} names the process group {group}; expected one of {', '.join(NCCL_GROUPS)}"
        for name in settings:
            if name not in NCCL_SETTINGS:
                yield f"{key} sets {group}.{name}; expected one of {', '.join(NCCL_SETTINGS)}"


GPU_RULES = (recompute, fp8, unfused_attention, overlapped_tensor_parallel, nccl)
