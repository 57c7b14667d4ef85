"""Search over all layouts of a number of devices: by the rules of the config, then memory, then time."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_ledom.config.batch_schedule import has_batch_schedule
from megatron_ledom.config.checks import RULES, WORLD_RULES, divisors
from megatron_ledom.config.derived import train_samples
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError
from megatron_ledom.planning.hardware import Hardware
from megatron_ledom.planning.memory import GIB, counting_for, stage_memory
from megatron_ledom.planning.plan import Plan, make_plan, name_layout
from megatron_ledom.planning.shapes import Architecture, Layout, architecture_of, layout_of
from megatron_ledom.planning.step_time import Software, data_comm_seconds, optimizer_seconds, pass_times
from megatron_ledom.tables import aligned_lines

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTES: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    {
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp"],
        "recompute_method": None,
        "recompute_num_layers": None,
    },
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
"""Recompute settings, from least to most. core_attn alone is omitted: with flash attention it saves next to nothing."""
SIMULATED = 24
"""Number of layouts with a simulated schedule: the fastest by their bound."""
MOST_DEVICES = 16_384
"""Largest number of devices that the search suggests."""


@dataclass(frozen=True, slots=True)
class RejectedLayout:
    """A layout, or a group of layouts, with the reason against it."""

    layout: str
    kind: str
    """rule, memory or spare."""
    reason: str
    needed_gib: float = 0.0


@dataclass(frozen=True, slots=True)
class UsableLayout:
    """A layout that keeps the rules and fits into memory."""

    config: RunConfig
    layout: Layout
    bound: float
    """Seconds of an iteration by the formula of the bubble, without simulation, on average over the run."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search."""

    ranked: list[tuple[RunConfig, Plan]]
    """Fastest first, with simulated schedules."""
    slower: list[UsableLayout]
    """The other layouts that fit; their bounds are larger."""
    rejected: list[RejectedLayout]

    @property
    def num_layouts(self) -> int:
        """Number of layouts that the search tried."""
        return len(self.ranked) + len(self.slower) + len(self.rejected)


def search(config: RunConfig, num_devices: int, hardware: Hardware) -> SearchResult:
    """Rank the layouts of `num_devices`. Raises ConfigError, with suggestions, if none works."""
    usable, rejected = try_layouts(config, num_devices, hardware)
    if not usable:
        raise ConfigError(no_layout_message(config, num_devices, hardware, rejected))
    usable.sort(key=lambda layout: layout.bound)
    plans = [(one.config, make_plan(one.config, num_devices, hardware)) for one in usable[:SIMULATED]]
    plans.sort(key=lambda pair: _rank(pair[1]))
    return SearchResult(plans, usable[SIMULATED:], rejected)


def _rank(plan: Plan) -> tuple[float, int, int, int]:
    """Return the sort key: fastest first; of times within half a per cent, the simplest layout first."""
    layout = plan.layout
    return (
        round(math.log(plan.mean_seconds) / 0.005),
        layout.context,
        layout.pipeline * layout.chunks,
        -layout.sequence_parallel,
    )


def try_layouts(
    config: RunConfig, num_devices: int, hardware: Hardware, *, first_only: bool = False
) -> tuple[list[UsableLayout], list[RejectedLayout]]:
    """Return the usable layouts, with the least recompute that fits, and the rejected ones.

    first_only: stop at the first usable layout.
    """
    model = architecture_of(config.model)
    usable: list[UsableLayout] = []
    rejected: list[RejectedLayout] = []
    for name, shape in shapes(config, num_devices, hardware):
        problems = rule_problems(shape, num_devices)
        if problems and rule_problems(with_batch(shape, 1, 1), num_devices) == problems:  # no variant can keep these rules
            rejected.append(RejectedLayout(name, "rule", problems[0]))
            continue
        for variant in variants(shape):
            found = try_layout(model, variant, num_devices, hardware, rejected)
            usable += [found] if found else []
            if found and first_only:
                return usable, rejected
    return usable, rejected


