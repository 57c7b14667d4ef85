"""The recipe of a corpus: one YAML file with every source, and the settings that make shards of them.

Types and ranges are here; `load_recipe` also checks relations between keys. The sources are a mapping by name, so that `--set
sources.NAME.key=value` changes one.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ledom.config.load import merged_values, whole_numbers
from megatron_ledom.config.problems import describe_type
from megatron_ledom.config.schema import STRICT, NotNegative, Positive, PositiveFloat
from megatron_ledom.contamination.settings import Action, Match
from megatron_ledom.corpus.addresses import INSTALLED, check_address
from megatron_ledom.data.readers.records import OnError
from megatron_ledom.data.shards.prefixes import TASK
from megatron_ledom.data.shards.shard import DtypeName
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError

Origin = Literal["original", "inferred", "ours"]
ORIGINS: dict[Origin, str] = {
    "original": "known to be what the original LEDOM used",
    "inferred": "our reading of what the original LEDOM used",
    "ours": "a choice of this project",
}
MOST_NAMED = 8
"""Limit on the sources that a message names."""
RESERVED = ("recipe.lock",)
"""Names of sources whose manifest would have the name of another file of a published corpus."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


@dataclass(kw_only=True, slots=True)
class Filters:
    """Choice of documents, by the options of `ledom preprocess-data`.

    A key of a source replaces the one of the recipe, also if it is null, which switches the filter off.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    min_tokens: Positive | None = None
    """Skip shorter documents."""
    max_tokens: Positive | None = None
    """Skip longer documents."""
    filter: str | None = None
    """`module:function` that gets (text, record) and returns True to keep the document."""
    deduplicate: bool | None = None
    """Keep only the first of equal texts of a source."""
    decontaminate: list[str] | None = None
    """Folders or files of evaluation items to look for in the kept documents."""
    action: Action | None = None
    """Action for a document with an evaluation item: report, drop (default) or cut."""
    match: Match | None = None
    """Parts of an item that must be found. Default: either."""
    ngram: Positive | None = None
    """Words equal in a row. Default: 8."""
    threshold: PositiveFloat | None = None
    """Share of the words of an item that must be found. Default: 0.5."""
    on_error: OnError | None = None
    """Action for a bad record: fail (default) or skip."""
    max_record_bytes: Positive | None = None
    """Longest record; a longer one is bad."""

    def over(self, defaults: "Filters", given: Collection[str]) -> "Filters":
        """Return these filters, with `defaults` for the keys that are not `given` in the file."""
        return Filters(**{**asdict(defaults), **{name: getattr(self, name) for name in given}})


@dataclass(kw_only=True, slots=True)
class Expected:
    """Known numbers of a source before it is listed. A key that is null is unknown; nothing is guessed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    files: NotNegative | None = None
    bytes: NotNegative | None = None
    """Bytes as stored, compressed."""
    documents: NotNegative | None = None
    tokens: NotNegative | None = None
    """Tokens of the whole source, by the tokenizer of whoever published the number."""


@dataclass(kw_only=True, slots=True)
class Source:
    """One source of a corpus."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    address: str
    """Folder that has the files: hf://datasets/OWNER/NAME, s3://BUCKET/FOLDER, a local folder, or `installed-packages`."""
    files: list[str]
    """Patterns of the files, relative to the address."""
    licence: str
    """Licence, by its SPDX name where it has one; `unknown` if it is."""
    terms: str
    """Duties of the licence and of its owner for anyone who uses or passes on the text."""
    domain: str
    """Group of the source, such as general, math or code."""
    origin: Origin
    """original: known to be what the original LEDOM used; inferred: our reading of it; ours: a choice of this project."""
    revision: str | None = None
    """Commit of a hub repository, 40 hexadecimal digits; a branch or null is resolved by `ledom corpus pin`."""
    text_key: str = "text"
    """Field or column of the text."""
    text_template: str | None = None
    """Template that joins the texts of several fields, in place of text_key."""
    tokens: Positive | None = None
    """Tokens wanted from this source. With neither this nor `share`: all that it has."""
    share: PositiveFloat | None = None
    """Share of the tokens of the recipe, instead of `tokens`."""
    sample: PositiveFloat | None = None
    """Share of the files to read, chosen by a hash of their names; null: all."""
    most_bytes: Positive | None = None
    """Read at most so many stored bytes, in whole files chosen by a hash of their names, and at least one; null: all."""
    tasks: Positive = 1
    """Shards to make, each by one task of a SLURM array."""
    language: str | None = None
    """Language of the text by its ISO 639 code, if it is one; null: unknown or several."""
    homepage: str | None = None
    notes: str | None = None
    """Remarks, such as where a fact comes from."""
    text_per_byte: PositiveFloat | None = None
    """UTF-8 bytes of text per stored byte, for the plan; default: by the format, see docs."""
    filters: Filters = field(default_factory=Filters)
    """`load_recipe` puts those of the recipe into the keys that a source does not name."""
    expected: Expected = field(default_factory=Expected)


