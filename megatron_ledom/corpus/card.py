"""The data card of a corpus, in the format of the hub: sources, licences, counts, what was removed and why, hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_ledom import __version__
from megatron_ledom.corpus.blend import built_shards
from megatron_ledom.corpus.licences import licence_metadata
from megatron_ledom.corpus.listing import lock_path
from megatron_ledom.corpus.recipe import ORIGINS, Recipe, load_recipe, to_values
from megatron_ledom.corpus.skipped_files import files_skipped
from megatron_ledom.data.shards.shard import ShardManifest
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.tables import markdown_table

SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")),
    *((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T")),
)
"""Numbers of documents below which the hub has a category."""
UNKNOWN = "unknown"
CARD_NAME = "README.md"


@dataclass(kw_only=True, slots=True)
class CardSettings:
    """Options of `ledom corpus card`."""

    recipe: str
    overrides: Sequence[str] = ()
    output: str | None = None
    """File of the card; default: README.md in the output folder of the recipe."""
    report: Sequence[str] = ()
    """SOURCE=FILE: a report of filters that ran before the build, see `FilterReport`."""


@dataclass(frozen=True, slots=True)
class FilterReport:
    """The report of filters that ran on a source before the build, such as near-duplicates and quality."""

    documents_in: int
    documents_out: int
    removed: dict[str, int] = field(default_factory=dict)
    """Removed documents by reason."""
    languages: dict[str, int] = field(default_factory=dict)
    """Documents that remain, by language."""


def write_card(settings: CardSettings) -> Path:
    """Write the card and return its path."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    path = Path(settings.output or Path(recipe.output, CARD_NAME))
    text = card_text(recipe, settings.recipe, built_shards(recipe), read_reports(recipe, settings.report))
    with output_file_lock(path, "--output"):
        write_file(path, text)
    return path


