"""A dry run: verdicts, the resolved config and every number derived from it. Needs no GPU, data or torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import named_blends, stated_directions, total_tokens
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.data.blends.plan import PlannedSource, describe_sources, planned_sources, with_directions
from megatron_ledom.data.blends.sources import check_manifests, split_shard
from megatron_ledom.data.shards.shard import ShardManifest, load_manifest
from megatron_ledom.direction import BOTH
from megatron_ledom.planning import dry_run_rows as rows
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import Plan
from megatron_ledom.planning.plan_text import Row, summary_rows, titled
from megatron_ledom.planning.verdicts import (
    DiskNeed,
    Verdict,
    disk_needs,
    disk_verdict,
    memory_verdict,
    plan_of_config,
    shared_disk_verdicts,
)


@dataclass(frozen=True, slots=True)
class DryRun:
    """The description of a run that has not started."""

    text: str
    verdicts: list[Verdict]
    """Also at the top of the text."""
    needs: list[DiskNeed]
    """Of its checkpoints and their copies."""


def dry_run(config: RunConfig, world_size: int, stage: int = 1) -> DryRun:
    """Return verdicts as comments, the resolved run as YAML, then its derived numbers and its blend as tables.

    stage: the number of the run among stages.

    Reads the manifests of the shards that exist. Raises ConfigError if the run cannot work on `world_size` ranks, and the
    errors that starting the run would raise for these manifests.
    """
    check_config(config, world_size)
    manifests = stored_manifests(config)
    if manifests:
        check_manifests(config, manifests)
    model = known_model(config, manifests)
    plan, sources = plan_of_config(config, world_size, model), _planned_sources(config, manifests)
    needs = disk_needs(config, model, stage)
    on_disk = [of_another_machine(verdict) for verdict in (disk_verdict(config, model), *shared_disk_verdicts(needs))]
    verdicts = [memory_verdict(config, plan), *on_disk, *_repeats(config, sources)]
    top = "".join(f"# {verdict.line()}\n" for verdict in verdicts)
    tables = _tables(config, world_size, model, plan)
    tables.append(titled("training data", _blend_lines(config, sources)))
    return DryRun(top + "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n", verdicts, needs)


def _tables(config: RunConfig, world_size: int, model: ModelConfig, plan: Plan | None) -> list[str]:
    groups: dict[str, list[Row]] = {
        "model": [*rows.model_rows(config, model)],
        "layout": [*rows.layout_rows(config, world_size, model)],
        "execution": [*rows.execution_rows(config)],
        "batch": [*rows.batch_rows(config, world_size)],
        "run": [*rows.run_rows(config, model)],
        "compute": [*rows.compute_rows(config, model)],
        "plan": [*_plan_rows(config, plan)],
        "operation": [*rows.operation_rows(config)],
    }
    width = max(len(name) for group in groups.values() for name, _ in group)
    return [
        *(titled(title, [f"{name:<{width}}  {value}" for name, value in group]) for title, group in groups.items()),
        titled("ranks", rows.rank_lines(config, world_size)),
        titled("parameters of a rank", rows.parameter_lines(config, model)),
    ]


def _plan_rows(config: RunConfig, plan: Plan | None) -> Iterator[Row]:
    """Yield the planner's numbers for the configured hardware."""
    if config.parallel.hardware is None:
        yield "hardware", "not set: set parallel.hardware, or use ledom plan-run --hardware, to plan memory and time"
    elif plan is None:
        yield "hardware", f"{load_hardware(config.parallel.hardware).name}; no plan without the vocabulary"
    else:
        yield from summary_rows(plan)


def of_another_machine(verdict: Verdict) -> Verdict:
    """Return the verdict on the disk as one that passes: the dry run may run on another machine. `--check` refuses."""
    if verdict.holds:
        return verdict
    return replace(verdict, text=f"{verdict.text}: too little, if that is the run's disk", holds=True)


def _planned_sources(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[PlannedSource]:
    """Return the tokens and epochs that the run draws from each shard of its blend."""
    blend = config.data.train_blend
    if not blend:
        return []
    sizes = {prefix: _train_tokens(config, prefix, manifests.get(prefix)) for _, prefix, *_ in blend}
    sources = planned_sources(sizes, [weight for weight, *_ in blend], total_tokens(config), config.data.seq_length)
    if config.data.direction != BOTH:
        return sources
    found = {prefix: manifest.direction for prefix, manifest in manifests.items()}
    return with_directions(sources, stated_directions(blend) | found)


def _train_tokens(config: RunConfig, prefix: str, manifest: ShardManifest | None) -> int | None:
    """Return the number of training tokens in a shard; None without its manifest."""
    if manifest is None:
        return None
    if config.data.split is None:
        return manifest.num_tokens
    if Path(f"{prefix}.idx").exists():
        return split_shard(prefix, manifest, config.data.split)[0].num_tokens
    return round(manifest.num_tokens * config.data.split[0] / sum(config.data.split))


def _repeats(config: RunConfig, sources: list[PlannedSource]) -> list[Verdict]:
    """Return a failed verdict if shards would repeat and the config does not allow it."""
    repeated = [source for source in sources if source.repeats]
    if not repeated or config.data.allow_repeats:
        return []
    worst = max(repeated, key=lambda source: source.epochs or 0.0)
    text = f"shards that would repeat: {len(repeated)}, most often {worst.name}; this needs data.allow_repeats=true"
    remedy = "add shards, or lower train.train_iters or the weight in data.train_blend"
    return [Verdict("data", text, False, remedy, is_estimate=False)]


def _blend_lines(config: RunConfig, sources: list[PlannedSource]) -> list[str]:
    """Return the table of the blend, as training logs it; tokens and epochs only for shards that exist."""
    if not sources:
        return ["none: data.train_blend is empty"]
    lines = describe_sources(sources, total_tokens(config)).splitlines()
    return [*lines, *(verdict.text for verdict in _repeats(config, sources))]


def stored_manifests(config: RunConfig) -> dict[str, ShardManifest]:
    """Return the manifests of those shards of the run that exist, by prefix."""
    prefixes = [prefix for _, blend in named_blends(config.data) for _, prefix, *_ in blend]
    return {prefix: load_manifest(prefix) for prefix in prefixes if Path(f"{prefix}.json").exists()}


def known_model(config: RunConfig, manifests: dict[str, ShardManifest]) -> ModelConfig:
    """Return the model, with the vocabulary size of the shards if the config sets none and shards exist."""
    if config.model.vocab_size is not None or not manifests:
        return config.model
    return replace(config.model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)
