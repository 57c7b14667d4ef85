"""RunConfig: everything that decides a run. Names are megatron-core's; ranges are checked here, relations in checks.py."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from megatron_ledom.direction import Direction

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
BlendEntry = tuple[PositiveFloat, str]
SplitRatios = tuple[PositiveFloat, NotNegativeFloat, NotNegativeFloat]


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The architecture: a GPT with RMSNorm before each block, SwiGLU, rotary positions and no biases but those of QKV."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Width inside the feed-forward block, of each of the gate and the up projection."""
    num_attention_heads: Positive
    """Query heads."""
    num_query_groups: Positive | None = None
    """Key-value heads; default: one a query head. 1 is multi-query attention."""
    kv_channels: Positive | None = None
    """Width of one head; default: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Ids of the tokenizer; default: read from the shards. Set it to plan a run without data."""
    make_vocab_size_divisible_by: Positive = 128
    """The embedding is padded to a multiple of this, whatever the layout, so that checkpoints do not depend on it."""
    rotary_base: PositiveFloat = 10_000.0
    """Theta of the rotary position embedding, over the whole head."""
    rope_scaling: Literal["linear", "llama3", "yarn"] | None = None
    """How rotary frequencies are stretched for positions beyond those a model was first trained on; default: they are not."""
    rope_scaling_factor: Annotated[float, Field(ge=1)] = 8.0
    """By how much; counts with rope_scaling only, as the keys that follow."""
    rope_scaling_original_max_position: Positive = 8192
    """Positions that the model was first trained on, in tokens; of llama3 and yarn."""
    rope_scaling_low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies that turn less often than this in those positions are stretched in full."""
    rope_scaling_high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies that turn more often than this are left alone."""
    rope_scaling_beta_fast: PositiveFloat = 32.0
    """yarn: as rope_scaling_high_freq_factor."""
    rope_scaling_beta_slow: PositiveFloat = 1.0
    """yarn: as rope_scaling_low_freq_factor."""
    rope_scaling_attention_factor: PositiveFloat | None = None
    """yarn: what queries and keys are multiplied by; default: 0.1 ln(rope_scaling_factor) + 1."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 num_layers)."""
    attention_dropout: Fraction = 0.0
    """Dropout probability on attention weights."""
    hidden_dropout: Fraction = 0.0
    """Dropout probability on block outputs."""
    share_embeddings_and_output_weights: bool = False
    """Tie the embedding and the output layer."""
    add_qkv_bias: bool = False
    """A bias on queries, keys and values, as Qwen2 has."""
    qk_layernorm: bool = False
    """RMSNorm over each head of queries and keys, before the rotary embedding, as Qwen3 has."""
    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; gradients are summed and the optimizer runs in fp32."""
    transformer_impl: Literal["auto", "transformer_engine", "fused", "torch"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it is installed and CUDA is there, else our fused operators where
    they are built and can run, else plain torch."""
    attention_backend: Literal["auto", "unfused"] = "auto"
    """auto: Transformer Engine's choice, or torch's scaled_dot_product_attention; unfused: matrix products around our causal
    softmax, which keep every head's matrix of scores, for where no flash kernel is. Not with Transformer Engine."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Matrix products in fp8, by Transformer Engine: hybrid takes e5m2 for gradients; default: none."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How fp8 scales are found: from the tensor, from earlier steps, or in blocks; counts with model.fp8 only."""
    fp8_amax_history_len: Positive = 1024
    """Steps that the delayed recipe looks back on for the largest value."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Which of those steps decides the delayed recipe's scale."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read, and how samples are cut and masked."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    direction: Direction = Direction.REVERSE
    """Which way the model reads; shards written in the other direction are refused."""
    tokenizer: str | None = None
    """Tokenizer folder or file; its copy goes into the run folder for the export. Its hash must be that of the shards."""
    train_blend: list[BlendEntry] = field(default_factory=list)
    """Training shards as [weight, prefix]; see blend_unit."""
    blend_unit: Literal["weight", "tokens"] = "weight"
    """What the numbers of train_blend are: relative shares of the samples, or tokens to draw, whose sum is the run."""
    valid_blend: list[BlendEntry] = field(default_factory=list)
    """Validation shards as [weight, prefix]; each is a set of its own, named by its prefix."""
    valid_sets: dict[str, list[BlendEntry]] = field(default_factory=dict)
    """Further validation sets by name, each a blend of [weight, prefix]."""
    test_sets: dict[str, list[BlendEntry]] = field(default_factory=dict)
    """As valid_sets, but evaluated once, at the end of the run."""
    split: SplitRatios | None = None
    """Ratios [train, valid, test] by which each shard of train_blend is divided, by documents, instead of separate sets."""
    seq_length: Positive = 8192
    """Positions of a sample, in tokens."""
    eod_mask_loss: bool = True
    """No loss where the input token is eod: to predict the end is trained, to predict from it is not."""
    loss_tokens: Literal["all", "scored", "scored_and_eod"] = "all"
    """What of a pair (`ledom prepare-pairs`) the loss counts: everything, or only what a scorer scores, of a reverse model the
    prompt given the answer; without or with the eod that says where it begins. Of text it is everything."""
    reset_attention_mask: bool = False
    """Documents in one sample do not see each other."""
    reset_position_ids: bool = False
    """Positions begin again after each eod."""
    path_to_cache: str | None = None
    """Folder of the sample index; default: index_cache in the run folder. It may be shared by runs and by nodes."""
    num_workers: NotNegative = 0
    """Processes that read samples ahead, for each rank; 0 reads in the training process."""
    allow_repeats: bool = False
    """Let a blend draw more samples from a source than it has; otherwise such a run is refused."""
    allow_changed_data: bool = False
    """Let a run go on with other training data than its checkpoint's; samples may come twice or never. Noted in the run folder."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    world_size: Positive | None = None
    """Ranks the run is meant for; default: as many as are launched. Another number at launch is refused."""
    hardware: str | None = None
    """What --dry-run plans memory and time for: a name that `ledom configs list` shows, or a YAML file like those; default: no plan."""
    tensor_model_parallel_size: Positive = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: Positive = 1
    """Stages of consecutive layers."""
    virtual_pipeline_model_parallel_size: Positive | None = None
    """Model chunks a pipeline stage, for the interleaved schedule."""
    context_parallel_size: Positive = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool = False
    """Spread norms and dropout over the tensor-parallel ranks along the sequence."""
    use_distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the distributed optimizer."""
    bucket_size: Positive | None = None
    """Parameters whose gradients are reduced at once when overlapped; default: max(40e6, 1e6 x data-parallel ranks)."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Activations computed again in the backward pass: parts of a layer, or whole layers; default: none."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["core_attn"])
    """The parts of a layer that selective recompute computes again."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recompute: of every group of layers, or of the first layers of a model chunk only."""
    recompute_num_layers: Positive | None = None
    """Full recompute: layers of a group (uniform), or layers of a model chunk that are computed again (block)."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel collectives with the matrix products, by Transformer Engine's user buffers."""
    nccl_communicator_config_path: str | None = None
    """YAML of NCCL settings a process group: cga_cluster_size, min_ctas, max_ctas, net_name, is_high_priority_stream."""
    high_priority_stream_groups: list[Literal["tp", "cp", "dp", "dp_cp", "pp"]] = field(default_factory=list)
    """Process groups whose NCCL kernels go before others on the GPU."""
    use_sharp: bool = False
    """Let the network's switches reduce the gradients of the data-parallel group (SHARP)."""
    distributed_timeout_minutes: Positive = 10
    """How long a collective waits for a missing rank."""