def read_reports(recipe: Recipe, given: Sequence[str]) -> dict[str, FilterReport]:
    """Return the reports by source. Raise UsageError for a text that is not SOURCE=FILE, DataError for a file of another form."""
    reports = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in recipe.sources:
            raise UsageError(f"--report {text} is not of the form SOURCE=FILE, with a source of {', '.join(recipe.sources)}")
        try:
            stored: Any = json.loads(Path(path).read_bytes())
            report = FilterReport(
                int(stored["documents_in"]),
                int(stored["documents_out"]),
                {str(reason): int(number) for reason, number in stored.get("removed", {}).items()},
                {str(code): int(number) for code, number in stored.get("languages", {}).items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"--report {text} cannot be used ({type(error).__name__}: {error}); expected JSON with documents_in, documents_out,"
                " removed {reason: number} and languages {code: number}"
            ) from error
        if report.documents_in - sum(report.removed.values()) != report.documents_out:
            raise DataError(
                f"--report {text}: {report.documents_in:,} documents less the removed {sum(report.removed.values()):,} are not"
                f" {report.documents_out:,}; make the report again"
            )
        if report.languages and sum(report.languages.values()) != report.documents_out:
            raise DataError(
                f"--report {text}: its languages have {sum(report.languages.values()):,} documents, documents_out is"
                f" {report.documents_out:,}; count those of unknown language as {UNKNOWN!r}"
            )
        reports[name] = report
    return reports


def card_text(
    recipe: Recipe, recipe_path: str, shards: Mapping[str, Mapping[str, ShardManifest]], reports: Mapping[str, FilterReport]
) -> str:
    """Return the whole card."""
    totals = {name: _total(manifests.values()) for name, manifests in shards.items()}
    _check_reports(totals, reports)
    parts = [
        f"---\n{_metadata(recipe, totals, reports)}---\n",
        f"# {recipe.name}\n\n{recipe.summary}\n",
        "The files are shards of token ids for megatron_ledom, not text:"
        f" every document is stored in {recipe.direction} order and ends with the eod token.\n",
        f"## Counts\n\n{_counts(recipe, totals)}\n",
        f"## Sources\n\n{_sources(recipe, shards)}\n",
        f"## Domains\n\n{_domains(recipe, totals)}\n",
        f"## Languages\n\n{_languages(recipe, totals, reports)}\n",
        f"## Removed documents\n\n{_removed(totals, reports)}\n",
        f"## Skipped files\n\n{_skipped_files(recipe, recipe_path, shards)}\n",
        f"## How it was made\n\n{_how(recipe, recipe_path, shards)}\n",
        f"## Files\n\n{_files(shards)}\n",
    ]
    return "\n".join(parts)


def _check_reports(totals: Mapping[str, "_Total"], reports: Mapping[str, FilterReport]) -> None:
    """Raise DataError for a report whose remaining documents are not those that the build read."""
    for name, report in reports.items():
        read = totals[name].documents + totals[name].skipped.total()
        if report.documents_out != read:
            raise DataError(
                f"--report {name}: documents_out is {report.documents_out:,}, the build read {read:,} documents of {name}"
                f" ({totals[name].documents:,} stored, {totals[name].skipped.total():,} skipped); give the report of these files"
            )


@dataclass(slots=True)
class _Total:
    """Sums over the shards of a source."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def _total(manifests: Any) -> _Total:
    total = _Total()
    for manifest in manifests:
        total.documents += manifest.num_documents
        total.tokens += manifest.num_tokens
        total.text_bytes += manifest.text_bytes
        total.skipped.update(manifest.skipped)
    return total


def _metadata(recipe: Recipe, totals: Mapping[str, _Total], reports: Mapping[str, FilterReport]) -> str:
    """Return the YAML that the hub reads."""
    languages = sorted(code for code in _language_counts(recipe, totals, reports) if code != UNKNOWN)
    documents = sum(total.documents for total in totals.values())
    values: dict[str, Any] = {
        "pretty_name": recipe.name,
        **licence_metadata(source.licence for source in recipe.sources.values()),
        **({"language": languages} if languages else {}),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if documents < limit), "n>1T")],
        "tags": ["megatron-ledom", f"{recipe.direction}-language-model", "token-ids"],
    }
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _counts(recipe: Recipe, totals: Mapping[str, _Total]) -> str:
    everything = sum(total.tokens for total in totals.values())
    rows = [["source", "domain", "documents", "tokens", "bytes of text", "share of tokens", "wanted tokens"]]
    for name, total in totals.items():
        wanted = recipe.wanted(recipe.sources[name])
        rows.append(
            [
                *(name, recipe.sources[name].domain, f"{total.documents:,}", f"{total.tokens:,}", f"{total.text_bytes:,}"),
                f"{total.tokens / max(1, everything):.2%}",
                "all" if wanted is None else f"{wanted:,}",
            ]
        )
    sums = [sum(getattr(total, key) for total in totals.values()) for key in ("documents", "tokens", "text_bytes")]
    rows.append(["all", "", *(f"{number:,}" for number in sums), "100.00%", ""])
    return markdown_table(rows, "llrrrrr")


def _sources(recipe: Recipe, shards: Mapping[str, Mapping[str, ShardManifest]]) -> str:
    rows = [["source", "address", "revision", "licence", "files read", "origin"]]
    for name, source in recipe.sources.items():
        manifests = list(shards[name].values())
        revisions = {manifest.source.get("revision") for manifest in manifests}
        files = {file.path for manifest in manifests for file in manifest.input_files}
        rows.append(
            [
                *(name, source.address, ", ".join(sorted(str(one or "none") for one in revisions))),
                *(source.licence, f"{len(files):,}", f"{source.origin}: {ORIGINS[source.origin]}"),
            ]
        )
    terms = [
        f"- **{name}**: {source.terms}" + (f" {source.homepage}" if source.homepage else "")
        for name, source in recipe.sources.items()
    ]
    notes = [f"- **{name}**: {source.notes}" for name, source in recipe.sources.items() if source.notes]
    parts = [markdown_table(rows, "llllrl"), "\nTerms:\n", *terms]
    return "\n".join([*parts, "\nNotes:\n", *notes] if notes else parts)


def _domains(recipe: Recipe, totals: Mapping[str, _Total]) -> str:
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for name, total in totals.items():
        documents[recipe.sources[name].domain] += total.documents
        tokens[recipe.sources[name].domain] += total.tokens
    rows = [["domain", "documents", "tokens"]]
    rows += [[name, f"{documents[name]:,}", f"{number:,}"] for name, number in tokens.most_common()]
    return markdown_table(rows, "lrr")


def _language_counts(recipe: Recipe, totals: Mapping[str, _Total], reports: Mapping[str, FilterReport]) -> Counter[str]:
    """Return the documents by language: by the report of a source, else by the language that the recipe states for it."""
    found: Counter[str] = Counter()
    for name, total in totals.items():
        if name in reports and reports[name].languages:
            found.update(reports[name].languages)
        else:
            found[recipe.sources[name].language or UNKNOWN] += total.documents
    return found


def _languages(recipe: Recipe, totals: Mapping[str, _Total], reports: Mapping[str, FilterReport]) -> str:
    rows = [["language", "documents"]]
    rows += [[code, f"{number:,}"] for code, number in _language_counts(recipe, totals, reports).most_common()]
    measured = [name for name in totals if name in reports and reports[name].languages]
    how = (
        f"Measured for {', '.join(measured)}, as stated by the recipe for the others."
        if measured
        else "As stated by the recipe."
    )
    return f"{markdown_table(rows, 'lr')}\n\n{how}"


def _removed(totals: Mapping[str, _Total], reports: Mapping[str, FilterReport]) -> str:
    rows = [["source", "step", "reason", "documents"]]
    for name, total in totals.items():
        if name in reports:
            rows += [
                [name, "filters before the build", reason, f"{number:,}"] for reason, number in reports[name].removed.items()
            ]
        rows += [[name, "build", reason, f"{number:,}"] for reason, number in sorted(total.skipped.items())]
    return markdown_table(rows, "lllr") if len(rows) > 1 else "None."


def _skipped_files(recipe: Recipe, recipe_path: str, shards: Mapping[str, Mapping[str, ShardManifest]]) -> str:
    rows = [["source", "reason", "number of files", "files"]]
    for name in recipe.sources:
        for reason, number, named in files_skipped(recipe, name, recipe_path, list(shards[name].values())):
            more = "" if number is None or len(named) >= number else ", ..." if named else ""
            rows.append([name, reason, UNKNOWN if number is None else f"{number:,}", ", ".join(named) + more])
    return markdown_table(rows, "llrl") if len(rows) > 1 else "None."


def _how(recipe: Recipe, recipe_path: str, shards: Mapping[str, Mapping[str, ShardManifest]]) -> str:
    first = next(manifest for manifests in shards.values() for manifest in manifests.values())
    lines = [
        f"- megatron_ledom {__version__}: `ledom corpus build` with the recipe {Path(recipe_path).name}; with all overrides it has the"
        f" SHA-256 {hashlib.sha256(recipe_text(recipe).encode()).hexdigest()} (recipe.yaml of a publication)",
        f"- tokenizer {first.tokenizer_name}, SHA-256 {first.tokenizer_sha256}, {first.vocab_size:,} ids,"
        f" eod {first.eod_token!r} = {first.eod_id}",
        f"- direction {first.direction}",
    ]
    lock = lock_path(recipe_path)
    if lock.exists():
        lines.append(f"- files and revisions: {lock.name} (SHA-256 {sha256_of(str(lock))})")
    filters = {name: _set_filters(recipe, name) for name in recipe.sources}
    lines += [f"- choice of {name}: {', '.join(_choices(recipe, name))}" for name in recipe.sources]
    if recipe.shuffle_seed is not None:
        lines.append(f"- documents of each shard shuffled with shuffle_seed={recipe.shuffle_seed}")
    lines += [f"- filters of {name}: {', '.join(found)}" for name, found in filters.items() if found]
    for name, manifests in shards.items():
        searched = [manifest.decontamination for manifest in manifests.values() if manifest.decontamination]
        if searched:
            documents: Counter[str] = Counter()
            for found in searched:
                documents.update(found["documents"])
            lines.append(f"- evaluation items in {name}: {json.dumps(dict(documents))}")
    return "\n".join(lines)


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe with its base and all overrides as YAML: what was built, and what is published."""
    return str(yaml.safe_dump(to_values(recipe), sort_keys=False, allow_unicode=True, width=120))


def _set_filters(recipe: Recipe, name: str) -> list[str]:
    filters = recipe.filters_of(recipe.sources[name])
    return [f"{key}={value}" for key in _names(filters) if (value := getattr(filters, key)) is not None]


def _names(settings: Any) -> list[str]:
    return [entry.name for entry in fields(settings)]


def _choices(recipe: Recipe, name: str) -> list[str]:
    """Return the settings by which the text of a source was chosen, other than filters."""
    source = recipe.sources[name]
    text = f"text_template={source.text_template!r}" if source.text_template is not None else f"text_key={source.text_key}"
    parts = [f"files={source.files}", text]
    return parts + [f"{key}={value}" for key in ("sample", "most_bytes") if (value := getattr(source, key)) is not None]


def _files(shards: Mapping[str, Mapping[str, ShardManifest]]) -> str:
    rows = [["shard", "SHA-256 of .bin", "SHA-256 of .idx"]]
    rows += [
        [Path(prefix).name, manifest.bin_sha256, manifest.idx_sha256]
        for manifests in shards.values()
        for prefix, manifest in manifests.items()
    ]
    return markdown_table(rows)
