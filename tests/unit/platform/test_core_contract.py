"""The parts of megatron-core that this package uses: an upgrade that removes one fails here with its name."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import Fp8Recipe
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel import schedules as core_schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.gpu_checks import FP8_NEEDS, NCCL_GROUPS, NCCL_SETTINGS
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import ModelConfig, ParallelConfig
from megatron_ledom.model import builder
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.ops.swiglu import swiglu_reference
from megatron_ledom.platform.core_versions import ANNOUNCED, core_version, mlp_submodules, save_options

SMALL = {
    "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4},
    "train": {"train_iters": 3000, "global_batch_size": 2},
}
DATACLASS_FIELDS = {
    TransformerConfig: """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        add_qkv_bias qk_layernorm softmax_scale
        layernorm_epsilon gated_linear_unit activation_func add_bias_linear attention_dropout hidden_dropout init_method_std
        params_dtype pipeline_dtype bf16 tensor_model_parallel_size pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size context_parallel_size sequence_parallel microbatch_group_size_per_vp_stage
        overlap_p2p_comm batch_p2p_comm deallocate_pipeline_outputs calculate_per_token_loss init_method
        output_layer_init_method embedding_init_method use_cpu_initialization gradient_accumulation_fusion
        masked_softmax_fusion bias_activation_fusion bias_dropout_fusion apply_rope_fusion grad_scale_func
        finalize_model_grads_func no_sync_func grad_sync_func param_sync_func recompute_granularity recompute_method
        recompute_num_layers recompute_modules fp8 fp8_recipe fp8_amax_history_len fp8_amax_compute_algo tp_comm_overlap
        tp_comm_bootstrap_backend""",
    DistributedDataParallelConfig: """use_distributed_optimizer overlap_grad_reduce overlap_param_gather grad_reduce_in_fp32
        check_for_nan_in_grad bucket_size""",
    OptimizerConfig: """optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad bf16 params_dtype
        use_distributed_optimizer""",
    GPTDatasetConfig: """random_seed sequence_length blend_per_split path_to_cache tokenizer reset_position_ids
        reset_attention_mask eod_mask_loss create_attention_mask""",
    ProcessGroupCollection: "tp pp cp",
    TransformerBlockSubmodules: "layer_specs layer_norm",
}

STRATEGY = "".join(f" {name}" for name in save_options())
SCHEDULE = "forward_step_func data_iterator model num_microbatches seq_length micro_batch_size forward_only"

PARAMETERS: dict[Callable[..., Any], str] = {
    builder.GPTModel.__init__: """config transformer_layer_spec vocab_size max_sequence_length pre_process post_process
        position_embedding_type rotary_base share_embeddings_and_output_weights pg_collection vp_stage""",
    builder.GPTModel.forward: "input_ids position_ids attention_mask labels",
    builder.GPTModel.sharded_state_dict: "metadata",
    DistributedDataParallel.__init__: "config ddp_config module disable_bucketing",
    DistributedDataParallel.disable_forward_pre_hook: "param_sync",
    get_megatron_optimizer: "config model_chunks use_gloo_process_groups pg_collection",
    OptimizerParamScheduler.__init__: """optimizer init_lr max_lr min_lr lr_warmup_steps lr_decay_steps lr_decay_style start_wd
        end_wd wd_incr_steps wd_incr_style use_checkpoint_opt_param_scheduler override_opt_param_scheduler""",
    OptimizerParamScheduler.step: "increment",
    core_schedules.forward_backward_no_pipelining: SCHEDULE,
    core_schedules.forward_backward_pipelining_with_interleaving: SCHEDULE,
    core_schedules.forward_backward_pipelining_without_interleaving: SCHEDULE,
    get_forward_backward_func: "pp_size vp_size",
    parallel_state.initialize_model_parallel: """tensor_model_parallel_size pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size context_parallel_size distributed_timeout_minutes create_gloo_process_groups
        nccl_communicator_config_path high_priority_stream_groups use_sharp""",
    parallel_state.get_data_parallel_group: "with_context_parallel",
    GPTDataset.__init__: "indexed_dataset dataset_path indexed_indices num_samples index_split config",
    IndexedDataset.__init__: "path_prefix",
    helpers.build_sample_idx: """sizes document_indices sequence_length num_epochs tokens_per_epoch drop_last_partial_sequence
        add_extra_token_to_sequence""",
    get_gpt_layer_local_spec: "normalization qk_layernorm",
    get_gpt_layer_with_transformer_engine_spec: "qk_layernorm",
    get_num_layers_to_build: "config vp_stage",
    dist_checkpointing.save: "sharded_state_dict checkpoint_dir sharded_strategy async_sharded_save content_metadata"
    + STRATEGY,
    AsyncCallsQueue.__init__: "persistent",
    AsyncCallsQueue.maybe_finalize_async_calls: "blocking",
    FullyParallelSaveStrategyWrapper.__init__: "strategy parallelization_group do_cache_distribution",
    TorchDistSaveShardedStrategy.__init__: "backend version thread_count",
    TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks: "writer save_state_dict_ret" + STRATEGY,
    FullyParallelSaveStrategyWrapper.async_save: "sharded_state_dict checkpoint_dir" + STRATEGY,
    FileSystemWriterAsync.write_preloaded_data: """transform_list local_proc_idx write_bucket results_queue count_queue
        use_fsync""",
    FileSystemWriterAsync.finish: "metadata results",
    dist_checkpointing.load: "sharded_state_dict checkpoint_dir strict",
    DistributedOptimizer.sharded_state_dict: "model_sharded_state_dict is_loading metadata",
    tensor_parallel.model_parallel_cuda_manual_seed: "seed",
    RotaryEmbedding.forward: "self max_seq_len",
    SelfAttention.get_query_key_value_tensors: "hidden_states",
    TransformerLayer.sharded_state_dict: "prefix sharded_offsets metadata",
    create_read_items_for_chunk_list: "fqn checkpoint_md local_chunks",
    narrow_tensor_by_index: "tensor offsets sizes",
    FileSystemReader.set_up_storage_reader: "metadata is_coordinator",
    FileSystemReader.read_data: "plan planner",
    FileSystemWriter.__init__: "path single_file_per_rank sync_files thread_count per_thread_copy_ahead",
    FileSystemWriter.finish: "metadata results",
}


@pytest.mark.parametrize("kind", DATACLASS_FIELDS, ids=lambda kind: kind.__name__)
def test_dataclass_has_the_fields_we_set(kind: Any) -> None:
    present = {field.name for field in dataclasses.fields(kind)}
    assert [name for name in DATACLASS_FIELDS[kind].split() if name not in present] == []


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda function: function.__qualname__)
def test_function_takes_the_arguments_we_pass(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert [name for name in PARAMETERS[function].split() if name not in parameters] == []


def test_function_needs_no_argument_that_we_do_not_pass() -> None:
    for function, names in PARAMETERS.items():
        parameters = inspect.signature(function).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [p.name for p in parameters if p.default is p.empty and p.kind in plain and p.name != "self"]
        assert [name for name in needed if name not in names.split()] == [], function.__qualname__


def test_a_dataset_has_the_parts_of_batches() -> None:
    source = inspect.getsource(GPTDataset.__getitem__)
    assert all(f'"{name}"' in source for name in ("tokens", "labels", "loss_mask", "position_ids"))
    built = inspect.getsource(GPTDataset.__init__)  # data.dataset passes it, so that megatron-core does not build and save it
    assert "self._build_document_sample_shuffle_indices()" in built


def allowed(owner: Any, name: str) -> set[str]:
    """Return the values that a field declared as Literal, or as a list of it, accepts."""
    found: set[str] = set()
    left = [get_type_hints(owner)[name]]
    while left:
        hint = left.pop()
        if get_origin(hint) is Literal:
            found |= set(get_args(hint))
        else:
            left += [part for part in get_args(hint) if not isinstance(part, str)]
    return found


@pytest.mark.parametrize("name", ["fp8", "fp8_recipe", "fp8_amax_compute_algo", "recompute_granularity", "recompute_method"])
def test_values_of_the_config_are_values_of_megatron_core(name: str) -> None:
    ours = next(kind for kind in (ModelConfig, ParallelConfig) if name in {field.name for field in dataclasses.fields(kind)})
    assert allowed(ours, name) <= allowed(TransformerConfig, name)
    assert allowed(ours, name)


def test_every_fp8_recipe_has_its_needs_and_a_name_in_megatron_core() -> None:
    assert set(FP8_NEEDS) == allowed(ModelConfig, "fp8_recipe")
    assert set(FP8_NEEDS) <= {recipe.value for recipe in Fp8Recipe}


@pytest.mark.parametrize("recipe", FP8_NEEDS)
def test_an_fp8_run_makes_a_core_config(recipe: str) -> None:
    """Run megatron-core's checks of its config, as far as they work without Transformer Engine."""
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}
    model = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4}
    run = {"train_iters": 3000, "global_batch_size": 2}
    sections = {"model": {**model, "fp8": "hybrid", "fp8_recipe": recipe}, "parallel": parallel, "train": run}
    config = config_from_dict({"run_dir": "unused", **sections}, "test")
    check_config(config, 2)
    core_config = builder.build_core_config(config)
    assert (core_config.fp8, core_config.fp8_recipe, core_config.tp_comm_overlap) == ("hybrid", recipe, True)


