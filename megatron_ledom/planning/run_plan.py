"""Verdicts on a planned run before it starts: is the memory of its devices enough, and the disk for its checkpoints.

The planner's figures are estimates; a verdict against a run can therefore be overruled (`--accept-plan`).

Rows of the dry run about model, batch, length, compute and operation.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_ledom.checkpoint.folder import finished_checkpoints
from megatron_ledom.config.derived import (
    checkpoint_folder,
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
from megatron_ledom.errors import PlanError
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import CHECKPOINT_BYTES, Plan, make_plan

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


ACCEPT = "--accept-plan"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line on what a run needs and what is there."""

    subject: str
    text: str
    holds: bool = True
    remedy: str = ""
    is_estimate: bool = True
    """Else a start would refuse the same, and nobody can accept it."""

    def line(self) -> str:
        """Such as `memory: NO: ...`."""
        return f"{self.subject}: {'' if self.holds else 'NO: '}{self.text}"


def planned(config: RunConfig, world_size: int, model: ModelConfig) -> Plan | None:
    """The plan on the configured hardware; None where that, or the vocabulary, is not known."""
    if config.parallel.hardware is None or model.vocab_size is None:
        return None
    return make_plan(replace(config, model=model), world_size, load_hardware(config.parallel.hardware))


def memory_verdict(config: RunConfig, plan: Plan | None) -> Verdict:
    """The fullest stage against the memory of a device."""
    if plan is None:
        known = "parallel.hardware is not set" if config.parallel.hardware is None else "the vocabulary is not known yet"
        return Verdict("memory", f"not planned: {known}")
    stage = max(plan.stages, key=plan.stage_gib).stage
    text = f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB a device of {plan.hardware.name} on stage {stage}"
    remedy = "recompute more, or spread it over more devices (tools/plan_run.py --search finds a layout)"
    return Verdict("memory", text, plan.fits, remedy)


def disk_verdict(config: RunConfig, model: ModelConfig) -> Verdict:
    """The checkpoints that are still to come against the free disk of the run folder, as this machine sees it."""
    if model.vocab_size is None:
        return Verdict("disk", "not planned: the vocabulary is not known yet")
    folder = checkpoint_folder(config)
    each, count = state_bytes_of_checkpoint(model), checkpoints_to_come(config, list(finished_checkpoints(folder)))
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    kept = "all are kept" if config.checkpoint.keep_last is None else f"checkpoint.keep_last={config.checkpoint.keep_last}"
    text = (
        f"{count:,} more checkpoints of {scaled_bytes(each)} at one time ({kept}) need {scaled_bytes(count * each)},"
        f" {scaled_bytes(free)} are free in {place}"
    )
    remedy = "set checkpoint.keep_last (with checkpoint.keep_interval), save less often, or set run_dir to a larger disk"
    return Verdict("disk", text, count * each <= free, remedy)


def checkpoints_to_come(config: RunConfig, there: Sequence[int]) -> int:
    """How many more checkpoints than those of the iterations `there` lie on the disk at one time, until the run is complete.

    An outdated one goes after its follower is whole, hence one more than are kept.
    """
    settings, last = config.checkpoint, max(there, default=0)
    every, end = settings.save_interval, config.train.train_iters
    saved = [*range((last // every + 1) * every, end, every), *([end] if end > last else [])]
    if settings.keep_last is None:
        return len(saved)
    most = settings.keep_last + 1
    for_ever = saved[:-most] if settings.keep_interval else []
    kept = sum(1 for iteration in for_ever if iteration % (settings.keep_interval or 1) == 0)
    return min(len(saved), max(1, most - len(there)) + kept)


def refuse(verdicts: Sequence[Verdict], *, accepted: bool) -> None:
    """Raise PlanError with every verdict against the run, unless it was accepted as it is."""
    against = [verdict for verdict in verdicts if not verdict.holds and not (accepted and verdict.is_estimate)]
    if against:
        faults = "; ".join(f"{verdict.line()}: {verdict.remedy}" for verdict in against)
        accept = f"; or accept it with {ACCEPT}" if any(verdict.is_estimate for verdict in against) else ""
        raise PlanError(faults + accept)


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
