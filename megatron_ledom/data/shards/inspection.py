"""Show the content of shards: manifest, statistics, documents in text order, and every problem.

The lengths of documents are counted exactly, in memory that does not grow with their number, and shown as text or as a plot.
"""

import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shards.index_file import CHUNK_DOCUMENTS
from megatron_ledom.data.shards.model_order import text_ids_of
from megatron_ledom.data.shards.prefixes import expand_prefixes
from megatron_ledom.data.shards.shard import ShardManifest, ShardReader
from megatron_ledom.data.shards.verification import INSIDE, check_direction, verify_shard
from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError, visible
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

EOD_INSIDE_ADVICE = (
    "; the eod came from a text that spells it: this version stores it as text, or reports the record as a bad one"
)
MOST_INPUTS = 20
"""Limit on the input files that are printed."""
COUNTED_BELOW = 1 << 17  # shorter lengths have a counter each; the few longer ones are counted in a dictionary
LONG_TOKENS = 8192
BAR_CHARACTERS = 40


@dataclass(kw_only=True, slots=True)
class InspectSettings:
    """Options of `ledom inspect-shard`."""

    prefixes: list[str]
    """Shards, or patterns of them."""
    verify: bool = False
    show: int = 0
    """Number of documents of each shard to print as text."""
    tokenizer: str | None = None
    """Default: the tokenizer at the path in the manifest, if it still exists and is the same."""
    histogram: str | None = None
    """A .png file, for a histogram of the lengths of all documents of all shards."""


def inspect_shards(settings: InspectSettings) -> None:
    """Print the shards to stdout and their problems to stderr, one per line. Raises VerificationError at the end if there are any."""
    prefixes = expand_prefixes(settings.prefixes)
    if settings.histogram:
        check_can_draw(settings.histogram)
    counts = LengthCounts()
    damaged, has_eod_inside = [], False
    for number, prefix in enumerate(prefixes):
        if number:
            print()
        problems = _inspect(prefix, settings, counts)
        has_eod_inside = has_eod_inside or any(INSIDE in problem for problem in problems)
        for problem in problems:
            print(f"problem: {visible(problem)}", file=sys.stderr)
        if problems:
            damaged.append(f"{prefix} ({len(problems)} problem{'s'[: len(problems) > 1]})")
    if settings.histogram:
        draw_histogram(counts, prefixes, settings.histogram)
    if damaged:
        raise VerificationError(
            f"{len(damaged)} of {len(prefixes)} shards damaged: {', '.join(damaged)}; copy them again or make them again with"
            " ledom preprocess-data --overwrite" + (EOD_INSIDE_ADVICE if has_eod_inside else "")
        )