def test_selective_recompute_knows_the_parts_we_name() -> None:
    source = inspect.getsource(TransformerConfig.__post_init__)
    assert all(f'"{part}"' in source for part in allowed(ParallelConfig, "recompute_modules"))


def test_nccl_groups_have_the_names_we_use() -> None:
    source = inspect.getsource(parallel_state)
    assert all(f'get_nccl_options("{group}"' in source for group in NCCL_GROUPS)
    assert allowed(ParallelConfig, "high_priority_stream_groups") <= set(NCCL_GROUPS)
    read = inspect.getsource(parallel_state.get_nccl_options)
    assert all(f'"{setting}"' in read for setting in NCCL_SETTINGS)


def test_the_transformer_engine_spec_has_the_parts_we_rely_on() -> None:
    """Read the source, because it cannot be called without Transformer Engine. Norms, attention and masks are its own."""
    parts = "get_gpt_layer_with_transformer_engine_submodules"  # 0.19 builds them in a function of their own
    source = inspect.getsource(getattr(gpt_layer_specs, parts, get_gpt_layer_with_transformer_engine_spec))
    assert "TESpecProvider()" in source
    submodules = {field.name for field in dataclasses.fields(TransformerLayerSubmodules)}
    assert {"input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp"} <= submodules
    assert "core_attention" in {field.name for field in dataclasses.fields(SelfAttentionSubmodules)}
    assert all(f"{name}=" in source for name in ("self_attention", "mlp", "core_attention"))


