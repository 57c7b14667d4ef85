"""The blend of a corpus: the config lines that draw the wanted tokens of each source from its shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from megatron_ledom.corpus.build import chosen_names, output_prefix
from megatron_ledom.corpus.recipe import Recipe, load_recipe
from megatron_ledom.data.blends.plan import BlendPlan, check_repeats, describe, plan_of, to_yaml
from megatron_ledom.data.shards.prefixes import task_prefix
from megatron_ledom.data.shards.shard import ShardManifest, check_shard
from megatron_ledom.errors import UsageError, VerificationError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock


@dataclass(kw_only=True, slots=True)
class CorpusBlendSettings:
    """Options of `ledom corpus blend`."""

    recipe: str
    overrides: Sequence[str] = ()
    seq_length: int | None = None
    global_batch_size: int | None = None
    allow_repeats: bool = False
    output: str | None = None
    """File for the config lines; default: they are printed."""


def corpus_blend(settings: CorpusBlendSettings) -> BlendPlan:
    """Print the table and the config lines, or write the lines. Raise VerificationError if a source has too few tokens."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    shards = built_shards(recipe)
    wanted = {name: recipe.wanted(recipe.sources[name]) or _stored(shards[name]) for name in recipe.sources}
    if not settings.allow_repeats:
        _check_enough(recipe, shards, wanted)
    sizes: dict[str, int] = {}
    weights: list[float] = []
    for name, manifests in shards.items():
        for (prefix, manifest), drawn in zip(manifests.items(), _divided(wanted[name], manifests), strict=True):
            if drawn:
                sizes[prefix] = manifest.num_tokens
                weights.append(drawn)
    budget = recipe.tokens if recipe.tokens is not None else sum(wanted.values())
    plan = plan_of(sizes, weights, budget, settings.seq_length, settings.global_batch_size)
    print(describe(plan), flush=True)
    if not settings.allow_repeats:
        check_repeats(plan)
    lines = config_lines(recipe, plan)
    if settings.output is None:
        print(f"\n{lines}", end="")
    else:
        with output_file_lock(settings.output):
            write_file(settings.output, lines)
    return plan


def built_shards(recipe: Recipe) -> dict[str, dict[str, ShardManifest]]:
    """Return the manifests of all shards: source -> prefix -> manifest. Raise UsageError for a source that is not built."""
    found: dict[str, dict[str, ShardManifest]] = {}
    first: tuple[str, ShardManifest] | None = None
    for name in chosen_names(recipe, ()):
        base, count = output_prefix(recipe, name), recipe.sources[name].tasks
        prefixes = [task_prefix(base, number, count) for number in range(count)] if count > 1 else [base]
        missing = [prefix for prefix in prefixes if not Path(f"{prefix}.json").exists()]
        if missing:
            raise UsageError(
                f"sources.{name} is not built: {missing[0]}.json is missing ({len(missing)} of {count} shards); run"
                f" `ledom corpus build RECIPE --source {name}`"
            )
        found[name] = {prefix: check_shard(prefix) for prefix in prefixes}
        for prefix, manifest in found[name].items():
            first = first or (prefix, manifest)
            manifest.provenance.check_same(first[1].provenance, f"the shard {prefix}", f"the shard {first[0]}")
    return found


def _stored(shards: dict[str, ShardManifest]) -> int:
    return sum(manifest.num_tokens for manifest in shards.values())


def _check_enough(recipe: Recipe, shards: dict[str, dict[str, ShardManifest]], wanted: dict[str, int]) -> None:
    """Raise VerificationError that lists every source with fewer tokens than wanted."""
    short = [
        f"sources.{name}: {wanted[name]:,} tokens wanted, {_stored(shards[name]):,} stored"
        for name in recipe.sources
        if wanted[name] > _stored(shards[name])
    ]
    if short:
        raise VerificationError(
            "these sources would be read more than once:\n  " + "\n  ".join(short) + "\nlower their tokens, read more files"
            " (sample, most_bytes), or allow repeats with --allow-repeats"
        )


def _divided(wanted: int, shards: dict[str, ShardManifest]) -> list[int]:
    """Return the tokens to draw from each shard of a source, in proportion to the stored ones; they add up to `wanted`."""
    total = _stored(shards)
    ends = [wanted * end // max(1, total) for end in accumulate(manifest.num_tokens for manifest in shards.values())]
    return [end - begin for begin, end in pairwise([0, *ends])]


def config_lines(recipe: Recipe, plan: BlendPlan) -> str:
    """Return the lines of a blend for the config of a run, with the direction and the tokenizer of the shards."""
    head, _, rest = to_yaml(plan).partition("\n")
    return f"{head}\n  direction: {recipe.direction}\n  tokenizer: {_quoted(recipe.tokenizer)}\n{rest}\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
