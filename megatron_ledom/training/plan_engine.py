"""Rows of the dry run about what the layers are made of and how ranks talk."""

from collections.abc import Iterator

from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.training.plan_run import Row


def engine_rows(config: RunConfig) -> Iterator[Row]:
    """What the layers are made of and how ranks talk; what only the machine knows is said as a condition."""
    model, parallel = config.model, config.parallel
    yield "implementation", _layers_in_words(config)
    if model.fp8 is not None:
        needs = FP8_NEEDS[model.fp8_recipe]
        capability, te_version = (".".join(map(str, pair)) for pair in (needs.capability, needs.te_version))
        history = f", largest of {model.fp8_amax_history_len:,} steps" if model.fp8_recipe == "delayed" else ""
        yield "fp8", f"{model.fp8}, {model.fp8_recipe}{history}; not yet run on hardware"
        yield "fp8 needs", f"compute capability {capability} ({needs.gpu}), Transformer Engine {te_version}"
    yield "recompute", _recompute_in_words(config)
    overlaps = ("overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap")
    yield "overlapped", ", ".join(name for name in overlaps if getattr(parallel, name)) or "nothing"
    nccl = [f"settings of {parallel.nccl_communicator_config_path}"] if parallel.nccl_communicator_config_path else []
    nccl += (
        [f"high priority for {', '.join(parallel.high_priority_stream_groups)}"] if parallel.high_priority_stream_groups else []
    )
    nccl += ["SHARP for the data-parallel group"] if parallel.use_sharp else []
    yield "NCCL", f"{'; '.join(nccl)} (nothing of it on a CPU)" if nccl else "as it comes"


def _layers_in_words(config: RunConfig) -> str:
    model = config.model
    if model.fp8 is not None or config.parallel.tp_comm_overlap or model.transformer_impl == "transformer_engine":
        return "Transformer Engine; refused where it or CUDA is missing"
    attention = "unfused attention" if model.attention_backend == "unfused" else "SDPA"
    attention += " and a mask of documents" if config.data.reset_attention_mask else ""
    if model.transformer_impl == "torch":
        return f"torch, with {attention}"
    if model.transformer_impl == "fused":
        return f"our fused operators, with {attention}; refused where they cannot run"
    ours = f"our fused operators where they can run, else torch; with {attention}"
    own = config.data.reset_attention_mask or model.attention_backend == "unfused"
    return ours if own else f"Transformer Engine where it is installed and CUDA is there, else {ours}"


def _recompute_in_words(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        return f"selective: {', '.join(parallel.recompute_modules)} of every layer"
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        how = "in groups of {} layers" if parallel.recompute_method == "uniform" else "the first {} layers of a model chunk"
        return f"full, {parallel.recompute_method}: {how.format(count)}"
    return "none"