def test_names_that_the_platform_replaces_exist() -> None:
    for module, names in {
        "megatron.core.optimizer": "_get_megatron_optimizer_based_on_param_groups Adam USING_PYTORCH_OPTIMIZER",
        "megatron.core.optimizer.optimizer": "clip_grad_by_total_norm_fp32 multi_tensor_scale_impl",
        "megatron.core.optimizer.clip_grads": "clip_grad_by_total_norm_fp32 l2_norm_impl multi_tensor_scale_impl",
        "megatron.core.optimizer.distrib_optimizer": "Adam HAVE_APEX_OR_TE USING_APEX_OPTIMIZER",
        "megatron.core.tensor_parallel.layers": "_grad_accum_fusion_available",
        "megatron.core.tensor_parallel.mappings": "_reduce",
        "megatron.core.tensor_parallel.random": """_get_cuda_rng_state _set_cuda_rng_state CudaRNGStatesTracker
            _MODEL_PARALLEL_RNG_TRACKER_NAME""",
    }.items():
        loaded = importlib.import_module(module)
        assert [name for name in names.split() if not hasattr(loaded, name)] == []
    for method in ("load_parameter_state_from_dp_reshardable", "load_parameter_state_from_fully_reshardable"):
        assert hasattr(DistributedOptimizer, method)
    assert hasattr(DistributedOptimizer, "sharded_param_state_fully_reshardable")


