"""RunConfig: every setting of a run, named as in megatron-core. Types and ranges are here, relations in checks.py."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from megatron_ledom.direction import Direction, ModelDirection

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
BlendEntry = tuple[PositiveFloat, str] | tuple[PositiveFloat, str, Direction]
SplitRatios = tuple[PositiveFloat, NotNegativeFloat, NotNegativeFloat]


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The architecture: a GPT with RMSNorm before each block, SwiGLU, rotary positions, and no biases except, optionally,
    on queries, keys and values."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Inner width of the feed-forward block: the output size of its gate projection, and of its up projection."""
    num_attention_heads: Positive
    """Number of query heads."""
    num_query_groups: Positive | None = None
    """Number of key-value heads. Default: as many as query heads; 1 is multi-query attention."""
    kv_channels: Positive | None = None
    """Width of one attention head; must be even. Default: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Number of token ids of the tokenizer. Default: read from the shards; set it to plan a run without data."""
    make_vocab_size_divisible_by: Positive = 128
    """The number of embedding rows is rounded up to a multiple of this. It does not depend on the layout, so every layout
    can load the same checkpoint."""
    rotary_base: PositiveFloat = 10_000.0
    """Base (theta) of the rotary position embedding, which covers the whole head."""
    rope_scaling: Literal["linear", "llama3", "yarn"] | None = None
    """Method that rescales rotary frequencies for positions beyond the length of the first training: linear, llama3 or
    yarn. Default: no scaling."""
    rope_scaling_factor: Annotated[float, Field(ge=1)] = 8.0
    """Ratio of the new context length to the original one, 1 or more. Like the rope_scaling_ keys below, it has an
    effect only with rope_scaling."""
    rope_scaling_original_max_position: Positive = 8192
    """Context length of the first training, in tokens. For llama3 and yarn."""
    rope_scaling_low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer rotations than this over the original context are divided by rope_scaling_factor."""
    rope_scaling_high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies with more rotations than this over the original context are not rescaled. Must be above
    rope_scaling_low_freq_factor."""
    rope_scaling_beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more rotations than this over the original context are not rescaled. Must be above
    rope_scaling_beta_slow."""
    rope_scaling_beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer rotations than this over the original context are divided by rope_scaling_factor."""
    rope_scaling_attention_factor: PositiveFloat | None = None
    """yarn: factor on queries and keys. Default: 0.1 ln(rope_scaling_factor) + 1."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of RMSNorm, added to the mean square."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights. The output projections of each block use it divided by sqrt(2
    num_layers)."""
    attention_dropout: Fraction = 0.0
    """Dropout probability of the attention weights, 0 or more and below 1."""
    hidden_dropout: Fraction = 0.0
    """Dropout probability of the output of each block, 0 or more and below 1."""
    share_embeddings_and_output_weights: bool = False
    """Use one matrix for the input embedding and the output layer."""
    add_qkv_bias: bool = False
    """Add a bias to queries, keys and values, as in Qwen2."""
    qk_layernorm: bool = False
    """Apply RMSNorm to each head of queries and keys before the rotary embedding, as in Qwen3."""
    mtp_num_layers: Positive | None = None
    """Number of modules of multi-token prediction, trained beside the model and not exported: module k predicts the token k + 1
    places on. Default: none."""
    mtp_loss_scaling_factor: PositiveFloat | None = None
    """Weight of the mean loss of those modules. Needs mtp_num_layers. Default: 0.1, as in megatron-core."""
    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Data type of weights and activations: bf16 or fp32. Gradient sums and the optimizer always use fp32."""
    transformer_impl: Literal["auto", "transformer_engine", "fused", "torch"] = "auto"
    """Implementation of the layers. auto takes Transformer Engine if it is installed and there is a CUDA device; else the
    fused operators of this package if they are built and can run; else torch."""
    attention_backend: Literal["auto", "unfused"] = "auto"
    """auto: the choice of Transformer Engine, or torch's scaled_dot_product_attention. unfused: plain matrix products and
    softmax, which store all attention scores; for devices without a flash kernel, not with Transformer Engine."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Format of matrix products in fp8, which need Transformer Engine: e4m3, or hybrid (e4m3 forward, e5m2 for
    gradients). Default: no fp8."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Source of the fp8 scales: the current tensor (tensorwise), earlier steps (delayed), or blocks of the tensor
    (blockwise, mxfp8). Has an effect only with fp8."""
    fp8_amax_history_len: Positive = 1024
    """Number of earlier steps that the delayed recipe takes its scale from."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Rule by which the delayed recipe reduces those steps: max (the largest value) or most_recent."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training and held-out data, and how samples are cut and masked."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    direction: ModelDirection = Direction.REVERSE
    """Reading direction of the model: reverse, forward, or both for a two-way model, whose train_blend mixes shards of both
    directions with different markers. Shards of another direction are refused."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer, whose hash must equal that of the shards. The run folder keeps a copy for the
    export. Default: the path in the shards' manifest."""
    train_blend: list[BlendEntry] = field(default_factory=list)
    """Training shards, a list of [weight, prefix]; blend_unit defines the meaning of the weights. An entry may end with
    the direction of its shard, [weight, prefix, reverse]; a shard of the other direction is then refused."""
    blend_unit: Literal["weight", "tokens"] = "weight"
    """Meaning of the weights in train_blend. weight: relative parts of the samples. tokens: tokens to draw, whose sum
    must be that of the run."""
    valid_blend: list[BlendEntry] = field(default_factory=list)
    """Validation shards, a list of [weight, prefix]. Each shard is evaluated as a set of its own, named by its prefix;
    its weight is required but not used."""
    valid_sets: dict[str, list[BlendEntry]] = field(default_factory=dict)
    """Further validation sets, by name; each is a blend, a list of [weight, prefix]."""
    test_sets: dict[str, list[BlendEntry]] = field(default_factory=dict)
    """Test sets, written as valid_sets. They are evaluated once, at the end of the run."""
    split: SplitRatios | None = None
    """Ratios [train, valid, test] by which the documents of each shard in train_blend are divided. Use it instead of
    valid_blend, valid_sets and test_sets. Default: no division."""
    seq_length: Positive = 8192
    """Length of one sample, in tokens."""
    eod_mask_loss: bool = True
    """Exclude from the loss the positions whose input token is eod. The model then learns to predict eod, but not to
    predict the next document from it."""
    loss_tokens: Literal["all", "scored", "scored_and_eod"] = "all"
    """Positions that count in the loss, for pairs from `ledom prepare-pairs`. all: every position. scored: only the
    tokens that a scorer scores, for a reverse model the prompt given the answer. scored_and_eod: those and the eod that
    follows them in model order. Shards of ordinary text (not from `ledom prepare-pairs`) always count every position."""
    reset_attention_mask: bool = False
    """Prevent attention between the documents of one sample. Not with Transformer Engine."""
    reset_position_ids: bool = False
    """Restart positions at 0 after each eod. Needs reset_attention_mask."""
    path_to_cache: str | None = None
    """Folder of the sample index, which several runs and nodes may share. Default: index_cache in the run folder."""
    num_workers: NotNegative = 0
    """Number of processes per rank that read samples ahead. 0: the training process reads."""
    allow_repeats: bool = False
    """Allow a blend to draw more samples from a shard than the shard has. By default such a run is refused."""
    allow_changed_data: bool = False
    """Allow a run to resume with other training or held-out data than before; samples may then repeat or be missing.
    data_changes.jsonl in the run folder lists changed training data. By default such a run is refused."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Distribution of the model and the batch over ranks."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    world_size: Positive | None = None
    """Number of ranks the run is meant for; a launch with another number is refused. Default: as many as are launched."""
    hardware: str | None = None
    """Hardware for which --dry-run plans memory and time: a name from `ledom configs list`, or the path of a YAML file of
    the same form. Default: no plan."""
    tensor_model_parallel_size: Positive = 1
    """Number of ranks over which the matrices of each layer are split."""
    pipeline_model_parallel_size: Positive = 1
    """Number of pipeline stages, each a group of consecutive layers. Must divide model.num_layers."""
    virtual_pipeline_model_parallel_size: Positive | None = None
    """Number of model chunks per pipeline stage, 2 or more, for the interleaved schedule. Default: one chunk, without
    interleaving."""
    context_parallel_size: Positive = 1
    """Number of ranks over which each sequence is split."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks. Needs tensor_model_parallel_size above 1."""
    use_distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel ranks, instead of a full copy on each. With Muon, which needs bf16 for it, each
    matrix is whole on one rank."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass. Needs use_distributed_optimizer and overlap_grad_reduce."""
    bucket_size: Positive | None = None
    """Number of parameters whose gradients are reduced together, only with overlap_grad_reduce. Default: the
    larger of 40e6 and 1e6 x data-parallel ranks."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Activations to recompute in the backward pass, which saves memory. selective: the parts in recompute_modules; full:
    whole layers. Default: none."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["core_attn"])
    """Parts of a layer that selective recompute recomputes: core_attn (attention scores and weights), mlp (the
    feed-forward block)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Layers that full recompute covers. uniform: all, in groups of recompute_num_layers; block: only the first
    recompute_num_layers of each model chunk. Full recompute needs it, selective refuses it."""
    recompute_num_layers: Positive | None = None
    """Full recompute: number of layers per group (uniform) or per model chunk (block). Full recompute needs it, selective
    refuses it."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products, in Transformer Engine's user buffers. Needs
    sequence_parallel."""
    nccl_communicator_config_path: str | None = None
    """YAML file with NCCL settings by process group: cga_cluster_size, min_ctas, max_ctas, net_name,
    is_high_priority_stream. Default: NCCL's own settings."""
    high_priority_stream_groups: list[Literal["tp", "cp", "dp", "dp_cp", "pp"]] = field(default_factory=list)
    """Process groups whose NCCL kernels run in high-priority streams: some of tp, cp, dp, dp_cp, pp."""
    use_sharp: bool = False
    """Let the network switches reduce the gradients of the data-parallel group (SHARP)."""
    distributed_timeout_minutes: Positive = 10
    """Minutes that a collective waits for a missing rank before the run fails."""


