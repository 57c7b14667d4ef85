"""What a shard holds, for people: manifest, statistics, documents as text in reading order, and every fault."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ledom.data.shard import ShardManifest, ShardReader
from megatron_ledom.data.shard_faults import verify_shard
from megatron_ledom.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.direction import to_text_order
from megatron_ledom.errors import MismatchError, UsageError, VerificationError


@dataclass(kw_only=True, slots=True)
class InspectSettings:
    """What tools/inspect_shard.py was asked."""

    prefix: str
    verify: bool = False
    show: int = 0
    """Documents to print as text."""
    tokenizer: str | None = None
    """Default: the one the manifest names, if it is still there and the same."""


def inspect_shard(settings: InspectSettings) -> None:
    """Print to stdout; raise VerificationError after the report when `verify` finds a fault."""
    reader = ShardReader(settings.prefix)
    print(describe(reader))
    if settings.show:
        tokenizer = find_tokenizer(reader.manifest, settings.tokenizer)
        for index in range(min(settings.show, len(reader))):
            print(f"\n--- document {index}, {reader.lengths[index]:,} tokens ---")
            print(text_of(reader, index, tokenizer))
    if settings.verify:
        faults = verify_shard(settings.prefix)
        if faults:
            raise VerificationError("; ".join(faults) + "; copy the shard again or make it again with tools/preprocess_data.py")
        print(f"verified   all {reader.manifest.num_tokens:,} tokens: hashes, index, range of ids and eods are right")


def describe(reader: ShardReader) -> str:
    """The manifest and the statistics as lines of text."""
    manifest, lengths = reader.manifest, reader.lengths
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
    if len(lengths):
        rows["lengths"] = f"mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, max {lengths.max():,} tokens a document"
    for source in manifest.input_files:
        rows[f"input {source.path}"] = f"{source.num_bytes:,} bytes, sha256 {source.sha256}"
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


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
