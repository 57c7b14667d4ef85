"""Builds megatron-core's GPTModel and its config from a RunConfig; no other module does.

Rotary frequencies (Su et al., arXiv 2104.09864) may be scaled for longer contexts. megatron-core's own options lack settings of
public models (the bounds of llama3, yarn without multi-latent attention), so the model gets the frequencies themselves. The factor
by which yarn multiplies queries and keys becomes part of the softmax scale, because only their product is used.

Initial weights do not depend on the layout: each matrix is drawn whole, from a seed that combines the run's seed, the weight's
global name and its layer, and every rank keeps its own part.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from megatron_ledom.config.derived import bucket_elements, head_dim, padded_vocab_size, query_groups
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.model.auxiliary_head import AuxiliaryHead
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.model.layer_specs import LayerChoice, build_layer_spec, start_user_buffers
from megatron_ledom.model.multi_token import build_mtp_spec
from megatron_ledom.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.parallel.groups import ParallelGroups
from megatron_ledom.platform.core_versions import frees_sent_outputs


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose loss counts only the tokenizer's ids and can return log Z for the z-loss."""

    num_ids: int
    """Number of ids; further rows of the embedding are padding."""
    reports_log_z: bool
    fuses_loss: bool
    """True if the loss may use the kernels of the device."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Map labels [B, S] and logits [S, B, V] to losses in nats [B, S], or losses and log Z [B, S, 2] if `reports_log_z`."""
        losses_SB, log_z_SB = vocab_parallel_cross_entropy(
            logits, labels.t(), self.num_ids, self.pg_collection.tp, fused=self.fuses_loss
        )
        if self.reports_log_z:
            return torch.stack([losses_SB, log_z_SB], -1).transpose(0, 1)
        return losses_SB.t()


class ModelWithHead(LanguageModel):
    """LanguageModel with a head for an auxiliary loss, whose prediction follows the losses of each token while it trains."""

    def add_head(self, shape: Literal["mlp", "linear"], width: int) -> None:
        """Add the head to the chunk with the output layer."""
        self.auxiliary_head = AuxiliaryHead(self.config, shape, width, self.pg_collection)

    def _postprocess(self, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        """Return what GPTModel returns; in training on the last stage, losses and prediction as one tensor [B, S, n + W].

        n: 1, or 2 if `reports_log_z`.
        """
        found: torch.Tensor = super()._postprocess(hidden_states=hidden_states, **rest)
        if not self.post_process or not self.training or rest["labels"] is None:
            return found
        losses = found if self.reports_log_z else found[..., None]
        return torch.cat([losses, self.auxiliary_head(hidden_states).transpose(0, 1).to(losses.dtype)], -1)


def checkpoint_metadata(groups: ParallelGroups) -> dict[str, Any]:
    """Return the metadata of sharded state dicts; only the format `fully_reshardable` can be loaded by every layout.

    The state of chained optimizers, Muon and AdamW, is named as that of one.
    """
    return {
        "dp_cp_group": groups.data_and_context,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def build_model_chunks(
    config: RunConfig,
    vocab_size: int,
    groups: ParallelGroups,
    choice: LayerChoice,
    *,
    initialize: bool = True,
    predicted_width: int | None = None,
) -> list[LanguageModel]:
    """Return this rank's part of the model for `vocab_size` ids, one chunk per virtual stage, initialized, on its device.

    Without `initialize` the matrices are not set, for weights that are loaded next. predicted_width: channels that the head of
    train.auxiliary predicts; None for a model without it.
    """
    core_config = build_core_config(config)
    fuse_activation(core_config, choice)
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    if config.parallel.tp_comm_overlap:
        start_user_buffers(config)
    kind = LanguageModel if predicted_width is None else ModelWithHead
    chunks = []
    for chunk in range(groups.virtual_stages):
        stage = chunk if interleaved else None
        layers = build_layer_spec(choice, core_config, stage, unfused_attention=config.model.attention_backend == "unfused")
        model = kind(
            core_config,
            layers,
            vocab_size=padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by),
            max_sequence_length=config.data.seq_length,
            pre_process=groups.has_first_stage(chunk),
            post_process=groups.has_last_stage(chunk),
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
            pg_collection=groups.collection,
            vp_stage=stage,
            mtp_block_spec=build_mtp_spec(core_config, layers, stage),
        )
        model.rotary_pos_emb.inv_freq = rotary_frequencies(config.model).to(model.rotary_pos_emb.inv_freq.device)
        model.num_ids, model.reports_log_z = vocab_size, config.train.z_loss_coeff > 0
        model.fuses_loss = choice.implementation != "torch"
        if isinstance(model, ModelWithHead) and model.post_process and predicted_width is not None:
            model.add_head(config.train.auxiliary.head, predicted_width)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        if initialize:
            initialize_weights(model, config.train.seed, checkpoint_metadata(groups))
        chunks.append(model)
    return chunks


def wrap_for_training(config: RunConfig, chunks: list[LanguageModel]) -> list[DistributedDataParallel]:
    """Wrap the model chunks for mixed precision and data parallelism; gradients are summed in fp32.

    With Muon, the distributed optimizer gives each matrix of the layers to one rank, and cuts only the other weights.
    """
    parallel = config.parallel
    is_layer_wise = parallel.use_distributed_optimizer and config.optimizer.optimizer == "muon"
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # the step checks the norm of all gradients once
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        # later chunks need their gradients last, so separate buckets would not help overlap
        is_bucketed = index == 0 and parallel.overlap_grad_reduce and chunk.pre_process
        layout = {"full_param_layout": _whole_matrices(chunk, ddp_config, is_bucketed=is_bucketed)} if is_layer_wise else {}
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, module, disable_bucketing=index > 0, **layout))
    return wrapped


