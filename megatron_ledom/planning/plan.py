"""The plan of one run: memory of every stage, seconds of an iteration, and duration and cost of the run."""

from dataclasses import dataclass

from megatron_ledom.config.batch_schedule import BatchPhase, batch_phases
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import num_microbatches, total_tokens
from megatron_ledom.config.schema import ModelConfig, OptimizerSettings, RunConfig
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token, model_flops_utilisation
from megatron_ledom.planning.hardware import Hardware
from megatron_ledom.planning.memory import (
    EMA_BYTES,
    GIB,
    StageMemory,
    all_stages,
    counting_for,
    muon_parameters,
    stage_parameters,
)
from megatron_ledom.planning.shapes import Architecture, Layout, Muon, architecture_of, layout_of
from megatron_ledom.planning.step_time import Software, StepTime, step_time

CHECKPOINT_BYTES = {2: 14, 4: 12}
"""Bytes per parameter in a checkpoint, by bytes per element: weight and AdamW's moments; for bf16 also the fp32 weight."""


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """Iterations of one global batch size, with their predicted time."""

    batch: BatchPhase
    num_microbatches: int
    seconds: float
    """Of one iteration."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted memory, time and cost of a run. Seconds are the middle of an interval of `hardware.uncertainty`."""

    model: Architecture
    layout: Layout
    """In iterations of the largest global batch, which needs the most memory; so are `stages` and `time`."""
    hardware: Hardware
    stages: list[StageMemory]
    time: StepTime
    parameters: int
    flops_per_token: float
    train_iters: int
    tokens: int
    phases: list[PlannedPhase]
    """One for each global batch size of the run, in order."""

    @property
    def needed_gib(self) -> float:
        """Memory of a device of the fullest stage, in GiB, with the allowance for allocator, CUDA and NCCL."""
        return max(self.stage_gib(stage) for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Return True if the fullest stage fits into the memory of a device."""
        return self.needed_gib <= self.hardware.memory_gib

    @property
    def interval(self) -> tuple[float, float]:
        """Shortest and longest expected seconds of an iteration."""
        return self.time.total * (1 - self.hardware.uncertainty), self.time.total * (1 + self.hardware.uncertainty)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Throughput of one device, in tokens per second."""
        return self.layout.tokens_per_iteration / self.time.total / self.layout.num_ranks

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation, as a fraction; the formula is that of every MFU in this package."""
        return model_flops_utilisation(self.tokens_per_second_per_device * self.flops_per_token, self.hardware.peak_tflops)

    @property
    def seconds(self) -> float:
        """Seconds of all iterations, without validations and waits for checkpoints."""
        if len(self.phases) == 1:
            return self.train_iters * self.time.total
        return sum(phase.batch.num_iterations * phase.seconds for phase in self.phases)

    @property
    def mean_seconds(self) -> float:
        """Seconds of an iteration, on average over the run."""
        return self.time.total if len(self.phases) == 1 else self.seconds / self.train_iters

    @property
    def mean_mfu(self) -> float:
        """Model FLOP utilisation on average over the run, as a fraction."""
        if len(self.phases) == 1:
            return self.mfu
        rate = self.tokens / self.seconds / self.layout.num_ranks
        return model_flops_utilisation(rate * self.flops_per_token, self.hardware.peak_tflops)

    @property
    def device_hours(self) -> float:
        """Number of devices times hours of the run."""
        return self.layout.num_ranks * self.seconds / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint, in bytes."""
        return _checkpoint_bytes(self.model, self.parameters, is_muon=self.layout.muon is not None, ema=self.layout.ema)

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds to write one checkpoint, all nodes at once."""
        nodes = -(-self.layout.num_ranks // self.hardware.gpus_per_node)
        return self.checkpoint_bytes / (nodes * self.hardware.storage_gb_per_second * 1e9)

    def stage_gib(self, stage: StageMemory) -> float:
        """Return the memory of a device of a stage, in GiB, with the allowance."""
        return (stage.allocated + self.hardware.allowance(stage.activations + stage.logits + stage.working)) / GIB


def make_plan(config: RunConfig, world_size: int, hardware: Hardware, software: Software | None = None) -> Plan:
    """Return the plan of a configured run. Raises ConfigError if the run cannot work on `world_size` ranks."""
    check_config(config, world_size)
    model, layout = architecture_of(config.model), layout_of(config, world_size)
    time = step_time(model, layout, hardware, software)
    counts = [(phase, num_microbatches(config, world_size, phase.global_batch_size)) for phase in batch_phases(config)]
    return Plan(
        model=model,
        layout=layout,
        hardware=hardware,
        stages=all_stages(model, layout, counting_for(model, layout, hardware.is_cpu)),
        time=time,
        parameters=count_parameters(config.model, model.padded_vocab_size),
        flops_per_token=flops_per_token(config.model, config.data.seq_length, model.padded_vocab_size),
        train_iters=config.train.train_iters,
        tokens=total_tokens(config),
        phases=[PlannedPhase(phase, count, time.total_of(count)) for phase, count in counts],
    )


def bytes_of_checkpoint(model: ModelConfig, optimizer: OptimizerSettings) -> int:
    """Return the bytes of one checkpoint of a configured model. The vocabulary size must be known."""
    shape = architecture_of(model)
    parameters = count_parameters(model, shape.padded_vocab_size)
    return _checkpoint_bytes(shape, parameters, is_muon=optimizer.optimizer == "muon", ema=optimizer.ema_decay is not None)


def _checkpoint_bytes(model: Architecture, parameters: int, *, is_muon: bool, ema: bool) -> int:
    """Return the bytes of one checkpoint: Muon has one momentum of the matrices of the layers instead of two moments."""
    whole = Layout(seq_length=1, micro_batch_size=1, num_microbatches=1, muon=Muon() if is_muon else None)
    each = CHECKPOINT_BYTES[model.element_bytes] + (EMA_BYTES if ema else 0)
    return parameters * each - 4 * muon_parameters(whole, stage_parameters(model, whole, 0))


def name_layout(layout: Layout) -> str:
    """Return the name of a layout, such as `TP 2+SP, PP 4 x 2, DP 8, micro-batch 1, full recompute`."""
    parts = [f"TP {layout.tensor}{'+SP' if layout.sequence_parallel else ''}"]
    if layout.pipeline > 1:
        parts.append(f"PP {layout.pipeline}{f' x {layout.chunks}' if layout.chunks > 1 else ''}")
    parts += [f"CP {layout.context}"] if layout.context > 1 else []
    parts += [f"DP {layout.data}", f"micro-batch {layout.micro_batch_size}", name_recompute(layout)]
    return ", ".join(parts)


def name_recompute(layout: Layout) -> str:
    """Return the name of the recompute setting, such as `no recompute`, `recompute mlp` or `full recompute`."""
    if layout.recompute is None:
        return "no recompute"
    if layout.recompute == "selective":
        return f"recompute {'+'.join(layout.recompute_modules)}"
    if layout.recompute_method == "block":
        return f"full recompute of {layout.recompute_num_layers} layers a chunk"
    return "full recompute"