@dataclass(kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW or Muon, and the learning-rate schedule. Norms and biases have no weight decay."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    optimizer: Literal["adam", "muon"] = "adam"
    """adam: AdamW for all weights. muon: Muon for the matrices of the layers; embedding, output layer, norms and biases have
    AdamW. muon needs megatron-core 0.19 and the package emerging-optimizers."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: NotNegativeFloat = 2e-5
    """Learning rate at the end of the decay; at most lr."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the schedule after the warm-up. cosine, linear: from lr to min_lr; constant: no decay; WSD: constant, then
    a decay over the last lr_wsd_decay_iters iterations."""
    lr_warmup_iters: NotNegative = 2000
    """Number of iterations of linear warm-up from 0 to lr."""
    lr_decay_iters: Positive | None = None
    """Iteration at which the learning rate reaches min_lr. Default: train.train_iters."""
    lr_wsd_decay_iters: Positive | None = None
    """Number of iterations of the final decay of WSD. WSD needs it, other styles refuse it."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of WSD: exponential, linear, cosine or minus_sqrt."""
    weight_decay: NotNegativeFloat = 0.1
    """Coefficient of the decoupled weight decay of the matrices; 0 switches it off."""
    adam_beta1: Fraction = 0.9
    """Decay rate of the running mean of the gradient, 0 or more and below 1."""
    adam_beta2: Fraction = 0.95
    """Decay rate of the running mean of the squared gradient, 0 or more and below 1."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment, against division by zero."""
    clip_grad: NotNegativeFloat = 1.0
    """Largest global gradient norm; a larger gradient is scaled down to it. 0 does not clip."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay rate per update of an exponential moving average of the weights, above 0 and below 1, such as 0.999. It is kept in
    fp32 (4 bytes a weight, sharded like the optimizer), saved, evaluated at each validation, and exported with
    `--weights ema`. Default: none."""
    muon_momentum: Fraction = 0.95
    """Decay rate of the running mean of the gradient in Muon, 0 or more and below 1. Like the other muon_ keys, it has an
    effect only with optimizer=muon, and is refused without."""
    muon_nesterov: bool = False
    """Orthogonalize the Nesterov momentum instead of the running mean."""
    muon_split_qkv: bool = True
    """Orthogonalize the projections of queries, keys and values each on their own, instead of their joint matrix. Needs at
    least one key-value head per tensor-parallel rank."""
    muon_num_ns_steps: Positive = 5
    """Number of Newton-Schulz iterations."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    """Coefficients of the Newton-Schulz iterations, by their names in emerging-optimizers."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Factor of the orthogonal update of a matrix [out, in]. spectral: sqrt(max(out, in)); unit_rms_norm: sqrt(out / in);
    shape_scaling: sqrt(max(1, out / in))."""
    muon_extra_scale_factor: PositiveFloat = 1.0
    """Further factor of the update. With spectral, 0.2 gives updates about as large as AdamW's, so that its learning rates
    fit."""
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Precision of the products of Newton-Schulz iterations: medium (bf16), high (TF32 on a GPU) or highest (fp32)."""
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """Newton-Schulz iterations of a matrix that tensor parallelism splits. duplicated: every rank gathers the matrix;
    distributed: the ranks share the products; blockwise: every rank orthogonalizes its part alone, so that the result depends
    on tensor_model_parallel_size."""


@dataclass(kw_only=True, slots=True)
class AuxiliaryConfig:
    """A further loss of a forward model beside the language loss. The head that it trains is not exported."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["reverse_state"] | None = None
    """reverse_state: at each token t a head predicts the hidden state of a frozen reverse model that has read the document from
    its end back to token t + 2. Default: no further loss."""
    teacher: str | None = None
    """Folder of the reverse model, as `ledom convert-checkpoint` writes it, with the tokenizer of the run. Needed with kind."""
    weight: PositiveFloat = 1.0
    """Factor of the further loss in the sum."""
    head: Literal["mlp", "linear"] = "mlp"
    """Head on the last hidden state. mlp: two matrices with SiLU between them and model.ffn_hidden_size channels inside; linear:
    one matrix."""
    teacher_layer: Positive | None = None
    """Number of layers of the teacher after which its state is taken, before the final norm. Default: the last state, after
    that norm."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length of the run, batch size, evaluations, stops and error handling."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    train_iters: Positive
    """Number of iterations of the whole run, each with one global batch."""
    micro_batch_size: Positive = 1
    """Number of samples in one forward pass of one data-parallel rank."""
    global_batch_size: Positive
    """Number of samples of one iteration, over all ranks. Must be a multiple of micro_batch_size x data-parallel size. With
    a schedule of the batch size, its last one; validations always use it."""
    rampup_batch_size: tuple[Positive, Positive, Positive] | None = None
    """[start, increment, samples]: begin with `start` samples in an iteration, and raise that in equal steps of `increment` to
    global_batch_size over the first `samples` samples, as in megatron-core. Each size must be a multiple like
    global_batch_size. Default: no ramp-up."""
    batch_size_schedule: list[tuple[NotNegative, Positive]] | None = None
    """[[0, size], [tokens, size], ...]: global batch sizes, each with the number of consumed tokens from which it holds. The
    last size must be global_batch_size. Default: the same size in every iteration."""
    seed: NotNegative = 42
    """Seed of the initial weights, dropout and sample order."""
    eval_interval: Positive = 1000
    """Iterations between two validations. The run also validates after its last iteration."""
    eval_iters: Positive = 10
    """Number of global batches evaluated from each validation or test set, or fewer if the set is smaller."""
    tasks: list[str] = field(default_factory=list)
    """Multiple-choice tasks of `ledom evaluate` to evaluate during training, by name. The metrics equal those of the
    exported model. Tasks in which the model writes text are refused; evaluate them with the exported model."""
    task_data: str | None = None
    """Folder of the task files; `ledom evaluate --list` names them. Needed with tasks."""
    task_interval: Positive = 1000
    """Iterations between two evaluations of the tasks. The run also evaluates them after its last iteration."""
    task_limit: Positive | None = None
    """Evaluate only this many items of each task, from its beginning. Default: all items."""
    task_num_fewshot: NotNegative = 0
    """Number of solved examples in the prompt of each item (few-shot)."""
    z_loss_coeff: NotNegativeFloat = 0.0
    """Weight of (log Z)^2 in the loss of each token, which keeps logits from drifting. 0 switches it off; PaLM used 1e-4."""
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    exit_interval: Positive | None = None
    """Save and exit after each iteration that is a multiple of this; the same command resumes the run. Default: no such
    exit."""
    exit_before_limit_seconds: NotNegative | None = None
    """Seconds before SLURM's time limit. The last save starts at: limit - this value - (longest step + longest save so far).
    Then the run exits. Default: a tenth of the time left at the start, at most 600 s. 0 ignores the limit."""
    exit_duration_seconds: Positive | None = None
    """Save and exit before this many seconds have passed since the process started, with any launcher; earlier by the
    longest step and save so far. Default: no limit."""
    num_threads: Positive | None = None
    """Number of CPU threads per rank. Default: the CPU cores that the process may use, divided by
    the ranks of its machine."""
    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    """Reaction to a loss or gradient norm that is NaN or infinite. stop: end the run; skip: make no update; roll_back:
    return to the last checkpoint and skip the iteration."""
    on_spike: Literal["warn", "stop", "skip", "roll_back"] = "warn"
    """Reaction to a spike of the loss or gradient norm. warn: make the update and log a warning; stop, skip, roll_back:
    as in on_nonfinite."""
    spike_score: PositiveFloat = 8.0
    """A value is a spike if it is this many robust standard deviations above the median of the last spike_window
    iterations."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Number of past iterations that a value is compared with, 8 or more. No spike is reported before half of them are
    done."""
    max_skips: Positive = 10
    """Number of updates in a row that may be skipped; one more bad iteration stops the run."""
    max_roll_backs: Positive = 3
    """Number of returns to the same checkpoint; one more bad iteration stops the run."""
    skip_iterations: list[Positive] = field(default_factory=list)
    """Iterations to skip: their samples are consumed, but nothing is computed or updated. For skipping a bad step by hand."""
    watchdog_seconds: NotNegativeFloat = 300.0
    """Seconds without progress after which the run names the rank that hangs, and where, and ends. 0 switches this off.
    Building, saving and loading may take as long as parallel.distributed_timeout_minutes allows."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Intervals and retention of checkpoints, which are always in checkpoints/ in the run folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    save_interval: Positive = 1000
    """Iterations between two checkpoints. The run also saves after its last iteration and when it is stopped by a signal."""
    async_save: bool = True
    """Write checkpoints in a separate process while training continues. The host keeps a copy of the state in memory
    until the write is done."""
    keep_last: Positive | None = 5
    """Number of newest checkpoints to keep; null keeps all. The checkpoint before each of the two newest bad steps is kept as
    well. With 1, a damaged checkpoint cannot be replaced by an older one. A run that kept all so far still does
    so with the default."""
    keep_interval: Positive | None = None
    """Also keep every checkpoint at a multiple of this many iterations, a multiple of save_interval. Needs keep_last.
    Default: none."""
    mirror: str | None = None
    """Address at which each finished checkpoint is copied in the background, such as s3://bucket/run or a folder on another
    disk; one address for each run. A start without checkpoints in the run folder continues from there. Default: no copies."""
    mirror_keep_last: Positive | None = 3
    """Number of newest checkpoints to keep at the mirror. null keeps all."""
    mirror_keep_interval: Positive | None = None
    """Also keep every checkpoint at a multiple of this many iterations at the mirror. Needs mirror_keep_last. Default: none."""
    mirror_wait_seconds: NotNegative = 300
    """Seconds that the end of a run waits for the copy of its last checkpoint; fewer after SIGTERM and near the end of a SLURM
    job. The log names what is not copied."""
    verify_on_load: bool = True
    """Compare the sha256 of every file before a run resumes; each rank checks a part of the files. File sizes are always
    compared."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Metrics, their destinations, and the profiler."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    log_interval: Positive = 10
    """Iterations between two records in metrics.jsonl and in the log."""
    tensorboard: bool = True
    """Write TensorBoard events into tensorboard/ in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to. Default: Weights & Biases is not used."""
    wandb_mode: Literal["online", "offline"] | None = None
    """online: send records at once; offline: keep them in wandb/ in the run folder for `wandb sync`. Default: as wandb's
    environment variables say."""
    mlflow_experiment: str | None = None
    """MLflow experiment to log to; needs the extra `mlflow`. Default: MLflow is not used."""
    mlflow_uri: str | None = None
    """Address of the MLflow server or store, such as http://mlflow:5000. Default: MLFLOW_TRACKING_URI of the environment."""
    otlp_endpoint: str | None = None
    """Address of an OpenTelemetry collector that takes metrics over HTTP, such as http://collector:4318; needs the extra
    `otlp`. Default: OpenTelemetry is not used."""
    profile_start: Positive | None = None
    """First iteration that torch's profiler records, into profile/ in the run folder. Default: no profile."""
    profile_stop: Positive | None = None
    """Last iteration that the profiler records. Default: profile_start."""
    profile_ranks: list[NotNegative] = field(default_factory=lambda: [0])
    """Ranks that record a profile."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in 1e12 FLOP/s, for the MFU (model FLOP/s utilization). Default: a known value for the GPU;
    measured on a CPU or an unknown GPU."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run_dir: str
    """Folder of the run, with config.yaml, metrics.jsonl, tensorboard/ and checkpoints/. If it contains a run, that run
    resumes."""
    init_from: str | None = None
    """Run folder, or one of its checkpoints, with whose weights a new run starts; of a run folder, the latest checkpoint.
    The run resumes from its own checkpoints as soon as it has one. Default: random initial weights."""
    init_state: Literal["weights", "optimizer", "all"] = "weights"
    """State to take from init_from. weights: the weights; optimizer: also moments, fp32 weights and number of updates of
    the optimizer; all: also the position in data and schedule, so that the run continues the other one's iterations."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