@dataclass(kw_only=True, slots=True)
class Estimates:
    """Numbers by which the plan turns bytes into tokens and time. The defaults are measured in docs/benchmarks.md."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bytes_per_token: PositiveFloat = 3.4
    """UTF-8 bytes of text per token."""
    tokens_per_core_second: PositiveFloat = 12_600_000.0
    """Tokens that one core encodes and writes in a second."""
    bytes_per_id: Positive | None = None
    """Stored bytes of a token; null: by `dtype` and the vocabulary, as shards are written."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A whole recipe."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """Name of the corpus, for its card."""
    output: str
    """Folder of the shards. Source NAME becomes OUTPUT/NAME.bin, .idx and .json."""
    tokenizer: str
    """Tokenizer of the shards, as for `ledom preprocess-data`."""
    sources: dict[str, Source]
    """The sources by name."""
    tokenizer_vocab_size: Positive | None = None
    """`ledom corpus make` trains a SentencePiece BPE of this many pieces on the sources if the tokenizer does not exist."""
    summary: str = ""
    """Description of the corpus, for its card."""
    direction: Direction = Direction.REVERSE
    tokens: Positive | None = None
    """Tokens of the run; needed for `share`, and equal to what the sources add up to. Default: their sum."""
    eod_token: str | None = None
    """Token that ends each document; default: the tokenizer's eos."""
    bos_token: str | None = None
    dtype: DtypeName = "auto"
    shuffle_seed: NotNegative | None = None
    """Shuffle the documents of each shard with this seed; null: keep their order."""
    filters: Filters = field(default_factory=Filters)
    """For all sources."""
    estimates: Estimates = field(default_factory=Estimates)

    def filters_of(self, source: Source) -> Filters:
        """Return the filters of a source, with those of the recipe for keys that it does not name."""
        return source.filters

    def settings_of(self, source: Source) -> dict[str, Any]:
        """Return the settings that decide which text of a source is in its shards, as plain values for their manifests."""
        keys = ("files", "text_key", "text_template", "sample", "most_bytes")
        filters = {key: value for key, value in asdict(self.filters_of(source)).items() if value is not None}
        return {**{key: getattr(source, key) for key in keys}, "shuffle_seed": self.shuffle_seed, "filters": filters}

    def wanted(self, source: Source) -> int | None:
        """Return the tokens wanted from a source; None for all that it has."""
        if source.share is not None and self.tokens is not None:
            return round(source.share * self.tokens)
        return source.tokens

    def problem_of_sum(self, wanted: Mapping[str, int | None]) -> str | None:
        """Return the problem of wanted tokens that do not add up to `tokens`, beyond the rounding of shares; None if there is none.

        wanted: tokens by source; None for a source that gives all that it has, which is known once it is built.
        """
        known = {name: number for name, number in wanted.items() if number is not None}
        total, whole = sum(known.values()), [name for name in wanted if name not in known]
        shares = sum(source.share is not None for source in self.sources.values())
        rounding = shares / 2 + 1e-9 * (self.tokens or 0) * bool(shares)
        if self.tokens is None or (total < self.tokens if whole else abs(total - self.tokens) <= rounding):
            return None
        named = ", ".join(f"{name} {number:,}" for name, number in list(known.items())[:MOST_NAMED])
        more = ", ..." * (len(known) > MOST_NAMED)
        rest = f", and nothing is left for {', '.join(whole[:MOST_NAMED])}" if whole else ""
        return (
            f"the sources want {total:,} tokens ({named}{more}){rest}, tokens={self.tokens:,} is the whole run, so other numbers"
            f" would be drawn than wanted; change tokens or share of the sources, or set tokens to {total:,} or, without shares,"
            " to null"
        )


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with `overrides` (`key=value`, dotted) applied. Raise ConfigError with every problem."""
    values = merged_values(Path(path), overrides)
    where = f"{path} with --set" if overrides else path
    try:
        recipe = _ADAPTER.validate_json(json.dumps(whole_numbers(values)), strict=True)
    except ValidationError as error:
        found = [_problem(one["type"], one["loc"], values) for one in error.errors(include_url=False)]
    else:
        _fill_filters(recipe, values)
        found = _relations(recipe)
    if found:
        lines = list(dict.fromkeys(found))
        raise ConfigError(
            f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where} has {len(lines)} problems:", *lines])
        )
    return recipe


def _fill_filters(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Put the filters of the recipe into the sources, for the keys that a source does not name. A null is named."""
    for name, source in recipe.sources.items():
        source.filters = source.filters.over(recipe.filters, values["sources"][name].get("filters", {}).keys())