@dataclass(kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule; norms and biases are not decayed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    min_lr: NotNegativeFloat = 2e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay after the warm-up. WSD: warm-up, stable, decay over the last lr_wsd_decay_iters."""
    lr_warmup_iters: NotNegative = 2000
    """Iterations of linear warm-up from zero."""
    lr_decay_iters: Positive | None = None
    """Iterations until min_lr is reached; default: train.train_iters."""
    lr_wsd_decay_iters: Positive | None = None
    """Iterations of the decay at the end of WSD; needed by it, and by nothing else."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of that decay."""
    weight_decay: NotNegativeFloat = 0.1
    """Decoupled weight decay of matrices."""
    adam_beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Fraction = 0.95
    """Decay of the squared gradient's running mean."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NotNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and rhythm of the run."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    train_iters: Positive
    """Optimizer steps of the whole run."""
    micro_batch_size: Positive = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: Positive
    """Samples of one optimizer step over all ranks."""
    seed: NotNegative = 42
    """Seed of initial weights, dropout and sample order."""
    eval_interval: Positive = 1000
    """Iterations between validations; there is always one at the end."""
    eval_iters: Positive = 10
    """Global batches of each validation set."""
    tasks: list[str] = field(default_factory=list)
    """Multiple-choice tasks of `ledom evaluate` evaluated while training, by name, with the figures that an export would have;
    tasks that write text are for the exported model."""
    task_data: str | None = None
    """Folder of their files (`ledom evaluate --list` names them)."""
    task_interval: Positive = 1000
    """Iterations between evaluations of the tasks; there is always one at the end."""
    task_limit: Positive | None = None
    """Only the first items of each task; default: all."""
    task_num_fewshot: NotNegative = 0
    """Demonstrations before each item."""
    z_loss_coeff: NotNegativeFloat = 0.0
    """Weight of (log Z)^2 a token, which keeps logits from drifting; 0 leaves it out. PaLM had 1e-4."""
    exit_interval: Positive | None = None
    """Save and exit after the first iteration that is a multiple of this; the same command goes on from there."""
    exit_before_limit_seconds: NotNegative | None = None
    """Save and exit so long before SLURM's time limit; default: a tenth of the time that is left at the start, at most 600.
    It leaves earlier by one step and by the saves it would wait for (one being written, and its last), each as long as the longest
    so far. 0: the limit is not looked at."""
    exit_duration_seconds: Positive | None = None
    """Save and exit so that this much time has passed since the start of the process, under any launcher; earlier as above."""
    num_threads: Positive | None = None
    """CPU threads of a rank; default: the machine's cores over the ranks on it."""
    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    """When the loss or the gradient norm is NaN or infinite: stop, leave the update out, or return to the last checkpoint and
    leave the iteration out."""
    on_spike: Literal["warn", "stop", "skip", "roll_back"] = "warn"
    """When the loss or the gradient norm is a spike: update and warn, or as on_nonfinite."""
    spike_score: PositiveFloat = 8.0
    """A spike is that many standard deviations (by the median deviation) above the median of the last iterations."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Iterations a score is taken against; there is none before half of them are done."""
    max_skips: Positive = 10
    """Updates left out in a row; one more bad iteration stops the run."""
    max_roll_backs: Positive = 3
    """Returns to one checkpoint; one more bad iteration stops the run."""
    skip_iterations: list[Positive] = field(default_factory=list)
    """Iterations to leave out: their samples are consumed, nothing is computed or updated. For a return by hand."""
    watchdog_seconds: NotNegativeFloat = 300.0
    """Without any progress for so long, a run says which rank hangs and where, and ends; 0 switches this off. Building,
    saving and loading may take as long as parallel.distributed_timeout_minutes allows."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved; where is always checkpoints/ in the run folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    save_interval: Positive = 1000
    """Iterations between checkpoints; there is always one at the end and after SIGTERM."""
    async_save: bool = True
    """Write in a process beside the training, which goes on meanwhile; the host holds a copy of the state until it is done."""
    keep_last: Positive | None = None
    """Newest checkpoints that are kept; default: all. With 1, a damaged one has no predecessor. The one before each of the two
    newest bad steps is kept too."""
    keep_interval: Positive | None = None
    """With keep_last: checkpoints at its multiples are kept for ever."""
    verify_on_load: bool = True
    """Compare every file's sha256 before a resume, each rank its share of the files; sizes are always compared."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and where to."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    log_interval: Positive = 10
    """Iterations between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events into tensorboard/ in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; default: none is used."""
    wandb_mode: Literal["online", "offline"] | None = None
    """Offline: kept in wandb/ in the run folder for `wandb sync`; default: what wandb's own environment says."""
    profile_start: Positive | None = None
    """First iteration that torch's profiler records, for profile/ in the run folder; default: none."""
    profile_stop: Positive | None = None
    """Last iteration that is recorded; default: profile_start."""
    profile_ranks: list[NotNegative] = field(default_factory=lambda: [0])
    """Ranks that record."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in 1e12 FLOP/s, for the MFU; default: known by the GPU's name, measured on a CPU."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/. An existing one is resumed."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