def shapes(config: RunConfig, num_devices: int, hardware: Hardware) -> Iterator[tuple[str, RunConfig]]:
    """Yield all factorings into tensor x pipeline x context x data, with tensor-parallel groups inside a node."""
    for tensor in divisors(num_devices):
        if tensor > hardware.gpus_per_node:
            break
        for pipeline in divisors(num_devices // tensor):
            if pipeline > config.model.num_layers:
                break
            for context in divisors(num_devices // (tensor * pipeline)):
                data = num_devices // (tensor * pipeline * context)
                spreads = data * context > 1
                # of Muon's matrices megatron-core can give each to one rank in bf16 only
                splits = spreads and (config.optimizer.optimizer != "muon" or config.model.params_dtype == "bf16")
                parallel = replace(
                    config.parallel,
                    world_size=num_devices,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=None,
                    context_parallel_size=context,
                    sequence_parallel=False,
                    tp_comm_overlap=False,
                    use_distributed_optimizer=splits,
                    overlap_grad_reduce=spreads,
                    overlap_param_gather=splits,
                    bucket_size=config.parallel.bucket_size if spreads else None,
                    **RECOMPUTES[0],
                )
                name = f"TP {tensor}, PP {pipeline}, CP {context}, DP {data}"
                yield name, with_batch(replace(config, parallel=parallel), 1, None)


def variants(shape: RunConfig) -> Iterator[RunConfig]:
    """Yield a shape with and without sequence parallelism, with every number of chunks and every micro-batch size."""
    parallel = shape.parallel
    stages = parallel.pipeline_model_parallel_size
    layers = shape.model.num_layers // stages
    chunks = [None, *divisors(layers)[1:]] if stages > 1 else [None]
    for spread in (True, False) if parallel.tensor_model_parallel_size > 1 else (False,):
        for count in chunks:
            changed = replace(parallel, sequence_parallel=spread, virtual_pipeline_model_parallel_size=count)
            for size in MICRO_BATCHES:
                yield with_batch(replace(shape, parallel=changed), size, None)


def with_batch(config: RunConfig, micro_batch_size: int, global_batch_size: int | None) -> RunConfig:
    """Return the config with another micro-batch size, and another global batch size unless it is None."""
    train = replace(config.train, micro_batch_size=micro_batch_size)
    return replace(config, train=train if global_batch_size is None else replace(train, global_batch_size=global_batch_size))


def rule_problems(config: RunConfig, world_size: int) -> list[str]:
    """Return the problems that the rules of `config/checks.py` find in a layout."""
    problems = [problem for rule in RULES for problem in rule(config)]
    return problems or [problem for rule in WORLD_RULES for problem in rule(config, world_size)]


def try_layout(
    model: Architecture, config: RunConfig, num_devices: int, hardware: Hardware, rejected: list[RejectedLayout]
) -> UsableLayout | None:
    """Return a variant with the least recompute that fits, None if none does. Appends what does not work to `rejected`."""
    problems = rule_problems(config, num_devices)
    if problems:
        rejected.append(RejectedLayout(name_config(config, num_devices), "rule", problems[0]))
        return None
    for index, recompute in enumerate(RECOMPUTES):
        tried = replace(config, parallel=replace(config.parallel, **recompute))
        layout = layout_of(tried, num_devices)
        needed = needed_gib(model, layout, hardware)
        if needed <= hardware.memory_gib:
            more = [replace(config, parallel=replace(config.parallel, **other)) for other in RECOMPUTES[index + 1 :]]
            reason = f"recomputes more than needed: {name_layout(layout)} fits"
            rejected += [RejectedLayout(name_layout(layout_of(one, num_devices)), "spare", reason) for one in more]
            return UsableLayout(tried, layout, time_bound(model, layout, hardware, mean_microbatches(config, layout)))
        reason = f"needs {needed:.1f} GiB of {hardware.memory_gib:g}"
        rejected.append(RejectedLayout(name_layout(layout), "memory", reason, needed))
    return None


def name_config(config: RunConfig, num_devices: int) -> str:
    """Return the name of a layout that breaks rules, from which `layout_of` cannot derive everything."""
    parallel = config.parallel
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    return (
        f"TP {parallel.tensor_model_parallel_size}{'+SP' if parallel.sequence_parallel else ''}, PP"
        f" {parallel.pipeline_model_parallel_size}{f' x {chunks}' if chunks else ''}, CP {parallel.context_parallel_size}, DP"
        f" {num_devices // copy}, micro-batch {config.train.micro_batch_size}"
    )


def needed_gib(model: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Return the memory of the fullest stage in GiB: one of the first two or the last."""
    most = 0.0
    for stage in {0, min(1, layout.pipeline - 1), layout.pipeline - 1}:
        memory = stage_memory(model, layout, stage, counting_for(model, layout, hardware.is_cpu))
        allowance = hardware.allowance(memory.activations + memory.logits + memory.working)
        most = max(most, (memory.allocated + allowance) / GIB)
    return most


def mean_microbatches(config: RunConfig, layout: Layout) -> float:
    """Return the micro-batches of a rank in an iteration, on average over the run."""
    if not has_batch_schedule(config):
        return layout.num_microbatches
    return train_samples(config) / config.train.train_iters / (layout.micro_batch_size * layout.data)


def time_bound(model: Architecture, layout: Layout, hardware: Hardware, num_microbatches: float) -> float:
    """Return the seconds of an iteration without simulation, with a bubble of (stages - 1) / chunks passes of the slowest stage."""
    times, _ = pass_times(model, layout, hardware, Software())
    slowest = max(sum(forward) + sum(backward) for forward, backward in zip(times.forward, times.backward, strict=True))
    rounds = num_microbatches + (layout.pipeline - 1) / layout.chunks
    data = data_comm_seconds(model, layout, hardware, times)
    return rounds * slowest + data + optimizer_seconds(model, layout, hardware) + hardware.iteration_ms * 1e-3


def no_layout_message(config: RunConfig, num_devices: int, hardware: Hardware, rejected: list[RejectedLayout]) -> str:
    """Return the error message of a search without a usable layout, with suggestions."""
    too_large = [one for one in rejected if one.kind == "memory"]
    if not too_large:
        reason = Counter(one.reason for one in rejected).most_common(1)[0][0]
        return f"no layout of {num_devices} devices keeps the rules. Most frequent reason: {reason}; {_other_numbers(config, num_devices, hardware)}"
    least = min(too_large, key=lambda one: one.needed_gib)
    return (
        f"no layout of {num_devices} devices fits {hardware.memory_gib:g} GiB: the smallest needs {least.needed_gib:.1f} GiB:"
        f" {least.layout}; {_more_devices(config, num_devices, hardware)}, or choose devices with more memory, a shorter"
        " data.seq_length or a smaller model"
    )


def _more_devices(config: RunConfig, num_devices: int, hardware: Hardware) -> str:
    count = 2 * num_devices
    while count <= MOST_DEVICES:
        usable, _ = try_layouts(config, count, hardware, first_only=True)
        if usable:
            return f"it fits on {count} devices ({name_layout(usable[0].layout)})"
        count *= 2
    return f"it does not fit on up to {MOST_DEVICES:,} devices with train.global_batch_size={config.train.global_batch_size:,} either"


def _other_numbers(config: RunConfig, num_devices: int, hardware: Hardware) -> str:
    """Suggest the next smaller and the next larger number of devices for which a layout keeps the rules."""
    near = []
    for numbers in (range(num_devices - 1, 0, -1), range(num_devices + 1, 2 * num_devices + 1)):
        works = (count for count in numbers if any(not rule_problems(one, count) for _, one in shapes(config, count, hardware)))
        near += [str(count) for count in (next(works, None),) if count is not None]
    return f"numbers that work: {' or '.join(near)}" if near else "no number near it works either"


def describe_search(result: SearchResult, most: int = 10) -> str:
    """Return the ranked layouts as text, then the number of rejected layouts by reason."""
    rows = [("rank", "s/iteration", "MFU", "GiB", "layout")]
    for index, (_, plan) in enumerate(result.ranked[:most], 1):
        rows.append(
            (str(index), f"{plan.mean_seconds:.2f}", f"{plan.mean_mfu:.1%}", f"{plan.needed_gib:.1f}", name_layout(plan.layout))
        )
    lines = aligned_lines(rows, "rrrrl")
    fitting = len(result.ranked) + len(result.slower)
    lines += ["", "layouts whose times differ by less than half a per cent: simplest first"]
    lines += [f"{result.num_layouts:,} layouts: {fitting:,} work, {len(result.rejected):,} do not"]
    words = {"rule": "break a rule", "memory": "do not fit", "spare": "recompute more than needed"}
    for kind, text in words.items():
        of_kind = [one for one in result.rejected if one.kind == kind]
        if of_kind:
            lines.append(f"  {len(of_kind):,} {text}, such as {of_kind[0].layout}: {of_kind[0].reason}")
    return "\n".join(lines)


def table_of(result: SearchResult) -> str:
    """Return all layouts as tab-separated lines, with seconds and GiB, or the reason against the layout."""
    lines = ["layout\tverdict\tseconds\tGiB\treason"]
    for _, plan in result.ranked:
        lines.append(f"{name_layout(plan.layout)}\tworks\t{plan.mean_seconds:.4f}\t{plan.needed_gib:.2f}\t")
    lines += [f"{name_layout(one.layout)}\tworks\t{one.bound:.4f}\t\tby the formula of the bubble" for one in result.slower]
    for one in result.rejected:
        needed = f"{one.needed_gib:.2f}" if one.needed_gib else ""
        lines.append(f"{one.layout}\t{one.kind}\t\t{needed}\t{one.reason}")
    return "\n".join(lines) + "\n"