DIFFERENCES = {
    (0, 16): ("no strategy", "_get_write_results_queue", "class", "spec", "lr apart", "freed while sent", "collectives"),
    (0, 17): ("strategy", "get_write_results_queue", "function", "spec", "lr apart", "freed while sent", "collectives"),
    (0, 18): ("strategy", "get_write_results_queue", "function", "partial", "lr apart", "freed when sent", "no collectives"),
    (0, 19): ("strategy", "get_write_results_queue", "among tensors", "partial", "lr", "freed when sent", "no collectives"),
}
"""Version -> the parts that differ and that `core_versions` hides: argument of a save, queue of results, common state, MLP of a
spec, identity of a parameter group, outputs of a pipeline stage, reading."""


def test_each_version_differs_where_core_versions_says() -> None:
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async, torch
    from megatron.core.optimizer import optimizer

    queues = [name for name in ("_get_write_results_queue", "get_write_results_queue") if hasattr(filesystem_async, name)]
    layer, schedules = get_gpt_layer_local_spec(normalization="RMSNorm"), inspect.getsource(core_schedules)
    found = (
        "strategy" if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else "no strategy",
        *queues,
        "class"
        if hasattr(common, "TorchCommonSaveStrategy")
        else "function"
        if hasattr(serialization, "save_common")
        else "among tensors",
        "partial" if isinstance(layer.submodules.mlp, functools.partial) else "spec",
        "lr" if "max_lr" in optimizer.param_group_identifier_keys else "lr apart",
        "freed when sent" if "send_next_wait_handle is not None and config.deallocate" in schedules else "freed while sent",
        "no collectives" if "no_dist=True" in inspect.getsource(torch) else "collectives",
    )
    assert found == DIFFERENCES[core_version()[:2]]
    assert {"linear_fc1", "linear_fc2", "activation_func"} <= set(dir(mlp_submodules(layer)))


@pytest.mark.skipif(core_version() < (0, 19), reason="these messages came with 0.17 to 0.19")
@pytest.mark.parametrize("module", ANNOUNCED)
def test_messages_that_are_suppressed_are_those_of_the_newest_version(module: str) -> None:
    assert ANNOUNCED[module] in inspect.getsource(importlib.import_module(module))


def test_checkpoints_can_be_written_and_checked() -> None:
    assert importlib.util.find_spec("psutil") is not None  # without it megatron-core's writer waits for ever
    assert {"async_fn", "async_fn_args", "finalize_fns", "preload_fn"} <= set(AsyncRequest._fields)
    assert finalize_model_grads.__name__ == "finalize_model_grads"


def test_the_rotary_embedding_uses_the_given_frequencies() -> None:
    """`model.builder` replaces them; the model reads them during the forward pass."""
    for function in (RotaryEmbedding.get_freqs_non_repeated, RotaryEmbedding.get_emb):
        assert "self.inv_freq" in inspect.getsource(function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_activation_is_the_same_function_and_keeps_only_its_input(dtype: torch.dtype) -> None:
    """Run the activation of Transformer Engine's layers without its compilation."""
    kept: list[torch.Tensor] = []
    results = []
    x = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.compiler.set_stance("force_eager"):
        for function in (lambda leaf: bias_swiglu_impl(leaf, None), swiglu_reference):
            leaf = x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
                y = function(leaf)
            if function is not swiglu_reference:
                assert [tensor.numel() for tensor in kept] == [x.numel()]
            y.backward(grad)
            results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


@pytest.mark.parametrize(
    ("implementation", "fusion", "ours"),
    [("transformer_engine", True, False), ("fused", False, True), ("torch", False, False)],
)
def test_the_activation_is_fused_for_the_layers_that_fuse_it(implementation: str, fusion: bool, ours: bool) -> None:
    core_config = builder.build_core_config(config_from_dict({"run_dir": "unused", **SMALL}, "test"))
    builder.fuse_activation(core_config, LayerChoice(implementation, "test"))
    core_config.__post_init__()  # megatron-core's own checks of combinations
    assert (core_config.bias_activation_fusion, core_config.use_te_activation_func) == (fusion, ours)
