"""Readable test data: the word at position i of document k is str(100*k + i), and its token id is the same number."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.data.shards.index_file import HEADER, MAGIC
from megatron_ledom.data.shards.shard import Counts, ShardWriter
from megatron_ledom.direction import Direction
from megatron_ledom.provenance import Provenance

EOD_TOKEN = "<eod>"
EOD_ID = 1000
VOCAB_SIZE = 1001


def legible_tokenizer(folder: Path, *, eos: bool = True) -> Path:
    """Write a Hugging Face tokenizer folder in which the word "307" has id 307 (0..999) and <eod>, its eos, id 1000."""
    vocab = {str(number): number for number in range(EOD_ID)}
    tokenizer = Tokenizer(WordLevel({**vocab, EOD_TOKEN: EOD_ID} if eos else vocab, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    if eos:
        tokenizer.add_special_tokens([EOD_TOKEN])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": EOD_TOKEN} if eos else config))
    return folder


def legible_ids(document: int, length: int) -> list[int]:
    """Return the ids [length] of one document in text order."""
    return [100 * document + position for position in range(length)]


def legible_documents(num_documents: int, length: int) -> list[str]:
    """Return texts. With `num_documents` up to 10 and `length` up to 100 all ids are different and below 1000."""
    return [" ".join(map(str, legible_ids(document, length))) for document in range(num_documents)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def legible_provenance(direction: Direction = Direction.REVERSE, sha256: str = "a" * 64) -> Provenance:
    """Return a provenance for shards that need no tokenizer on disk."""
    return Provenance(
        direction=direction, tokenizer_name="legible", tokenizer_sha256=sha256, vocab_size=VOCAB_SIZE, eod_id=EOD_ID
    )


def legible_shard(
    prefix: Path,
    documents: Sequence[list[int]],
    provenance: Provenance | None = None,
    dtype: str = "uint16",
    counts: Counts | None = None,
) -> str:
    """Write a shard of documents, given as ids in text order, and return its prefix."""
    provenance = provenance or legible_provenance()
    ids = np.array([number for document in documents for number in document], np.uint32)
    stored = concatenate_documents(
        ids,
        np.cumsum([0, *map(len, documents)]),
        direction=provenance.direction,
        eod_id=provenance.eod_id,
        vocab_size=provenance.vocab_size,
        dtype=dtype,
    )
    with ShardWriter(str(prefix), provenance, dtype) as writer:
        writer.append(*stored)
        writer.finalize(counts or Counts(text_bytes=4 * len(ids), eod_token=EOD_TOKEN))
    return str(prefix)


def foreign_shard(prefix: Path, documents: Sequence[Sequence[list[int]]], dtype: str = "int32") -> str:
    """Write `.bin` and `.idx` like other Megatron tools, without a manifest. A document is a list of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    code = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}[dtype]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    marks = np.cumsum([0, *map(len, documents)]).astype("<i8")
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    header = HEADER.pack(MAGIC, 1, code, len(sequences), len(marks))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.astype("<i8").tobytes() + marks.tobytes())
    return str(prefix)


def file_bytes(prefix: str) -> tuple[bytes, bytes]:
    """Return the content of `.bin` and `.idx`."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
