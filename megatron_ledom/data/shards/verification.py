"""Verify a shard by reading all of it once. Every problem is one sentence that names the file and the document.

A changed direction in the manifest cannot be recognized from the files. It is checked by decoding documents to text and encoding
the text again: only the right order returns the same ids.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shards.index_file import CHUNK_DOCUMENTS, HEADER, SHARD_DTYPES, index_bytes, map_index, shard_header
from megatron_ledom.data.shards.model_order import contents, unit_order
from megatron_ledom.data.shards.shard import TARGETS, ShardManifest, ShardReader, load_manifest
from megatron_ledom.direction import Direction, Reading
from megatron_ledom.errors import DataError
from megatron_ledom.reversal_units import UnitOrder
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

BLOCK_BYTES = 1 << 22
INSIDE = "inside, at its id"
"""Words in the description of an eod that is not at the end of a document."""
SAMPLE_DOCUMENTS = 64
LONGEST_IDS = 20_000  # longer documents are not checked, so that the check takes seconds
CLEAR = 3
"""One order is clear if it has more than this factor as many documents as the other one."""


def verify_shard(prefix: str) -> list[str]:
    """Return the problems of a shard; an empty list means it is intact. Raises UsageError if there is no such shard.

    This uses only the files, so it cannot recognize a changed direction in the manifest: see `check_direction`.
    """
    try:
        manifest = load_manifest(prefix)
    except DataError as error:
        return [str(error)]
    if manifest.dtype not in SHARD_DTYPES:
        return [f"{prefix}.json: dtype {manifest.dtype!r} is not one of {[*SHARD_DTYPES]}"]
    missing = [f"{prefix}{suffix} is missing" for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if missing:
        return missing
    index = Index(prefix, manifest)
    if not index.is_readable:
        is_same = sha256_of(f"{prefix}.bin") == manifest.bin_sha256
        return [*index.problems, *_size_problems(prefix, manifest, is_same), *([] if is_same else [_changed(prefix, ".bin")])]
    ids = IdScan(prefix, manifest)
    for stated in index.documents():
        ids.add(stated)
    ids.finish()
    targets = [_changed(prefix, TARGETS)] if manifest.pairs and not _has_its_targets(prefix, manifest) else []
    return [*index.problems, *_size_problems(prefix, manifest, ids.is_same), *ids.problems, *targets]


def _has_its_targets(prefix: str, manifest: ShardManifest) -> bool:
    return Path(prefix + TARGETS).is_file() and sha256_of(prefix + TARGETS) == manifest.targets_sha256


def _changed(prefix: str, suffix: str) -> str:
    return f"{prefix}{suffix} does not have the sha256 of its manifest: its content was changed or damaged"


def _size_problems(prefix: str, manifest: ShardManifest, is_same: bool) -> list[str]:
    """Return the problem of the size of .bin, if any. is_same: .bin has the sha256 of the manifest."""
    found = Path(f"{prefix}.bin").stat().st_size
    itemsize = np.dtype(manifest.dtype).itemsize
    size = manifest.num_tokens * itemsize
    if found == size:
        return []
    if is_same:
        return [
            f"{prefix}.json: num_tokens is {manifest.num_tokens:,}, but .bin, whose sha256 is right, has {found // itemsize:,}:"
            " the manifest was changed"
        ]
    state = "truncated" if found < size else "too long"
    return [f"{prefix}.bin is {state}: it has {found:,} bytes, its manifest says {size:,}"]


class Index:
    """The .idx of a shard, read in blocks and compared with the manifest and the rules of the format."""

    def __init__(self, prefix: str, manifest: ShardManifest) -> None:
        self.prefix = prefix
        self.itemsize = np.dtype(manifest.dtype).itemsize
        self.problems: list[str] = []
        self.count = 0
        """Number of documents in its own header."""
        path = f"{prefix}.idx"
        is_same = sha256_of(path) == manifest.idx_sha256
        self.is_readable = self._read_header(path, manifest, is_same)
        """True if the documents can be separated: header and size agree with each other and with the dtype of the manifest."""
        if not is_same:
            self.problems.append(_changed(prefix, ".idx"))

    def _read_header(self, path: str, manifest: ShardManifest, is_same: bool) -> bool:
        size = Path(path).stat().st_size
        with open(path, "rb") as stream:
            content = stream.read(HEADER.size)
        if len(content) < HEADER.size:
            self.problems.append(f"{path} is truncated: it has {size} bytes, its header alone needs {HEADER.size}")
            return False
        header = HEADER.unpack(content)
        self.count = header[3]
        if header != shard_header(manifest.dtype, self.count):
            self.problems.append(f"{path} has the header {header}, which does not fit a shard of {manifest.dtype} ids")
            return False
        needed = index_bytes(self.count, self.count)
        if size != needed:
            state = "truncated" if size < needed else "too long"
            self.problems.append(f"{path} is {state}: it has {size:,} bytes, its {self.count:,} documents need {needed:,}")
            return False
        if self.count != manifest.num_documents:
            found = f"{self.prefix}.json: num_documents is {manifest.num_documents:,}, but .idx has {self.count:,} documents"
            cause = ", and its sha256 is right: the manifest was changed" if is_same else ": it is the .idx of another shard"
            self.problems.append(found + cause)
        return True

    def documents(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the lengths of all documents, in blocks. After the last block their problems are added to `problems`."""
        stored: tuple[npt.NDArray[Any], ...] = map_index(f"{self.prefix}.idx", self.count, self.count)
        end, first_wrong = 0, [-1, -1, -1]
        for first in range(0, self.count, CHUNK_DOCUMENTS):
            lengths, pointers, marks = (part[first : first + CHUNK_DOCUMENTS] for part in stored)
            lengths = lengths[: self.count - first].astype(np.int64)
            marks = marks[: len(lengths)]
            starts = end + np.cumsum(lengths) - lengths
            wrong = [lengths < 2, pointers != starts * self.itemsize, marks != np.arange(first, first + len(lengths))]
            for kind, where in enumerate(wrong):
                if first_wrong[kind] < 0 and where.any():
                    first_wrong[kind] = first + int(where.argmax())
            end += int(lengths.sum())
            yield lengths
        if first_wrong[2] < 0 and stored[2][self.count] != self.count:
            first_wrong[2] = self.count
        words = [
            "has length {}, so it has no token before its eod",
            "begins at byte {}; from there on the pointers are not the running sum of the lengths",
            "has index {}; from there on the document indices are not 0, 1, 2, ...",
        ]
        for part, document, text in zip(stored, first_wrong, words, strict=True):
            if document >= 0:
                self.problems.append(f"{self.prefix}.idx: document {document} {text.format(f'{int(part[document]):,}')}")
        size = Path(f"{self.prefix}.bin").stat().st_size
        if end * self.itemsize != size:
            self.problems.append(
                f"{self.prefix}.idx: the lengths add up to {end * self.itemsize:,} bytes, .bin has {size:,}; every document after"
                " the first wrong length is shifted"
            )


