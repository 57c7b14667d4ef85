"""The blend of a corpus: the config lines that draw the wanted tokens of each source from its shards."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from megatron_ledom.corpus.addresses import is_commit
from megatron_ledom.corpus.build import chosen_names, description, output_prefix
from megatron_ledom.corpus.recipe import MOST_NAMED, Recipe, load_recipe
from megatron_ledom.data.blends.plan import BlendPlan, describe, plan_of, to_yaml
from megatron_ledom.data.shards.prefixes import check_same_inputs, task_prefix
from megatron_ledom.data.shards.shard import ShardManifest, check_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError, VerificationError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer


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
    wanted = _wanted(recipe, shards)
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
        _check_repeats(recipe, shards, plan)
    lines = config_lines(recipe, plan, _first(shards).direction)
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
        check_same_inputs(prefixes, list(found[name].values()))
    check_described(recipe, found)
    return found


def check_described(recipe: Recipe, shards: dict[str, dict[str, ShardManifest]]) -> None:
    """Raise MismatchError if shards were built from another recipe than this one, with every difference that manifests show."""
    if Path(recipe.tokenizer).exists():
        provenance = load_tokenizer(recipe.tokenizer, recipe.eod_token).provenance(recipe.direction)
        for manifests in shards.values():
            for prefix, manifest in manifests.items():
                manifest.provenance.check_same(provenance, f"the shard {prefix}", "the recipe")
    lines: list[str] = []
    names: list[str] = []
    for name, manifests in shards.items():
        found = [_differences(recipe, name, manifest) for manifest in manifests.values()]
        if any(found):
            names.append(name)
            lines += dict.fromkeys(line for differences in found for line in differences)
    if lines:
        raise MismatchError(
            f"the shards in {recipe.output} were built from another recipe:\n  "
            + "\n  ".join(lines)
            + "\nbring the recipe back,"
            f" or build again: ledom corpus build RECIPE --overwrite {' '.join(f'--source {name}' for name in names)}"
        )


def _differences(recipe: Recipe, name: str, manifest: ShardManifest) -> list[str]:
    """Return a line for each key whose value in the recipe is not the one that the shard was built with."""
    source, key = recipe.sources[name], f"sources.{name}"
    if not manifest.source:
        return [f"{key}: the shards name no source, so `ledom corpus build` did not make them"]
    commit = source.revision if is_commit(source.revision) else manifest.source.get("revision")
    now = description(recipe, name, commit)
    settings, built_settings = now.pop("settings"), manifest.source.get("settings")
    pairs = [("name" if one == "recipe" else f"{key}.{one}", manifest.source.get(one), value) for one, value in now.items()]
    if built_settings is not None:  # shards that were made before manifests had them
        filters, built_filters = settings.pop("filters"), built_settings["filters"]
        pairs += [(f"{key}.{one}", built_settings.get(one), value) for one, value in settings.items() if one != "shuffle_seed"]
        pairs.append(("shuffle_seed", built_settings.get("shuffle_seed"), recipe.shuffle_seed))
        both = sorted({*filters, *built_filters})
        pairs += [(f"{key}.filters.{one}", built_filters.get(one), filters.get(one)) for one in both]
    pairs += [
        ("direction", str(manifest.direction), str(recipe.direction)),
        ("bos_token", manifest.bos_token, recipe.bos_token or ""),
    ]
    if recipe.eod_token is not None:
        pairs.append(("eod_token", manifest.eod_token, recipe.eod_token))
    if recipe.dtype != "auto":
        pairs.append(("dtype", manifest.dtype, recipe.dtype))
    return [f"{one}: built with {then!r}, the recipe has {value!r}" for one, then, value in pairs if then != value]


def _first(shards: dict[str, dict[str, ShardManifest]]) -> ShardManifest:
    return next(iter(next(iter(shards.values())).values()))


def _wanted(recipe: Recipe, shards: dict[str, dict[str, ShardManifest]]) -> dict[str, int]:
    """Return the tokens to draw from each source. Raise VerificationError if one is empty, or if they are not those of the run."""
    if empty := [name for name in shards if not _stored(shards[name])]:
        skipped = {name: sum((Counter(one.skipped) for one in shards[name].values()), Counter()) for name in empty}
        lines = [f"sources.{name}: 0 tokens stored, skipped documents: {dict(skipped[name]) or 'none'}" for name in empty]
        raise VerificationError(
            "these sources are empty:\n  "
            + "\n  ".join(lines)
            + "\ncheck their text_key, files and filters and build them again"
            " with --overwrite, or remove them from the recipe"
        )
    given = {name: recipe.wanted(recipe.sources[name]) for name in recipe.sources}
    wanted = {name: _stored(shards[name]) if number is None else number for name, number in given.items()}
    if problem := recipe.problem_of_sum(wanted):
        whole = ", ".join(name for name, number in given.items() if number is None)
        raise VerificationError(problem + (f"; {whole} without tokens and share give all that they have" if whole else ""))
    return wanted


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


def _check_repeats(recipe: Recipe, shards: dict[str, dict[str, ShardManifest]], plan: BlendPlan) -> None:
    """Raise VerificationError with the keys to change if a plan reads a shard more than once."""
    repeated = {one.name: one for one in plan.sources if one.repeats}
    lines = []
    for name, manifests in shards.items():
        if not (mine := [prefix for prefix in manifests if prefix in repeated]):
            continue
        # the last label of a sample is the first token of the next one, and only whole samples are drawn
        length = plan.seq_length or 1
        most = sum(
            max(0, one.num_tokens - 1) // length * length if plan.seq_length else one.num_tokens for one in manifests.values()
        )
        times = ", ".join(f"{prefix} {repeated[prefix].epochs:.4f} times" for prefix in mine[:MOST_NAMED])
        wants = "all" if recipe.wanted(recipe.sources[name]) is None else f"{recipe.wanted(recipe.sources[name]):,} tokens"
        lines.append(f"sources.{name}: {wants} wanted, at most {most:,} can be drawn ({times})")
    if lines:
        raise VerificationError(
            "these sources would be read more than once:\n  "
            + "\n  ".join(lines)
            + "\nset their tokens to less in the recipe (and"
            " tokens of the run with them), read more files (sample, most_bytes), or allow repeats with --allow-repeats"
        )


def _divided(wanted: int, shards: dict[str, ShardManifest]) -> list[int]:
    """Return the tokens to draw from each shard of a source, in proportion to the stored ones; they add up to `wanted`."""
    total = _stored(shards)
    ends = [wanted * end // max(1, total) for end in accumulate(manifest.num_tokens for manifest in shards.values())]
    return [end - begin for begin, end in pairwise([0, *ends])]


def config_lines(recipe: Recipe, plan: BlendPlan, direction: Direction) -> str:
    """Return the lines of a blend for the config of a run, with the direction of the shards and the tokenizer."""
    head, _, rest = to_yaml(plan).partition("\n")
    return f"{head}\n  direction: {direction}\n  tokenizer: {_quoted(recipe.tokenizer)}\n{rest}\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