def _whole_matrices(chunk: LanguageModel, ddp_config: DistributedDataParallelConfig, *, is_bucketed: bool) -> Any:
    """Return megatron-core's layout of buffers in which each matrix of the layers is in the part of one data-parallel rank."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer, tag_params_for_buffer_routing

    tag_params_for_buffer_routing([chunk])
    ranks = chunk.pg_collection.dp_cp.size()
    bucket_size = bucket_elements(ddp_config.bucket_size, chunk.pg_collection.dp.size()) if is_bucketed else None
    params = [param for param in chunk.parameters() if param.requires_grad]
    return LayerWiseDistributedOptimizer.compute_full_param_layout(params, bucket_size, ranks, ddp_config)


def build_core_config(config: RunConfig) -> TransformerConfig:
    """Return megatron-core's transformer config of a run."""
    model, parallel = config.model, config.parallel
    dtype = PARAMS_DTYPES[model.params_dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        kv_channels=head_dim(model),
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        softmax_scale=softmax_scale(model),
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.params_dtype == "bf16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        microbatch_group_size_per_vp_stage=parallel.pipeline_model_parallel_size,
        overlap_p2p_comm=interleaved,  # interleaved with batched p2p gives a wrong loss at two stages
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=frees_sent_outputs(),
        calculate_per_token_loss=True,
        init_method=leave_unset,  # initialize_weights draws the weights, equal for every layout
        output_layer_init_method=leave_unset,
        embedding_init_method=leave_unset,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=not torch.cuda.is_available(),  # CUDA needs an extension; a CPU has ours
        masked_softmax_fusion=False,  # this and the next three are compiled during training, on a CPU with a C++ compiler
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=list(parallel.recompute_modules),
        fp8=model.fp8,
        fp8_recipe=model.fp8_recipe,
        fp8_amax_history_len=model.fp8_amax_history_len,
        fp8_amax_compute_algo=model.fp8_amax_compute_algo,
        tp_comm_overlap=parallel.tp_comm_overlap,
        mtp_num_layers=model.mtp_num_layers,
        mtp_loss_scaling_factor=0.1 if model.mtp_loss_scaling_factor is None else model.mtp_loss_scaling_factor,
    )


