"""What a run would do, without a GPU, data or torch: the resolved configuration and every number that follows from it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import named_blends, total_tokens
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.data.blend_plan import describe_sources, planned_sources
from megatron_ledom.data.shard import ShardManifest, load_manifest
from megatron_ledom.data.splits import split_shard
from megatron_ledom.planner.hardware import load_hardware
from megatron_ledom.planner.plan import make_plan
from megatron_ledom.planner.text import summary_rows
from megatron_ledom.training.plan_engine import engine_rows
from megatron_ledom.training.plan_layout import layout_rows, parameter_lines, rank_lines
from megatron_ledom.training.plan_run import Row, batch_rows, compute_rows, model_rows, operation_rows, run_rows


def describe_run(config: RunConfig, world_size: int) -> str:
    """The resolved run as YAML, then its derived numbers and its blend as tables; the manifests of shards are read if there.

    Raises ConfigError when the run cannot work on `world_size` ranks.
    """
    check_config(config, world_size)
    manifests = stored_manifests(config)
    model = known_model(config, manifests)
    groups = {
        "model": list(model_rows(config, model)),
        "layout": list(layout_rows(config, world_size, model)),
        "engine": list(engine_rows(config)),
        "batch": list(batch_rows(config, world_size)),
        "run": list(run_rows(config, model)),
        "compute": list(compute_rows(config, model)),
        "plan": list(plan_rows(config, world_size, model)),
        "operation": list(operation_rows(config)),
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    tables = [_titled(title, [f"{name:<{width}}  {value}" for name, value in rows]) for title, rows in groups.items()]
    tables.append(_titled("ranks", rank_lines(config, world_size)))
    tables.append(_titled("parameters of a rank", parameter_lines(config, model)))
    tables.append(_titled("training data", _blend_lines(config, manifests)))
    return "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n"


def known_model(config: RunConfig, manifests: dict[str, ShardManifest]) -> ModelConfig:
    """The model with the vocabulary of the shards, where the config leaves it to them and they are there."""
    if config.model.vocab_size is not None or not manifests:
        return config.model
    return replace(config.model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)


def plan_rows(config: RunConfig, world_size: int, model: ModelConfig) -> Iterator[Row]:
    """What the planner says for the configured hardware."""
    if config.parallel.hardware is None:
        yield "hardware", "not named: parallel.hardware, or tools/plan_run.py --hardware, plans memory and time"
        return
    hardware = load_hardware(config.parallel.hardware)
    if model.vocab_size is None:
        yield "hardware", f"{hardware.name}; no plan without the vocabulary"
        return
    yield from summary_rows(make_plan(replace(config, model=model), world_size, hardware))


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])


def _blend_lines(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[str]:
    """The table of the blend, as it is logged before training; tokens and epochs where the shards are there."""
    blend = config.data.train_blend
    if not blend:
        return ["none: data.train_blend is empty"]
    sizes = {prefix: _train_tokens(config, prefix, manifests.get(prefix)) for _, prefix in blend}
    tokens = total_tokens(config)
    sources = planned_sources(sizes, [weight for weight, _ in blend], tokens, config.data.seq_length)
    lines = describe_sources(sources, tokens).splitlines()
    repeated = [source for source in sources if source.repeats]
    if repeated and not config.data.allow_repeats:
        worst = max(repeated, key=lambda source: source.epochs or 0.0)
        lines.append(f"{len(repeated)} would repeat, {worst.name} most: such a run is refused without data.allow_repeats=true")
    return lines


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