def to_values(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values for JSON or YAML."""
    plain: dict[str, Any] = _ADAPTER.dump_python(recipe, mode="json")
    return plain


def _relations(recipe: Recipe) -> list[str]:
    """Return the problems between keys."""
    found = [] if recipe.sources else ["sources is empty; name at least one source"]
    for name, source in recipe.sources.items():
        key = f"sources.{name}"
        if not NAME.fullmatch(name):
            found.append(f"{key}: the name becomes a file name; use letters, digits, '_', '-' and '.', at most 96")
        if source.tokens is not None and source.share is not None:
            found.append(f"{key} has both tokens={source.tokens} and share={source.share:g}; give one of them")
        if source.share is not None and recipe.tokens is None:
            found.append(f"{key}.share={source.share:g} needs the tokens of the run; set tokens")
        if recipe.wanted(source) == 0:
            found.append(f"{key}.share={source.share:g} of tokens={recipe.tokens} is no token; raise it or remove the source")
        if source.share is not None and source.share > 1:
            found.append(f"{key}.share={source.share:g} is above 1; it is a share of the tokens of the run")
        if source.sample is not None and source.sample > 1:
            found.append(f"{key}.sample={source.sample:g} is above 1; it is a share of the files, or null for all")
        if not source.files:
            found.append(f"{key}.files is empty; give patterns such as ['**/*.jsonl.zst']")
        if source.address == INSTALLED and source.tasks > 1:
            found.append(f"{key}.tasks={source.tasks}; {INSTALLED} are collected by one process, so use 1")
        if problem := check_address(source.address, source.files, source.revision):
            found.append(f"{key}.{problem}")
    found += _problems_of_names(recipe)
    total = sum(source.share or 0.0 for source in recipe.sources.values())
    if total > 1 + 1e-9:
        found.append(f"the shares of the sources add up to {total:g}; they can be at most 1")
    elif recipe.sources and (
        problem := recipe.problem_of_sum({name: recipe.wanted(one) for name, one in recipe.sources.items()})
    ):
        found.append(problem)
    return found


def _problems_of_names(recipe: Recipe) -> list[str]:
    """Return the problems of names whose files would be those of something else."""
    found = []
    folded: dict[str, str] = {}
    for name in recipe.sources:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            found.append(f"sources.{name} and sources.{other} differ only in case, so their files may be one; rename one")
        if TASK.fullmatch(name):
            found.append(f"sources.{name} has a name like that of one shard of an array; rename it")
        if name.casefold() in RESERVED:
            found.append(f"sources.{name} would be {name}.json, which a published corpus has for its listing; rename it")
    return found


def _problem(kind: str, location: Sequence[int | str], values: dict[str, Any]) -> str:
    """Return the line of the message for one problem of pydantic."""
    parts = [str(part) for part in location]
    if kind == "unexpected_keyword_argument":
        owner = _type_at(location[:-1])
        names = [entry.name for entry in fields(owner)] if is_dataclass(owner) else []
        close = get_close_matches(parts[-1], names, 1)
        hint = f"did you mean {'.'.join([*parts[:-1], close[0]])}?" if close else f"expected one of {', '.join(names)}"
        return f"{'.'.join(parts)} is not a key; {hint}"
    key, hint = _nearest_known(location)
    expected = _words(hint)
    if kind.startswith("missing"):
        return f"{'.'.join(parts)} is missing; expected {expected}; set it in the file or with --set {'.'.join(parts)}=VALUE"
    found: Any = values
    for part in key:
        found = found[part] if isinstance(found, dict) else found[int(part)]
    return f"{'.'.join(map(str, key))}={json.dumps(found, ensure_ascii=False)[:80]} is not possible; expected {expected}"


def _nearest_known(location: Sequence[int | str]) -> tuple[list[int | str], Any]:
    """Return the longest start of a location that is a key of the recipe, with its type. pydantic adds names of types."""
    for length in range(len(location), 0, -1):
        if (hint := _type_at(location[:length])) is not None:
            return list(location[:length]), hint
    return [], Recipe


def _type_at(location: Sequence[int | str]) -> Any:
    """Return the type of the value at a location, or None if no key is there."""
    hint: Any = Recipe
    for part in location:
        if is_dataclass(hint):
            hints = get_type_hints(hint, include_extras=True)
            if part not in {entry.name for entry in fields(hint)}:
                return None
            hint = hints[str(part)]
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return None
    return hint


def _words(hint: Any) -> str:
    if is_dataclass(hint):
        return f"a section with {', '.join(entry.name for entry in fields(hint))}"
    if get_origin(hint) is dict:
        return "names, each with a section of keys"
    arguments = get_args(hint)
    if hint == list[str] or list[str] in arguments:
        return "a list of texts" + (" or null" if type(None) in arguments else "")
    return describe_type(hint)