@dataclass(slots=True)
class Finding:
    """One kind of problem of the ids, with its first position and the number of documents that have it."""

    text: str
    num_documents: int
    last_document: int


class IdScan:
    """Scan of .bin along its index: checks the range of ids, the one eod at the end of each document, and the hash."""

    def __init__(self, prefix: str, manifest: ShardManifest) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.dtype = np.dtype(manifest.dtype)
        self.is_same = False
        """True after `finish` if .bin has the sha256 of the manifest."""
        self._digest = hashlib.sha256()
        self._stream = io.FileIO(f"{prefix}.bin")
        self._findings: dict[str, Finding] = {}
        self._document = 0
        self._position = 0

    @property
    def problems(self) -> list[str]:
        """Problems found so far."""
        found = [
            f"{self.prefix}.bin: {finding.text}"
            + (f" (and {finding.num_documents - 1:,} more documents)" if finding.num_documents > 1 else "")
            for finding in self._findings.values()
        ]
        if not self.is_same:
            hint = "" if found else "; all ids and eods are valid, so the changed document cannot be located"
            found.insert(0, _changed(self.prefix, ".bin") + hint)
        return found

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Check the next documents, which have these lengths."""
        ends = np.cumsum(lengths)
        most_ids = BLOCK_BYTES // self.dtype.itemsize
        total = int(ends[-1]) if len(ends) and (lengths >= 0).all() else 0  # a negative length makes documents inseparable
        for begin in range(0, total, most_ids):
            ids = self._read(min(most_ids, total - begin))
            self._check(ids, ends, begin)
            self._position += len(ids)
        self._document += len(lengths)

    def _read(self, count: int) -> npt.NDArray[Any]:
        content = self._stream.read(count * self.dtype.itemsize) or b""
        self._digest.update(content)
        return np.frombuffer(content, self.dtype, len(content) // self.dtype.itemsize)

    def _check(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], begin: int) -> None:
        """Check `ids`, which begin at position `begin` of the documents that end at `ends`."""
        eod, vocab_size = self.manifest.eod_id, self.manifest.vocab_size
        last = ends[np.searchsorted(ends, begin, side="right") : np.searchsorted(ends, begin + len(ids), side="right")]
        last = last - 1 - begin
        is_outside = ids >= vocab_size if ids.dtype.kind == "u" else (ids < 0) | (ids >= vocab_size)
        outside = np.flatnonzero(is_outside)
        if len(outside):
            where = int(outside[0])
            text = f"{{}}: id {ids[where]} at {self._position + where} is outside the {vocab_size:,} ids"
            self._found("range", text, ends, begin + outside)
        open_ends = last[ids[last] != eod]
        if len(open_ends):
            text = f"its last id is {ids[open_ends[0]]}"
            self._found("open", f"{{}} does not end with eod {eod}: {text}", ends, begin + open_ends)
        self._check_markers(ids, ends, begin)
        eods = np.flatnonzero(ids == eod)
        if len(eods) > len(last) - len(open_ends) and not self.manifest.pairs:  # a pack contains an eod for each pair
            inside = eods[~np.isin(eods, last, assume_unique=True)]
            self._found("inside", f"{{}} has eod {eod} {INSIDE} {{}}", ends, begin + inside)

    def _check_markers(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], begin: int) -> None:
        """Check that the marker is first in each document that begins in `ids`, and nowhere else."""
        marker = self.manifest.model_order.marker_id
        if marker is None:
            return
        begins = np.concatenate([[0], ends[:-1]])
        first = np.zeros(len(ids), np.bool_)
        first[begins[(begins >= begin) & (begins < begin + len(ids))] - begin] = True
        wrong = np.flatnonzero((ids == marker) != first)
        if len(wrong):
            text = f"{{}} has not its marker {marker} at its beginning alone; see its id {{}}"
            self._found("marker", text, ends, begin + wrong)

    def _found(self, kind: str, text: str, ends: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        documents = np.unique(np.searchsorted(ends, positions, side="right")) + self._document
        if found := self._findings.get(kind):
            found.num_documents += int((documents > found.last_document).sum())  # a block may begin within the last one
            found.last_document = int(documents[-1])
            return
        inside = int(documents[0]) - self._document
        start = int(ends[inside - 1]) if inside else 0
        sentence = text.format(f"document {documents[0]}", int(positions[0]) - start)
        self._findings[kind] = Finding(sentence, len(documents), int(documents[-1]))

    def finish(self) -> None:
        """Read the rest of .bin, and compare the hash."""
        while content := self._stream.read(BLOCK_BYTES):
            self._digest.update(content)
        self._stream.close()
        self.is_same = self._digest.hexdigest() == self.manifest.bin_sha256


@dataclass(frozen=True, slots=True)
class DirectionCheck:
    """Numbers of sampled documents that keep their ids in one order only. A document of whole words keeps them in both."""

    stated: Direction
    sampled: int
    only_as_stated: int
    only_as_other: int

    @property
    def is_wrong(self) -> bool:
        """True if the ids are clearly in the other order."""
        return self.only_as_other > CLEAR * self.only_as_stated

    @property
    def is_right(self) -> bool:
        """True if the ids are clearly in the stated order."""
        return self.only_as_stated > CLEAR * self.only_as_other

    def describe(self) -> str:
        """Return the result as one sentence."""
        found = (
            f"of {self.sampled} documents that were decoded and encoded again, {self.only_as_stated} keep their ids only if the"
            f" shard is {self.stated}, {self.only_as_other} only if it is {self.stated.other}"
        )
        if self.is_wrong:
            return f"the manifest says {self.stated}, but the ids are {self.stated.other}: {found}"
        return f"{self.stated} is right: {found}" if self.is_right else f"cannot be determined from the ids: {found}"


def check_direction(reader: ShardReader, tokenizer: Tokenizer) -> DirectionCheck:
    """Check documents at equal distances over the shard. Its index and the range of its ids must be intact."""
    stated, reading = reader.manifest.direction, reader.manifest.model_order
    order, other = unit_order(reading, tokenizer), UnitOrder(Reading(direction=stated.other))
    sampled = only_as_stated = only_as_other = 0
    for index in np.unique(np.linspace(0, len(reader) - 1, min(SAMPLE_DOCUMENTS, len(reader))).astype(np.int64)).tolist():
        document = reader.document(index)
        if len(document) > LONGEST_IDS:
            continue
        stored, _ = contents(document, np.array([len(document)], np.int64), reading)
        plain = stored if reading.boundary_id is None else stored[stored != reading.boundary_id]
        sampled += 1
        as_stated = _keeps_ids(tokenizer, order.text_ids(stored).tolist())
        as_other = _keeps_ids(tokenizer, other.text_ids(plain).tolist())
        only_as_stated += as_stated and not as_other
        only_as_other += as_other and not as_stated
    return DirectionCheck(stated, sampled, only_as_stated, only_as_other)


def _keeps_ids(tokenizer: Tokenizer, text_ids: list[int]) -> bool:
    return bool(tokenizer.encode_batch([tokenizer.decode(text_ids)])[0].tolist() == text_ids)
