"""What a run would do, without a GPU, data or torch: the resolved configuration and every number that follows from it."""

from dataclasses import replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import blend_shares, total_tokens
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import BlendEntry, RunConfig
from megatron_ledom.data.shard import ShardManifest, load_manifest
from megatron_ledom.training.plan_layout import layout_rows, parameter_lines, rank_lines
from megatron_ledom.training.plan_run import batch_rows, compute_rows, model_rows, operation_rows, run_rows


def describe_run(config: RunConfig, world_size: int) -> str:
    """The resolved run as YAML, then its derived numbers and its blend as tables; the manifests of shards are read if there.

    Raises ConfigError when the run cannot work on `world_size` ranks.
    """
    check_config(config, world_size)
    manifests = _stored_manifests([*config.data.train_blend, *config.data.valid_blend])
    model = config.model
    if model.vocab_size is None and manifests:
        model = replace(model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)
    groups = {
        "model": list(model_rows(config, model)),
        "layout": list(layout_rows(config, world_size, model)),
        "batch": list(batch_rows(config, world_size)),
        "run": list(run_rows(config)),
        "compute": list(compute_rows(config, model)),
        "operation": list(operation_rows(config)),
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    tables = [_titled(title, [f"{name:<{width}}  {value}" for name, value in rows]) for title, rows in groups.items()]
    tables.append(_titled("ranks", rank_lines(config, world_size)))
    tables.append(_titled("parameters of a rank", parameter_lines(config, model)))
    tables.append(_titled("training data", _blend_lines(config, manifests)))
    return "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n"


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])


def _blend_lines(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[str]:
    """One line a source: weight, share, tokens drawn and, where the shard is there, its tokens and epochs."""
    if not config.data.train_blend:
        return ["none: data.train_blend is empty"]
    rows = [("source", "weight", "share", "tokens drawn", "tokens stored", "epochs")]
    for (weight, prefix), share in zip(config.data.train_blend, blend_shares(config.data.train_blend), strict=True):
        drawn = share * total_tokens(config)
        manifest = manifests.get(prefix)
        stored = f"{manifest.num_tokens:,}" if manifest else "no shard yet"
        epochs = f"{drawn / max(manifest.num_tokens, 1):.3f}" if manifest else ""
        rows.append((prefix, f"{weight:,.15g}", f"{share:.2%}", f"{drawn:,.0f}", stored, epochs))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_aligned(row, widths) for row in rows]


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers])


def _stored_manifests(blend: list[BlendEntry]) -> dict[str, ShardManifest]:
    prefixes = [prefix for _, prefix in blend]
    return {prefix: load_manifest(prefix) for prefix in prefixes if Path(f"{prefix}.json").exists()}
