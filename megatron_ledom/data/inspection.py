"""What shards hold, for people: manifest, statistics, documents as text in reading order, and every fault."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.data.direction_check import check_direction
from megatron_ledom.data.length_statistics import LengthCounts, check_can_draw, draw_histogram
from megatron_ledom.data.prefixes import expand_prefixes
from megatron_ledom.data.shard import ShardManifest, ShardReader
from megatron_ledom.data.shard_faults import INSIDE, verify_shard
from megatron_ledom.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.direction import to_text_order
from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError, visible

EOD_INSIDE_ADVICE = (
    "; a text that spells its eod brought it into a document: this version stores it as text, or names the record as a bad one"
)
MOST_INPUTS = 20
"""Input files that are printed."""


@dataclass(kw_only=True, slots=True)
class InspectSettings:
    """What tools/inspect_shard.py was asked."""

    prefixes: list[str]
    """Shards, or patterns of them."""
    verify: bool = False
    show: int = 0
    """Documents of each shard to print as text."""
    tokenizer: str | None = None
    """Default: the one the manifest names, if it is still there and the same."""
    histogram: str | None = None
    """A .png file for the lengths of all documents of all shards."""


def inspect_shards(settings: InspectSettings) -> None:
    """Print to stdout; faults go to stderr, one a line, and raise VerificationError after the last shard."""
    prefixes = expand_prefixes(settings.prefixes)
    if settings.histogram:
        check_can_draw(settings.histogram)
    counts = LengthCounts()
    faulty, has_eod_inside = [], False
    for number, prefix in enumerate(prefixes):
        if number:
            print()
        faults = _inspect(prefix, settings, counts)
        has_eod_inside = has_eod_inside or any(INSIDE in fault for fault in faults)
        for fault in faults:
            print(f"fault: {visible(fault)}", file=sys.stderr)
        if faults:
            faulty.append(f"{prefix} ({len(faults)} fault{'s'[: len(faults) > 1]})")
    if settings.histogram:
        draw_histogram(counts, prefixes, settings.histogram)
    if faulty:
        raise VerificationError(
            f"{len(faulty)} of {len(prefixes)} shards faulty: {', '.join(faulty)}; copy them again or make them again with"
            " tools/preprocess_data.py --overwrite" + (EOD_INSIDE_ADVICE if has_eod_inside else "")
        )


def _inspect(prefix: str, settings: InspectSettings, counts: LengthCounts) -> list[str]:
    """Print one shard and return its faults."""
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
    """Everything `verify_shard` finds and, in files without fault, a wrong direction; prints what was right."""
    faults = verify_shard(reader.prefix)
    if faults:
        return faults
    print(f"verified   all {reader.manifest.num_tokens:,} tokens: hashes, index, range of ids and eods are right")
    try:
        tokenizer = find_tokenizer(reader.manifest, tokenizer_path)
    except (UsageError, MismatchError) as error:
        if tokenizer_path:
            raise
        print(f"direction  not checked: {visible(str(error))}")
        return []
    check = check_direction(reader, tokenizer)
    if check.is_wrong:
        return [f"{reader.prefix}.json: {check.describe()}; turn it with tools/reverse_shards.py, or put the manifest right"]
    print(f"direction  {visible(check.describe())}")
    return []


def describe(reader: ShardReader, lengths: LengthCounts) -> str:
    """The manifest and the statistics as lines of text."""
    manifest = reader.manifest
    rows = {
        "shard": reader.prefix,
        "direction": str(manifest.direction),
        "tokenizer": f"{manifest.tokenizer_name}, {manifest.vocab_size:,} ids, sha256 {manifest.tokenizer_sha256}",
        "eod": f"{manifest.eod_token} = {manifest.eod_id}",
        "dtype": manifest.dtype,
        "documents": f"{manifest.num_documents:,}",
        "tokens": f"{manifest.num_tokens:,} with eods",
        "text": f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / max(1, manifest.num_tokens):.2f} a token",
        "skipped": ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none",
        "made": f"{manifest.created_at} by version {manifest.package_version}",
        "bin sha256": manifest.bin_sha256,
        "idx sha256": manifest.idx_sha256,
    }
    if statistics := lengths.describe():
        rows["lengths"] = statistics
    for source in manifest.input_files[:MOST_INPUTS]:
        rows[f"input {source.path}"] = f"{source.num_bytes:,} bytes from {source.first_byte:,} on, sha256 {source.sha256}"
    if len(manifest.input_files) > MOST_INPUTS:
        rows["and"] = f"{len(manifest.input_files) - MOST_INPUTS:,} more stretches of input files, in {reader.prefix}.json"
    text = "\n".join(f"{name:<10} {value}" for name, value in rows.items())
    return f"{text}\n\n{lengths.histogram()}" if statistics else text


def text_of(reader: ShardReader, index: int, tokenizer: Tokenizer) -> str:
    """One document as it is read, without its eod."""
    return tokenizer.decode(to_text_order(reader.document(index)[:-1], reader.manifest.direction))


def find_tokenizer(manifest: ShardManifest, path: str | None) -> Tokenizer:
    """The tokenizer at `path`, else where the manifest says it was; refused unless it is the one the shard was made with."""
    where = path or manifest.tokenizer_path
    if not where or not Path(where).exists():
        raise UsageError(f"the shard's tokenizer is not at {where or 'a recorded path'}; name it by --tokenizer")
    tokenizer = load_tokenizer(where, manifest.eod_token or None)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise MismatchError(
            f"tokenizer {where} ({tokenizer.sha256[:12]}) is not the one of the shard, {manifest.tokenizer_name}"
            f" ({manifest.tokenizer_sha256[:12]}); name that one by --tokenizer"
        )
    return tokenizer
