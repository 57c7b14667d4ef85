"""Rows of the dry run about model, batch, length, compute and operation."""

from collections.abc import Iterator

from megatron_ledom.config.derived import (
    has_validation,
    head_dim,
    lr_decay_iters,
    num_microbatches,
    padded_vocab_size,
    query_groups,
    tokens_per_iteration,
    total_tokens,
    train_samples,
    validation_iterations,
)
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token
from megatron_ledom.planner.plan import CHECKPOINT_BYTES

Row = tuple[str, str]


def model_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Shape, vocabulary, parameters."""
    yield "layers", f"{model.num_layers:,}"
    yield "heads x width", f"{model.num_attention_heads} x {head_dim(model)}, {query_groups(model)} key-value heads"
    if model.vocab_size is None:
        yield "vocabulary", "read from the shards, which are not there yet; set model.vocab_size to plan without them"
        return
    padded = padded_rows(model)
    parameters = count_parameters(model, padded)
    yield "padded vocabulary", f"{padded:,} rows for {model.vocab_size:,} ids"
    yield "parameters", f"{scaled(parameters)} ({parameters:,})"
    yield "context", f"{config.data.seq_length:,} tokens, {config.data.direction}"


def batch_rows(config: RunConfig, world_size: int) -> Iterator[Row]:
    """How the global batch is divided."""
    train, length = config.train, config.data.seq_length
    count = num_microbatches(config, world_size)
    yield (
        "micro-batch",
        f"{train.micro_batch_size:,} {'sample' if train.micro_batch_size == 1 else 'samples'}, {train.micro_batch_size * length:,} tokens",
    )
    yield "micro-batches", f"{count:,} an iteration"
    yield "samples a rank", f"{count * train.micro_batch_size:,} an iteration"
    yield "global batch", f"{train.global_batch_size:,} samples, {tokens_per_iteration(config):,} tokens"


def run_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Length, schedule, checkpoints and validations."""
    settings, tokens = config.optimizer, tokens_per_iteration(config)
    yield "iterations", f"{config.train.train_iters:,}"
    yield "samples", f"{train_samples(config):,}"
    yield "tokens", f"{scaled(total_tokens(config))} ({total_tokens(config):,})"
    yield "warm-up", f"{settings.lr_warmup_iters:,} iterations, {scaled(settings.lr_warmup_iters * tokens)} tokens"
    if settings.lr_decay_style == "constant":
        yield "learning rate", f"{settings.lr:g}, constant"
    else:
        yield "learning rate", f"{settings.lr:g} -> {settings.min_lr:g} {_decay_in_words(config)}"
    if config.train.z_loss_coeff:
        yield "z-loss", f"{config.train.z_loss_coeff:g} (log Z)^2"
    yield "checkpoints", _checkpoints(config, model)
    if has_validation(config.data):
        samples = config.train.eval_iters * config.train.global_batch_size
        yield "validations", f"{validation_iterations(config):,}, {samples:,} samples of each set at most"
    else:
        yield "validations", "none: data.valid_blend, data.valid_sets and data.split are empty"


def _decay_in_words(config: RunConfig) -> str:
    settings, end = config.optimizer, lr_decay_iters(config)
    if settings.lr_decay_style == "WSD":
        assert settings.lr_wsd_decay_iters is not None
        return f"{settings.lr_wsd_decay_style} from iteration {end - settings.lr_wsd_decay_iters:,} to {end:,}, stable before"
    return f"{settings.lr_decay_style} until iteration {end:,}"


def _checkpoints(config: RunConfig, model: ModelConfig) -> str:
    """How many are written, how large, and which are kept."""
    settings = config.checkpoint
    words = [f"{-(-config.train.train_iters // settings.save_interval):,}"]
    if model.vocab_size is not None:
        words.append(f"about {state_bytes_of_checkpoint(model) / 2**30:,.2f} GiB each")
    words.append("written while training goes on" if settings.async_save else "training waits for them")
    if settings.keep_last is not None:
        multiples = f" and those at multiples of {settings.keep_interval:,}" if settings.keep_interval else ""
        words.append(f"the newest {settings.keep_last:,}{multiples} kept")
    return ", ".join(words)


def state_bytes_of_checkpoint(model: ModelConfig) -> int:
    """Bytes of one checkpoint; the vocabulary must be known."""
    element = 2 if model.params_dtype == "bf16" else 4
    return count_parameters(model, padded_rows(model)) * CHECKPOINT_BYTES[element]


def compute_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Floating-point operations."""
    if model.vocab_size is None:
        yield "FLOPs", "not known without the vocabulary"
        return
    each = flops_per_token(model, config.data.seq_length, padded_rows(model))
    yield "FLOPs a token", f"{each / 1e9:,.4g} GFLOP (forward and backward, full attention)"
    yield "FLOPs an iteration", f"{each * tokens_per_iteration(config):.4g}"
    yield "FLOPs of the run", f"{each * total_tokens(config):.4g}"


def operation_rows(config: RunConfig) -> Iterator[Row]:
    """What happens when something goes wrong, and what is recorded."""
    train, logs = config.train, config.logging
    yield "loss not finite", train.on_nonfinite.replace("_", " ")
    yield (
        "spike",
        f"{train.on_spike.replace('_', ' ')}, from {train.spike_score:g} deviations above {train.spike_window} iterations",
    )
    yield "limits", f"{train.max_skips} skips in a row, {train.max_roll_backs} returns to a checkpoint"
    if train.skip_iterations:
        yield "left out", f"iterations {', '.join(map(str, train.skip_iterations))}"
    if train.watchdog_seconds:
        yield "watchdog", f"{train.watchdog_seconds:g} s without progress end the run"
    else:
        yield "watchdog", "off"
    boards = ["metrics.jsonl", *(["TensorBoard"] if logs.tensorboard else [])]
    boards += [f"Weights & Biases ({logs.wandb_project})"] if logs.wandb_project else []
    yield "metrics", f"{', '.join(boards)}, every {logs.log_interval:,} iterations"
    if logs.profile_start is not None:
        ranks = ", ".join(map(str, logs.profile_ranks))
        yield "profile", f"iterations {logs.profile_start:,} to {logs.profile_stop or logs.profile_start:,} on ranks {ranks}"


def padded_rows(model: ModelConfig) -> int:
    """Rows of the embedding; the vocabulary must be known."""
    assert model.vocab_size is not None
    return padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)


def scaled_bytes(number: float) -> str:
    """`10.3 TiB`, `101.6 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = min(len(units) - 1, max(0, int(number).bit_length() - 1) // 10)
    return f"{number / 1024**power:,.{1 if power else 0}f} {units[power]}"


def scaled(number: float) -> str:
    """A large number to four or five digits: `7.794 B`, `435.37 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled >= 100 else 3}f} {unit}"
    return f"{number:,.0f}"
