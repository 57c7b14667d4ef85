"""Held-out text by ratio: which documents of a shard are trained on, validated on and tested on."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.data.shard import DTYPE_CODES, HEADER, ShardManifest
from megatron_ledom.errors import DataError

POINTER = struct.Struct("<q")
ID_BYTES = {"uint16": 2, "int32": 4}
assert ID_BYTES.keys() == DTYPE_CODES.keys()


@dataclass(frozen=True, slots=True)
class DocumentRange:
    """Consecutive documents of a shard."""

    first: int
    last: int
    """Behind the last one."""
    num_tokens: int


def whole_shard(manifest: ShardManifest) -> DocumentRange:
    """All documents."""
    return DocumentRange(0, manifest.num_documents, manifest.num_tokens)


def split_shard(prefix: str, manifest: ShardManifest, ratios: Sequence[float]) -> list[DocumentRange]:
    """The documents for training, validation and test, in this order in the shard: by number of documents, as megatron-core
    divides them. Reads a few numbers of `.idx`, none of `.bin`."""
    total, count = sum(ratios), manifest.num_documents
    borders = [round(sum(ratios[:number]) / total * count) for number in range(len(ratios))] + [count]
    tokens = [_tokens_before(prefix, manifest, border) for border in borders]
    parts = zip(borders[:-1], borders[1:], tokens[:-1], tokens[1:], strict=True)
    return [DocumentRange(first, last, end - begin) for first, last, begin, end in parts]


def _tokens_before(prefix: str, manifest: ShardManifest, document: int) -> int:
    if document == manifest.num_documents:
        return manifest.num_tokens
    with open(f"{prefix}.idx", "rb") as stream:
        stream.seek(HEADER.size + 4 * manifest.num_documents + POINTER.size * document)
        content = stream.read(POINTER.size)
    if len(content) < POINTER.size:
        raise DataError(f"{prefix}.idx is truncated; copy the shard again")
    tokens: int = POINTER.unpack(content)[0] // ID_BYTES[manifest.dtype]
    return tokens
