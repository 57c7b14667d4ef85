"""Input of the planner: the shape of a model and the layout of a run, from a RunConfig or written by hand.

The planner has its own types because no RunConfig can describe the published models that validate it (GELU, biases, dropout).
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ledom.config.batch_schedule import largest_batch
from megatron_ledom.config.derived import data_parallel_size, head_dim, num_microbatches, padded_vocab_size, query_groups
from megatron_ledom.config.schema import ModelConfig, OptimizerSettings, RunConfig
from megatron_ledom.errors import ConfigError

Granularity = Literal["selective", "full"]
Layers = Literal["unfused", "fused_activation", "fused"]
"""Implementation of the layers.

unfused: megatron-core's layer of single operators. fused_activation: the same with SwiGLU as one operator, as with Transformer
Engine. fused: this package's fused layer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Shape and implementation of a decoder-only transformer."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width inside the feed-forward block; with SwiGLU, of gate and up projection each."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    padded_vocab_size: int
    gated: bool = True
    """True for SwiGLU, False for GELU."""
    biased: bool = False
    """True for GPT-3's layer: biases in every matrix product, and LayerNorm instead of RMSNorm."""
    attention_dropout: bool = False
    hidden_dropout: bool = False
    flash: bool = True
    """True for flash attention, which does not store the matrix of scores."""
    shared_embeddings: bool = False
    learned_positions: int = 0
    """Rows of the table of learned positions; every tensor-parallel rank of the first stage has all of it. 0: none (RoPE)."""
    layers: Layers = "unfused"
    element_bytes: int = 2
    """Bytes of an element of weights and activations: 2 in bf16, 4 in fp32."""

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.num_attention_heads * self.head_dim

    @property
    def gates(self) -> int:
        """Number of matrices of the feed-forward block."""
        return 3 if self.gated else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """Newton-Schulz iterations of Muon, as in the keys `muon_` of the optimizer."""

    steps: int = 5
    split_qkv: bool = True
    tp_mode: str = "duplicated"
    precision: str = "medium"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups of a run, its micro-batches and its recompute."""

    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Model chunks per stage; 1 is the plain schedule."""
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    muon: Muon | None = None
    """Set if Muon updates the matrices of the layers: it keeps one momentum of them instead of two moments."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_tensor: bool = False
    """True if Transformer Engine overlaps the tensor-parallel traffic with the matrix products, piece by piece."""
    bucket_size: int | None = None
    """Elements of a bucket of gradients, for the overlap; None for megatron-core's default."""
    recompute: Granularity | None = None
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    ema: bool = False
    """True for a moving average of the weights."""

    @property
    def is_layer_wise(self) -> bool:
        """True if Muon's matrices are spread over data-parallel ranks, each whole on one of them."""
        return self.muon is not None and self.distributed_optimizer

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the run."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def tokens(self) -> int:
        """Positions of one micro-batch on one rank, before sequence parallelism."""
        return self.micro_batch_size * self.seq_length // self.context

    @property
    def spread_tokens(self) -> int:
        """Positions of one micro-batch on one rank in norms, residuals and dropout, which sequence parallelism divides."""
        return self.tokens // (self.tensor if self.sequence_parallel else 1)

    @property
    def tokens_per_iteration(self) -> int:
        """Positions of one optimizer step over all ranks."""
        return self.seq_length * self.micro_batch_size * self.num_microbatches * self.data


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the shape of a configured model. Raises ConfigError if the vocabulary size is not known."""
    if model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size=null, but a plan needs it; set model.vocab_size to the number of the tokenizer's ids"
        )
    return Architecture(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        head_dim=head_dim(model),
        padded_vocab_size=padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by),
        attention_dropout=model.attention_dropout > 0,
        hidden_dropout=model.hidden_dropout > 0,
        flash=model.attention_backend != "unfused",
        layers=layers_of(model),
        shared_embeddings=model.share_embeddings_and_output_weights,
        element_bytes=2 if model.params_dtype == "bf16" else 4,
    )


def layers_of(model: ModelConfig) -> Layers:
    """Return the layers of a configured model on a GPU. `auto` counts as Transformer Engine, which keeps more than `fused`."""
    if model.transformer_impl == "torch":
        return "unfused"
    whole = model.transformer_impl == "fused" and not model.qk_layernorm  # qk norms precede the rotation
    return "fused" if whole else "fused_activation"


def muon_of(settings: OptimizerSettings) -> Muon | None:
    """Return the settings of Muon; None for AdamW."""
    if settings.optimizer != "muon":
        return None
    return Muon(
        steps=settings.muon_num_ns_steps,
        split_qkv=settings.muon_split_qkv,
        tp_mode=settings.muon_tp_mode,
        precision=settings.muon_fp32_matmul_prec,
    )


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout of a checked config on `world_size` ranks, in iterations of its largest global batch."""
    parallel = config.parallel
    return Layout(
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=num_microbatches(config, world_size, largest_batch(config)),
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        context=parallel.context_parallel_size,
        data=data_parallel_size(parallel, world_size),
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.use_distributed_optimizer,
        muon=muon_of(config.optimizer),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        overlap_tensor=parallel.tp_comm_overlap,
        bucket_size=parallel.bucket_size,
        recompute=parallel.recompute_granularity,
        recompute_modules=tuple(parallel.recompute_modules),
        recompute_method=parallel.recompute_method or "uniform",
        recompute_num_layers=parallel.recompute_num_layers or 1,
        ema=config.optimizer.ema_decay is not None,
    )