@dataclass(slots=True)
class LengthCounts:
    """Number of documents of each length, in tokens with eod."""

    short: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(COUNTED_BELOW, np.int64))
    long: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of_shard(cls, reader: ShardReader) -> "LengthCounts":
        """Count the documents of a shard."""
        counts = cls()
        for first in range(0, len(reader), CHUNK_DOCUMENTS):
            counts.add(reader.lengths[first : first + CHUNK_DOCUMENTS])
        return counts

    def add(self, lengths: npt.NDArray[np.int32]) -> None:
        """Add documents with these lengths [documents]."""
        possible = lengths[(lengths >= 0) & (lengths < COUNTED_BELOW)]
        self.short += np.bincount(possible, minlength=COUNTED_BELOW)
        self.long.update(lengths[lengths >= COUNTED_BELOW].tolist())

    def merge(self, other: "LengthCounts") -> None:
        """Add the documents of `other`."""
        self.short += other.short
        self.long.update(other.long)

    def table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (lengths that occur, ascending; number of documents of each)."""
        short = np.flatnonzero(self.short)
        long = np.array(sorted(self.long), np.int64)
        of_long = np.array([self.long[int(length)] for length in long], np.int64)
        return np.concatenate([short, long]), np.concatenate([self.short[short], of_long])

    def describe(self) -> str:
        """Return the statistics as one line; empty without documents."""
        lengths, documents = self.table()
        if not len(lengths):
            return ""
        total = int(documents.sum())
        ends = np.cumsum(documents)

        def percentile(fraction: float) -> int:
            """Return the smallest length that at least `fraction` of the documents do not exceed."""
            return int(lengths[np.searchsorted(ends, max(1, int(np.ceil(fraction * total))))])

        mean = float((lengths * documents).sum()) / total
        over = int(documents[lengths > LONG_TOKENS].sum())
        percentiles = ", ".join(f"p{number} {percentile(number / 100):,}" for number in (5, 25, 75, 95, 99))
        return (
            f"min {lengths[0]:,}, mean {mean:,.1f}, median {percentile(0.5):,}, max {lengths[-1]:,} tokens per document;"
            f" {percentiles}; {over / total:.2%} over {LONG_TOKENS:,}"
        )

    def bins(self) -> tuple[list[int], list[int]]:
        """Return (edges, number of documents in [edge, next edge)). Edges are powers of two. Both are empty without documents."""
        lengths, documents = self.table()
        if not len(lengths):
            return [], []
        first, last = (max(1, int(length)).bit_length() - 1 for length in (lengths[0], lengths[-1]))
        edges = [1 << power for power in range(first, last + 2)]
        which = np.searchsorted(edges, lengths, side="right") - 1
        return edges, np.bincount(np.maximum(which, 0), weights=documents, minlength=len(edges) - 1).astype(int).tolist()

    def histogram(self) -> str:
        """Return a histogram as text, one line per bin."""
        edges, documents = self.bins()
        rows = []
        for begin, end, count in zip(edges, edges[1:], documents, strict=False):
            bar = "#" * max(round(BAR_CHARACTERS * count / max(documents)), int(count > 0))
            rows.append(f"{f'{begin:,} to {end - 1:,}':>21}  {count:>15,}  {bar}".rstrip())
        return "\n".join([f"{'tokens':>21}  {'documents':>15}", *rows])


def _inspect(prefix: str, settings: InspectSettings, counts: LengthCounts) -> list[str]:
    """Print one shard and return its problems."""
    try:
        reader = ShardReader(prefix)
    except DataError as error:
        return verify_shard(prefix) or [str(error)] if settings.verify else [str(error)]
    lengths = LengthCounts.of_shard(reader)
    counts.merge(lengths)
    print(visible(describe(reader, lengths)))
    if settings.show:
        tokenizer = find_tokenizer(reader.manifest, settings.tokenizer)
        for index in range(min(settings.show, len(reader))):
            print(f"\n--- document {index}, {reader.lengths[index]:,} tokens ---")
            print(visible(text_of(reader, index, tokenizer)))
    return _verify(reader, settings.tokenizer) if settings.verify else []


def _verify(reader: ShardReader, tokenizer_path: str | None) -> list[str]:
    """Return the problems that `verify_shard` finds, or else a wrong model order. Prints the checks that passed."""
    problems = verify_shard(reader.prefix)
    if problems:
        return problems
    print(f"verified   all {reader.manifest.num_tokens:,} tokens: hashes, index, range of ids, and eods are right")
    try:
        tokenizer = find_tokenizer(reader.manifest, tokenizer_path)
    except (UsageError, MismatchError) as error:
        if tokenizer_path:
            raise
        print(f"direction  not checked: {visible(str(error))}")
        return []
    check = check_direction(reader, tokenizer)
    if check.is_wrong:
        return [f"{reader.prefix}.json: {check.describe()}; reverse it with ledom reverse-shards, or correct the manifest"]
    print(f"direction  {visible(check.describe())}")
    return []


def describe(reader: ShardReader, lengths: LengthCounts) -> str:
    """Return the manifest and the statistics as lines of text."""
    manifest = reader.manifest
    rows = {
        "shard": reader.prefix,
        "direction": str(manifest.direction),
        **_reading_rows(manifest),
        "tokenizer": f"{manifest.tokenizer_name}, {manifest.vocab_size:,} ids, sha256 {manifest.tokenizer_sha256}",
        "eod": f"{manifest.eod_token} = {manifest.eod_id}",
        "dtype": manifest.dtype,
        "documents": f"{manifest.num_documents:,}",
        "tokens": f"{manifest.num_tokens:,} with eods",
        "text": f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / max(1, manifest.num_tokens):.2f} per token",
        "skipped": ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none",
        "made": f"{manifest.created_at} by version {manifest.package_version}",
        "bin sha256": manifest.bin_sha256,
        "idx sha256": manifest.idx_sha256,
    }
    if statistics := lengths.describe():
        rows["lengths"] = statistics
    for source in manifest.input_files[:MOST_INPUTS]:
        rows[f"input {source.path}"] = f"{source.num_bytes:,} bytes from byte {source.first_byte:,}, sha256 {source.sha256}"
    if len(manifest.input_files) > MOST_INPUTS:
        rows["and"] = f"{len(manifest.input_files) - MOST_INPUTS:,} more byte ranges of input files, in {reader.prefix}.json"
    text = "\n".join(f"{name:<10} {value}" for name, value in rows.items())
    return f"{text}\n\n{lengths.histogram()}" if statistics else text


def _reading_rows(manifest: ShardManifest) -> dict[str, str]:
    """Return the rows about unit and marker; none for a plain shard."""
    reading, tokens = manifest.model_order, manifest.reading_tokens
    if reading.is_plain:
        return {}
    added = {"marker": reading.marker_id, "boundary": reading.boundary_id}
    lengths = f", of 1 to {tokens['segment_tokens']} tokens, seed {tokens['seed']}" if "segment_tokens" in tokens else ""
    rows = {"unit": f"{reading.unit}{lengths}"}
    return rows | {name: f"{tokens.get(name, '')} = {id_}" for name, id_ in added.items() if id_ is not None}


def text_of(reader: ShardReader, index: int, tokenizer: Tokenizer) -> str:
    """Return a document as text, without its marker and eod."""
    return tokenizer.decode(text_ids_of(reader.document(index), reader.manifest, tokenizer))


def find_tokenizer(manifest: ShardManifest, path: str | None) -> Tokenizer:
    """Return the tokenizer at `path`, or else at the path in the manifest. Raises MismatchError if the shard was made with another."""
    where = path or manifest.tokenizer_path
    if not where or not Path(where).exists():
        raise UsageError(f"the shard's tokenizer is not at {where or 'a recorded path'}; name it by --tokenizer")
    tokenizer = load_tokenizer(where, manifest.eod_token or None)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise MismatchError(
            f"tokenizer {where} ({tokenizer.sha256[:12]}) is not that of the shard, {manifest.tokenizer_name}"
            f" ({manifest.tokenizer_sha256[:12]}); name that one by --tokenizer"
        )
    return tokenizer


def check_can_draw(path: str) -> None:
    """Raise UsageError if no plot can be written to `path`. Call before the long work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("--histogram needs matplotlib, which is not installed: pip install matplotlib") from error
    if not path.endswith(".png"):
        raise UsageError(f"--histogram {path} is not a .png file; give a name that ends with .png")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"the folder of --histogram {path} does not exist; make it, or give another name")


def draw_histogram(counts: LengthCounts, prefixes: Sequence[str], path: str) -> None:
    """Write a plot of the histogram."""
    from matplotlib.figure import Figure

    edges, documents = counts.bins()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(documents, edges or [1], fill=True)
    axes.set_xscale("log", base=2)
    axes.axvline(LONG_TOKENS, color="black", linewidth=0.8, linestyle="dashed", label=f"{LONG_TOKENS:,}")
    axes.set(xlabel="tokens per document, with eod", ylabel="documents")
    axes.set_title(prefixes[0] if len(prefixes) == 1 else f"{prefixes[0]} and {len(prefixes) - 1} more")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    with output_file_lock(path, "--histogram"):
        write_file(path, picture.getvalue())