def fuse_activation(core_config: TransformerConfig, choice: LayerChoice) -> None:
    """Use SwiGLU as one operator, which keeps 3 instead of 5 tensors of the feed-forward width for the backward pass.

    Our fused layer's spec names our operator. Transformer Engine's layers, which run only on a GPU, use megatron-core's operator,
    compiled at its first call; this is not yet run on hardware.
    """
    core_config.use_te_activation_func = choice.implementation == "fused"  # uses the activation of the layer spec
    if choice.implementation == "transformer_engine":
        core_config.bias_activation_fusion = True


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Return the radians per position of each pair of a head [D / 2], fp32."""
    width = head_dim(model)
    plain = 1.0 / (model.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if model.rope_scaling is None:
        return plain
    scaled_down = plain / model.rope_scaling_factor
    if model.rope_scaling == "linear":
        return scaled_down
    unscaled = _unscaled_by_llama3(model, plain) if model.rope_scaling == "llama3" else _unscaled_by_yarn(model, width)
    return scaled_down * (1 - unscaled) + plain * unscaled


def softmax_scale(model: ModelConfig) -> float | None:
    """Return the factor of the scores; None: 1 / sqrt(D). yarn: section 3.4 of Peng et al., arXiv 2309.00071."""
    if model.rope_scaling != "yarn":
        return None
    factor = model.rope_scaling_attention_factor
    return (0.1 * math.log(model.rope_scaling_factor) + 1.0 if factor is None else factor) ** 2 / math.sqrt(head_dim(model))


def _unscaled_by_llama3(model: ModelConfig, plain: torch.Tensor) -> torch.Tensor:
    """Return the unscaled fraction of each frequency [D / 2], by its rotations over the original positions (Llama 3.1)."""
    rotations = model.rope_scaling_original_max_position * plain / (2 * math.pi)
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    return ((rotations - low) / (high - low)).clamp(0, 1)


def _unscaled_by_yarn(model: ModelConfig, width: int) -> torch.Tensor:
    """Return the unscaled fraction of each frequency [D / 2], linear in its index between two bounds (Peng et al., section 3.2)."""

    def pair_with_rotations(times: float) -> float:
        positions = model.rope_scaling_original_max_position
        return width * math.log(positions / (times * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    first = max(math.floor(pair_with_rotations(model.rope_scaling_beta_fast)), 0)
    last = min(math.ceil(pair_with_rotations(model.rope_scaling_beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)


RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight unchanged: the init method that megatron-core gets, because `initialize_weights` draws the values.

    With `perform_initialization=False` the weights would lack their tensor-parallel marks, and the gradient norm would count only
    the first tensor-parallel rank.
    """
    return weight


@torch.no_grad()
def initialize_weights(model: MegatronModule, seed: int, metadata: dict[str, Any]) -> None:
    """Draw every matrix of one model chunk; vectors keep megatron-core's values: norms one, biases zero.

    The standard deviation is `init_method_std`, and `init_method_std / sqrt(2 * num_layers)` for outputs to the residual stream
    (Radford et al. 2019, section 2.3), both from the model's megatron-core config.
    """
    core_config = model.config
    plain = init_method_normal(core_config.init_method_std)
    scaled = scaled_init_method_normal(core_config.init_method_std, core_config.num_layers)
    drawn = set()
    for shard in _sharded_matrices(model.sharded_state_dict(metadata=metadata)):
        layers = shard.prepend_axis_num
        where = f"{seed}/{shard.key}/{tuple(shard.global_offset[:layers])}"
        whole = torch.empty(shard.global_shape[layers:], dtype=torch.float32)
        outer = torch.get_rng_state()
        torch.manual_seed(int.from_bytes(hashlib.sha256(where.encode()).digest()[:6], "little"))
        (scaled if shard.key.endswith(RESIDUAL_OUTPUTS) else plain)(whole)
        torch.set_rng_state(outer)
        for axis, (start, length) in enumerate(zip(shard.global_offset[layers:], shard.local_shape, strict=True)):
            whole = whole.narrow(axis, start, length)
        shard.data.copy_(whole)
        drawn.add(shard.data.untyped_storage().data_ptr())
    missed = [n for n, p in model.named_parameters() if p.dim() > 1 and p.untyped_storage().data_ptr() not in drawn]
    assert not missed, f"no initial values for {missed}"


def _sharded_matrices(state: Any) -> Iterator[ShardedTensor]:
    """Yield every matrix in a sharded state dict as a view of its parameter; gate and up projection are separate."""
    if isinstance(state, ShardedTensorFactory):
        yield from _sharded_matrices(state.build())
    elif isinstance(state, ShardedTensor):
        if len(state.local_shape) > 1 and state.data is not None:
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _sharded_matrices(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _sharded_matrices(value)
