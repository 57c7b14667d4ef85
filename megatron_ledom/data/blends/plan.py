"""Plan a blend before training: the tokens from each source, how often it is read, and the lines for the config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from megatron_ledom.data.blends.interleave import Interleave
from megatron_ledom.data.shards.prefixes import TASK, check_tasks_complete, expand_prefixes
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.direction import BOTH, Direction, ModelDirection
from megatron_ledom.errors import UsageError, VerificationError
from megatron_ledom.provenance import Provenance
from megatron_ledom.tables import aligned_lines

MOST_ROWS = 40
"""Limit on the rows of a table. With more sources, all shards of one array are one row."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(kw_only=True, slots=True)
class BlendSettings:
    """Options of `ledom plan-blend`."""

    input: list[str]
    """Prefixes of shards, patterns of them, or NAME=TOKENS."""
    tokens: str | None = None
    """Tokens of the whole run; default with `tokens_per_source`: their sum."""
    weights: list[float] | None = None
    tokens_per_source: list[str] | None = None
    """With neither this nor `weights`, the weight of a source is its number of tokens."""
    seq_length: int | None = None
    global_batch_size: int | None = None
    """With both `seq_length` and `global_batch_size` the run consists of whole iterations."""


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of the plan, and one row of its table."""

    name: str
    """Prefix of the shard."""
    tokens: int | None
    """Tokens of the shard, or of its documents that may be drawn; None if the shard does not exist yet."""
    weight: int | float
    """As given; only its ratio to the other weights counts."""
    share: float
    """Fraction of the run."""
    drawn: float
    """Tokens of the run from this source."""
    samples: int | None = None
    """Samples of the run from this source; None if their length is unknown."""
    samples_available: int | None = None
    """Samples of one pass over the shard."""
    direction: Direction | None = None
    """Direction of the shard. None if it is not known, or the same for all sources."""

    @property
    def epochs(self) -> float | None:
        """Number of passes over the shard."""
        return self.drawn / self.tokens if self.tokens else None

    @property
    def repeats(self) -> bool:
        """True if the run reads some text of the shard more than once. Counts samples, as training does, if they are known."""
        if self.samples is not None and self.samples_available is not None:
            return self.samples > self.samples_available
        return self.epochs is not None and self.epochs > 1 + 1e-12  # the share is a rounded fraction


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """Plan of the blend of a whole run."""

    sources: list[PlannedSource]
    tokens: int
    """Tokens of the run: the budget, or its whole iterations."""
    seq_length: int | None
    global_batch_size: int | None
    train_iters: int | None


def samples_available(num_tokens: int, seq_length: int) -> int:
    """Return the samples of one pass over a shard. The last label of a sample is the first token of the next."""
    return max(0, num_tokens - 1) // seq_length


def parse_tokens(text: str, where: str) -> int:
    """Return the exact number that a text such as 435.37B, 1e12 or 435,373,905,853 means. where: option, for the error."""
    plain = text.strip().replace(",", "").replace("_", "").upper()
    unit = plain[-1:] if plain[-1:] in UNITS else ""
    try:
        number = Decimal(plain.removesuffix(unit)) * UNITS[unit]
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 1 or number != number.to_integral_value():
        raise UsageError(f"{where} {text} is not a number of tokens; write 435.37B, 1e12, 300M or 435,373,905,853")
    return int(number)


def plan_blend(settings: BlendSettings) -> BlendPlan:
    """Return the plan. Raises UsageError for options that do not fit together. Repeats are refused by `check_repeats`."""
    sizes, directions = _source_sizes(settings.input)
    weights, budget = _weights_and_budget(settings, list(sizes.values()))
    plan = plan_of(sizes, weights, budget, settings.seq_length, settings.global_batch_size)
    is_two_way = len(set(directions.values())) > 1
    return replace(plan, sources=with_directions(plan.sources, directions)) if is_two_way else plan


def plan_of(
    sizes: Mapping[str, int], weights: Sequence[float], budget: int, seq_length: int | None, batch: int | None
) -> BlendPlan:
    """Return the plan of a run of `budget` tokens. sizes: tokens by name. With a sequence length and a batch: whole iterations."""
    train_iters = None
    if (seq_length is None) != (batch is None):
        raise UsageError("--seq-length and --global-batch-size determine the iterations together; give both or neither")
    if seq_length is not None and batch is not None:
        if seq_length < 1 or batch < 1:
            raise UsageError(f"--seq-length {seq_length} and --global-batch-size {batch} must be 1 or more")
        train_iters = budget // (seq_length * batch)
        if not train_iters:
            raise UsageError(f"{budget:,} tokens are less than one iteration of {batch:,} x {seq_length:,}; raise --tokens")
        budget = train_iters * seq_length * batch
    return BlendPlan(planned_sources(sizes, weights, budget, seq_length), budget, seq_length, batch, train_iters)


def planned_sources(
    sizes: Mapping[str, int | None], weights: Sequence[float], tokens: int, seq_length: int | None
) -> list[PlannedSource]:
    """Return the plan of each source for a run of `tokens`. sizes: tokens by name. Exact to the sample with `seq_length`."""
    shares = [weight / sum(weights) for weight in weights]
    if seq_length is None:
        rows = zip(sizes.items(), weights, shares, strict=True)
        return [PlannedSource(name, size, weight, share, share * tokens) for (name, size), weight, share in rows]
    counts = Interleave(shares).counts(tokens // seq_length).tolist()
    return [
        PlannedSource(
            name, size, weight, share, samples * seq_length, samples, samples_available(size, seq_length) if size else None
        )
        for (name, size), weight, share, samples in zip(sizes.items(), weights, shares, counts, strict=True)
    ]


def with_directions(sources: Sequence[PlannedSource], directions: Mapping[str, Direction]) -> list[PlannedSource]:
    """Return the sources with their directions, which a two-way run needs. directions: by name."""
    return [replace(source, direction=directions.get(source.name)) for source in sources]


def _source_sizes(inputs: Sequence[str]) -> tuple[dict[str, int], dict[str, Direction]]:
    """Return (the tokens of each source by name, in the given order; the directions of those that are shards)."""
    sizes: dict[str, int] = {}
    directions: dict[str, Direction] = {}
    known: dict[ModelDirection, tuple[str, Provenance]] = {}
    for text in inputs:
        name, is_pair, tokens = text.rpartition("=")
        if is_pair and name and not Path(f"{text}.json").exists():
            found = [(name, parse_tokens(tokens, f"--input {name}="))]
        else:
            prefixes = expand_prefixes([text])
            check_tasks_complete(prefixes)
            found = []
            for prefix in prefixes:
                manifest = check_shard(prefix)
                _check_fits(prefix, manifest.provenance, known)
                found.append((prefix, manifest.num_tokens))
                directions[prefix] = manifest.direction
        for name, size in found:
            if name in sizes:
                raise UsageError(f"{name} is named more than once; name each source once, with the sum of its weights")
            sizes[name] = size
    return sizes, directions


def _check_fits(prefix: str, provenance: Provenance, known: dict[ModelDirection, tuple[str, Provenance]]) -> None:
    """Add the first shard of a direction to `known`. Raises MismatchError if a shard does not fit those before it.

    Shards of both directions fit if their markers differ: they make a two-way model.
    """
    for direction, (other, found) in known.items():
        is_two_way = direction != provenance.direction and provenance.readings[0].marker_id != found.readings[0].marker_id
        check = provenance.check_same_tokenizer if is_two_way else provenance.check_same
        check(found, f"the shard {prefix}", f"the shard {other}")
    known.setdefault(provenance.direction, (prefix, provenance))


def _weights_and_budget(settings: BlendSettings, sizes: list[int]) -> tuple[list[float], int]:
    weights: list[float] = [*sizes]
    option = ""
    if settings.weights is not None:
        option, weights = "--weights", settings.weights
    elif settings.tokens_per_source is not None:
        option = "--tokens-per-source"
        weights = [parse_tokens(text, option) for text in settings.tokens_per_source]
    if len(weights) != len(sizes):
        raise UsageError(f"{option} has {len(weights)} numbers for {len(sizes)} sources; give one for each, in their order")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UsageError(f"{option} {weights} must all be above 0; omit the sources with weight 0")
    if settings.tokens is not None:
        return weights, parse_tokens(settings.tokens, "--tokens")
    if settings.tokens_per_source is None:
        raise UsageError("--tokens is missing; give the number of tokens of the run, such as 435.37B")
    return weights, int(sum(weights))


def describe(plan: BlendPlan) -> str:
    """Return the table of a plan."""
    return describe_sources(plan.sources, plan.tokens)


def describe_sources(sources: Sequence[PlannedSource], tokens: int) -> str:
    """Return the table of a run of `tokens`. More than MOST_ROWS sources are grouped by the array that wrote them."""
    shown = sources if len(sources) <= MOST_ROWS else _grouped(sources)
    stored = [source.tokens for source in sources if source.tokens is not None]
    samples = [source.samples for source in sources if source.samples is not None]
    everything = PlannedSource(
        "all", sum(stored) if len(stored) == len(sources) else None, 0, 1.0, tokens, sum(samples) if samples else None
    )
    heads = ["source", "tokens", "weight", "share", "drawn", "epochs", *(["samples"] if samples else [])]
    rows = [heads, *[_row(source) for source in shown], _row(everything)]
    rows[-1][2] = ""
    if any(source.direction for source in sources):
        directions = ["direction", *(source.direction or "not known" for source in shown), ""]
        rows = [[row[0], direction, *row[1:]] for row, direction in zip(rows, directions, strict=True)]
        return "\n".join(aligned_lines(rows, "ll"))
    return "\n".join(aligned_lines(rows, "l"))


def _row(source: PlannedSource) -> list[str]:
    whole = float(source.weight).is_integer()
    stored = "no shard yet" if source.tokens is None else f"{source.tokens:,}"
    return [
        source.name,
        stored,
        f"{int(source.weight):,}" if whole else f"{source.weight:g}",
        f"{source.share:.2%}",
        f"{source.drawn:,.0f}",
        "" if source.epochs is None else f"{source.epochs:.4f}",
        *([f"{source.samples:,}"] if source.samples is not None else []),
    ]


def _grouped(sources: Sequence[PlannedSource]) -> list[PlannedSource]:
    """Merge the shards of each array, P-*-of-00064, into one row, even if they are not adjacent. Keep the others."""
    groups: dict[str, list[PlannedSource]] = {}
    for source in sources:
        match = TASK.fullmatch(source.name)
        groups.setdefault(f"{match['base']}-*-of-{match['count']}" if match else source.name, []).append(source)
    return [
        PlannedSource(
            name if len(group) == 1 else f"{name} ({len(group):,} shards)",
            None if any(source.tokens is None for source in group) else sum(source.tokens or 0 for source in group),
            sum(source.weight for source in group),
            sum(source.share for source in group),
            sum(source.drawn for source in group),
            None if group[0].samples is None else sum(source.samples or 0 for source in group),
            direction=group[0].direction if len({source.direction for source in group}) == 1 else None,
        )
        for name, group in groups.items()
    ]


def check_repeats(plan: BlendPlan) -> None:
    """Raise VerificationError if a plan reads a source more than once."""
    repeated = [source for source in plan.sources if source.repeats]
    if not repeated:
        return
    worst = max(repeated, key=lambda source: source.epochs or 0.0)
    most = min(source.tokens / source.share for source in plan.sources if source.tokens is not None)
    named = ", ".join(f"{source.name} ({source.epochs:.4f} times)" for source in repeated)
    raise VerificationError(
        f"read more than once: {named}; these weights allow at most {most:,.0f} tokens: lower --tokens or the weight of"
        f" {worst.name}, add shards, or allow repeats with --allow-repeats (data.allow_repeats=true in the config)"
    )


def to_yaml(plan: BlendPlan) -> str:
    """Return the lines for the config of the run."""
    lines = ["data:"]
    if plan.seq_length:
        lines.append(f"  seq_length: {plan.seq_length}")
    if any(source.repeats for source in plan.sources):
        lines.append("  allow_repeats: true")
    if any(source.direction for source in plan.sources):
        lines.append(f"  direction: {BOTH}")
    lines.append("  train_blend:")
    for source in plan.sources:
        stated = f", {source.direction}" if source.direction else ""
        lines.append(f"    - [{_yaml_number(source.weight)}, {_yaml_text(source.name)}{stated}]")
    if plan.train_iters is not None:
        lines += ["train:", f"  train_iters: {plan.train_iters}", f"  global_batch_size: {plan.global_batch_size}"]
    return "\n".join(lines)


def _yaml_number(number: int | float) -> str:
    return str(number) if isinstance(number, int) else format(Decimal(repr(number)), "f")  # 1e-05 would be text in YAML


def _yaml_text(text: str) -> str:
    is_plain = text.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum() and not text[0].isdigit()
    return text if is_plain and text[0] not in "-." else "'" + text.replace("'", "''") + "'"
