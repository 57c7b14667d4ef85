"""What a run would do, without a GPU, data or torch: verdicts, the resolved configuration and every number that follows from it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import named_blends, total_tokens
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.data.blend_plan import PlannedSource, describe_sources, planned_sources
from megatron_ledom.data.manifest_checks import check_manifests
from megatron_ledom.data.shard import ShardManifest, load_manifest
from megatron_ledom.data.splits import split_shard
from megatron_ledom.planner.hardware import load_hardware
from megatron_ledom.planner.plan import Plan
from megatron_ledom.planner.text import summary_rows
from megatron_ledom.training.plan_engine import engine_rows
from megatron_ledom.training.plan_layout import layout_rows, parameter_lines, rank_lines
from megatron_ledom.training.plan_run import Row, batch_rows, compute_rows, model_rows, operation_rows, run_rows
from megatron_ledom.training.plan_verdicts import Verdict, disk_verdict, memory_verdict, planned


@dataclass(frozen=True, slots=True)
class DryRun:
    """A run as it would be."""

    text: str
    verdicts: list[Verdict]
    """They stand at the top of the text too."""


def dry_run(config: RunConfig, world_size: int) -> DryRun:
    """Verdicts as comments, the resolved run as YAML, then its derived numbers and its blend as tables.

    The manifests of shards are read if they are there. Raises ConfigError when the run cannot work on `world_size` ranks, and
    what a start would raise on these manifests.
    """
    check_config(config, world_size)
    manifests = stored_manifests(config)
    if manifests:
        check_manifests(config, manifests)
    model = known_model(config, manifests)
    plan, sources = planned(config, world_size, model), _planned_sources(config, manifests)
    verdicts = [memory_verdict(config, plan), _disk_of_another_machine(disk_verdict(config, model)), *_repeats(config, sources)]
    top = "".join(f"# {verdict.line()}\n" for verdict in verdicts)
    tables = _tables(config, world_size, model, plan)
    tables.append(_titled("training data", _blend_lines(config, sources)))
    return DryRun(top + "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n", verdicts)


def _tables(config: RunConfig, world_size: int, model: ModelConfig, plan: Plan | None) -> list[str]:
    groups = {
        "model": list(model_rows(config, model)),
        "layout": list(layout_rows(config, world_size, model)),
        "engine": list(engine_rows(config)),
        "batch": list(batch_rows(config, world_size)),
        "run": list(run_rows(config, model)),
        "compute": list(compute_rows(config, model)),
        "plan": list(_plan_rows(config, plan)),
        "operation": list(operation_rows(config)),
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    tables = [_titled(title, [f"{name:<{width}}  {value}" for name, value in rows]) for title, rows in groups.items()]
    return [
        *tables,
        _titled("ranks", rank_lines(config, world_size)),
        _titled("parameters of a rank", parameter_lines(config, model)),
    ]


def describe_run(config: RunConfig, world_size: int) -> str:
    """The text of `dry_run`."""
    return dry_run(config, world_size).text


def _disk_of_another_machine(verdict: Verdict) -> Verdict:
    """A dry run may be far from the run's disk: it tells, and leaves the refusal to --check."""
    return (
        verdict
        if verdict.holds
        else replace(verdict, text=f"{verdict.text}: too little, if that is the run's disk", holds=True)
    )


def known_model(config: RunConfig, manifests: dict[str, ShardManifest]) -> ModelConfig:
    """The model with the vocabulary of the shards, where the config leaves it to them and they are there."""
    if config.model.vocab_size is not None or not manifests:
        return config.model
    return replace(config.model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)


def _plan_rows(config: RunConfig, plan: Plan | None) -> Iterator[Row]:
    """What the planner says for the configured hardware."""
    if config.parallel.hardware is None:
        yield "hardware", "not named: parallel.hardware, or tools/plan_run.py --hardware, plans memory and time"
    elif plan is None:
        yield "hardware", f"{load_hardware(config.parallel.hardware).name}; no plan without the vocabulary"
    else:
        yield from summary_rows(plan)


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])


def _planned_sources(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[PlannedSource]:
    """What the run draws from each shard of its blend."""
    blend = config.data.train_blend
    if not blend:
        return []
    sizes = {prefix: _train_tokens(config, prefix, manifests.get(prefix)) for _, prefix in blend}
    return list(planned_sources(sizes, [weight for weight, _ in blend], total_tokens(config), config.data.seq_length))


def _repeats(config: RunConfig, sources: list[PlannedSource]) -> list[Verdict]:
    """The verdict on shards that would be read more than once without leave."""
    repeated = [source for source in sources if source.repeats]
    if not repeated or config.data.allow_repeats:
        return []
    worst = max(repeated, key=lambda source: source.epochs or 0.0)
    text = f"{len(repeated)} would repeat, {worst.name} most: such a run is refused without data.allow_repeats=true"
    remedy = "add shards, or lower train.train_iters or the weight in data.train_blend"
    return [Verdict("data", text, False, remedy, is_estimate=False)]


def _blend_lines(config: RunConfig, sources: list[PlannedSource]) -> list[str]:
    """The table of the blend, as it is logged before training; tokens and epochs where the shards are there."""
    if not sources:
        return ["none: data.train_blend is empty"]
    lines = describe_sources(sources, total_tokens(config)).splitlines()
    return [*lines, *(verdict.text for verdict in _repeats(config, sources))]


def _train_tokens(config: RunConfig, prefix: str, manifest: ShardManifest | None) -> int | None:
    """Tokens that the blend may draw from a shard."""
    if manifest is None:
        return None
    if config.data.split is None:
        return manifest.num_tokens
    if Path(f"{prefix}.idx").exists():
        return split_shard(prefix, manifest, config.data.split)[0].num_tokens
    return round(manifest.num_tokens * config.data.split[0] / sum(config.data.split))


def stored_manifests(config: RunConfig) -> dict[str, ShardManifest]:
    """The manifests of the run's shards that are there, by prefix."""
    prefixes = [prefix for _, blend in named_blends(config.data) for _, prefix in blend]
    return {prefix: load_manifest(prefix) for prefix in prefixes if Path(f"{prefix}.json").exists()}
