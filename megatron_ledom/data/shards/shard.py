"""Shards: PREFIX.bin (ids in model order), PREFIX.idx (where documents begin) and PREFIX.json (the manifest, written last).

`.bin` and `.idx` have the format of megatron-core's indexed dataset. For `.idx` see `index_file`.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ledom import __version__
from megatron_ledom.data.shards.index_file import SHARD_DTYPES, index_blocks, index_bytes, map_index, read_header, shard_header
from megatron_ledom.direction import BOTH, Direction, Reading
from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.files import close_synced, publish, real_path, withdraw
from megatron_ledom.storage.locks import output_file_lock

FORMAT_VERSION = 1
WITH_READING = 2
"""Format version of a shard with another unit than token or with a marker, which earlier versions of this package refuse."""
TARGETS = ".targets"
"""Ending of the fourth file of a shard of pairs, see `targets`."""
NO_TOKENS = "no_tokens"
"""Reason for skipping a document without tokens, in `ShardManifest.skipped`."""
UINT16_BELOW = 65_500  # megatron-core's own choice (DType.optimal_dtype)
SUFFIXES = (".bin", ".idx", ".json")  # in the order in which they get their final names
COPY_BYTES = 1 << 20  # small enough to stay in cache while it is read, hashed and written

DtypeName = Literal["auto", "uint16", "int32"]


@dataclass(kw_only=True, slots=True)
class InputFile:
    """A file, or byte range of a file, from which a shard was made."""

    path: str
    num_bytes: int
    """Number of stored bytes that were read, from `first_byte`."""
    sha256: str
    """Hash of these bytes. A table (Parquet, Arrow) is not read as a whole: its hash is that of the file's end, which has its index."""
    first_byte: int = 0
    """Not 0 if several workers or tasks share a file."""


@dataclass(kw_only=True, slots=True)
class ShardManifest:
    """Content of PREFIX.json. The first five fields are a `Provenance`."""

    direction: Direction
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    dtype: str
    """numpy name of the type of the ids in .bin."""
    num_documents: int
    """Stored documents, each with at least one token before its eod."""
    num_tokens: int
    """Stored ids, with eods."""
    text_bytes: int
    """UTF-8 bytes of the texts of the stored documents, the unit of bits per byte."""
    skipped: dict[str, int]
    """Number of skipped documents, by reason."""
    input_files: list[InputFile]
    bin_sha256: str
    idx_sha256: str
    tokenizer_path: str = ""
    """Former path of the tokenizer, as a hint for tools that show text. `tokenizer_sha256` decides if it is the right one."""
    eod_token: str = ""
    bos_token: str = ""
    """Token at the start of each document in model order; empty for none."""
    text_template: str = ""
    """Template that joined the fields of each record to its text; empty if the text was one field."""
    skipped_inputs: list[dict[str, Any]] = field(default_factory=list)
    """Input files that were not read: path, reason and num_files."""
    elapsed_seconds: float = 0.0
    """Wall-clock time of the run that finished the shard."""
    request_sha256: str = ""
    """Hash of all options and inputs of preprocessing. A command with the same hash finds the shard finished."""
    inputs_sha256: str = ""
    """Hash of the input files of all tasks, with sizes and versions. Shards of one array must agree in it."""
    pairs: dict[str, int] = field(default_factory=dict)
    """For a shard of packed pairs: seq_length of the packs, number of pairs, and numbers of their tokens; else empty."""
    targets_sha256: str = ""
    """Hash of PREFIX.targets of a shard of pairs."""
    decontamination: dict[str, Any] = field(default_factory=dict)
    """For a shard that was searched for evaluation items: settings, numbers of documents, and touched items by set; else empty."""
    source: dict[str, Any] = field(default_factory=dict)
    """For a shard of a corpus recipe: name, address, revision, licence and domain of the source; else empty."""
    reading: dict[str, Any] = field(default_factory=dict)
    """For another unit than token, or with a marker: unit, marker_id and boundary_id; else empty."""
    reading_tokens: dict[str, Any] = field(default_factory=dict)
    """The tokens marker and boundary, and for the unit segment segment_tokens and seed; empty where `reading` is."""
    package_version: str = __version__
    created_at: str = ""
    """UTC, ISO 8601."""
    format_version: int = FORMAT_VERSION

    @property
    def provenance(self) -> Provenance:
        """Direction and tokenizer, for comparison with those of a run."""
        names = ("direction", "tokenizer_name", "tokenizer_sha256", "vocab_size", "eod_id")
        values = {name: getattr(self, name) for name in names}
        return Provenance.from_dict({**values, "readings": self._readings()}, "manifest")

    @property
    def model_order(self) -> Reading:
        """Direction and unit of the documents, and the ids that are added to them."""
        return self.provenance.readings[0]

    def _readings(self) -> list[dict[str, Any]]:
        return [{"direction": str(self.direction), **self.reading}] if self.reading else []

    @property
    def content_sha256(self) -> str:
        """Hash of the training data: of the ids, and of the targets if there are any."""
        return hashlib.sha256(f"{self.bin_sha256}{self.targets_sha256}".encode()).hexdigest() if self.pairs else self.bin_sha256

    def to_json(self) -> bytes:
        """Return the content of the manifest file."""
        stored = asdict(self)
        for name in ("decontamination", "source", "reading", "reading_tokens"):
            if not stored[name]:  # as manifests were before these keys existed
                del stored[name]
        return orjson.dumps(stored, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: str) -> "ShardManifest":
        """Make a manifest from its JSON object. where: name of the file, for error messages."""
        if stored.get("format_version") not in (FORMAT_VERSION, WITH_READING):
            raise DataError(
                f"{where} has format version {stored.get('format_version')}, this package reads {FORMAT_VERSION} and {WITH_READING};"
                " make the shard again with ledom preprocess-data"
            )
        reading = stored.get("reading") or {}
        if not isinstance(reading, dict) or bool(reading) is not (stored["format_version"] == WITH_READING):
            raise DataError(
                f"{where} has the reading {reading!r} in format version {stored['format_version']}; make the shard again"
            )
        readings = [{"direction": stored.get("direction"), **reading}] if reading else []
        provenance = Provenance.from_dict({**stored, "readings": readings}, where)
        if provenance.direction == BOTH:
            raise DataError(f"{where} has the direction both, which no shard has; the file is damaged")
        names = {item.name for item in fields(cls)}
        try:
            files = [InputFile(**item) for item in stored["input_files"]]
            values = {name: value for name, value in stored.items() if name in names}
            return cls(**{**values, "direction": provenance.direction, "input_files": files})
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} is not a complete manifest ({error}); make the shard again") from error


def stored_reading(reading: Reading) -> dict[str, Any]:
    """Return `ShardManifest.reading` of a model order."""
    if reading.is_plain:
        return {}
    return {"unit": str(reading.unit), "marker_id": reading.marker_id, "boundary_id": reading.boundary_id}


def choose_dtype(name: DtypeName, vocab_size: int) -> np.dtype[Any]:
    """Return the type of stored ids. `auto` is megatron-core's rule: uint16 for a vocabulary below 65,500, else int32."""
    if name == "auto":
        name = "uint16" if vocab_size < UINT16_BELOW else "int32"
    dtype = np.dtype(name)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise UsageError(
            f"--dtype {name} stores ids up to {np.iinfo(dtype).max:,}, the tokenizer has ids up to {vocab_size - 1:,};"
            " use --dtype int32 or auto"
        )
    return dtype


def printable(path: str) -> str:
    """Return a path with bytes that are not UTF-8 escaped, for manifests and messages."""
    return path.encode("utf-8", "backslashreplace").decode()


def existing_files(prefix: str) -> list[Path]:
    """Return the files of a shard that exist, of .bin, .idx and .json."""
    return [path for suffix in SUFFIXES if (path := Path(prefix + suffix)).exists()]


def check_may_write(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix whose files exist, unless `overwrite`, and a folder without write permission. Writes nothing itself."""
    if prefix.endswith("/"):
        raise UsageError(f"--output-prefix {prefix} is a folder; add the beginning of the file names, such as {prefix}train")
    if (found := existing_files(prefix)) and not overwrite:
        raise UsageError(f"{found[0]} exists already; choose another --output-prefix, or replace it with --overwrite")
    for folder in sorted({Path(prefix).parent, *(path.parent for path in real_files(prefix).values())}):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UsageError(f"{existing} is not a folder with write permission; choose another --output-prefix")


def real_files(prefix: str, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Return the file to which each name of a shard leads through links. Raises UsageError if two names lead to one file."""
    files = {suffix: Path(real_path(prefix + suffix)) for suffix in suffixes}
    if len(set(files.values())) < len(files):
        raise UsageError(f"two of {', '.join(prefix + suffix for suffix in suffixes)} are links to one file; remove the links")
    return files


@dataclass(slots=True)
class Counts:
    """Fields of a manifest that do not follow from the ids."""

    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    input_files: list[InputFile] = field(default_factory=list)
    tokenizer_path: str = ""
    eod_token: str = ""
    bos_token: str = ""
    text_template: str = ""
    skipped_inputs: list[dict[str, Any]] = field(default_factory=list)
    elapsed_seconds: float = 0.0
    request_sha256: str = ""
    inputs_sha256: str = ""
    pairs: dict[str, int] = field(default_factory=dict)
    targets_sha256: str = ""
    decontamination: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    reading_tokens: dict[str, Any] = field(default_factory=dict)


class Hash(Protocol):
    """A hash that is computed step by step."""

    def update(self, content: memoryview, /) -> None:
        """Add bytes."""


class ShardWriter:
    """Writer of a shard. Documents go to PREFIX.bin.part, and `finalize` makes the finished shard of them.

    Use as a context manager: leaving it without `finalize`, with or without an exception, removes the partial files. The
    writer locks the prefix, so a second writer of the same shard raises UsageError.
    """

    def __init__(self, prefix: str, provenance: Provenance, dtype: npt.DTypeLike, *, overwrite: bool = False) -> None:
        check_may_write(prefix, overwrite)
        self.prefix = prefix
        self.provenance = provenance
        self.dtype = np.dtype(dtype)
        self._num_bytes = 0
        self.num_documents = 0
        """Number of documents appended so far."""
        self._hash = hashlib.sha256()
        self._buffer = bytearray(COPY_BYTES)
        folder = Path(prefix).parent
        self._made_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made: list[Path] = []
        self._lock = ExitStack()
        try:
            for locked in _prefixes_to_lock(prefix):
                self._lock.enter_context(output_file_lock(locked, "--output-prefix"))
            check_may_write(prefix, overwrite)  # again: another writer may have finished before we got the lock
            self._files = real_files(prefix, (*SUFFIXES, ".len"))
            self._bin = self._create(".bin")
            self._lengths = self._create(".len")  # a file, because there can be hundreds of millions
        except BaseException:
            self._lock.close()
            raise

    def _create(self, suffix: str) -> BinaryIO:
        path = self._part(suffix)
        self._made.append(path)
        return path.open("wb")

    def _part(self, suffix: str) -> Path:
        """Return the path of an unfinished file: next to the file that it will replace, which may be elsewhere through a link."""
        return Path(f"{self._files[suffix]}.part")

    def append(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Add documents: ids [sum(lengths)] in model order, each document closed by eod, and their lengths [documents] with eod."""
        if ids.dtype != self.dtype:  # a cast would wrap around silently
            raise TypeError(f"ids of type {ids.dtype} for a shard of {self.dtype}")
        if int(lengths.sum(dtype=np.int64)) != ids.size:
            raise ValueError(f"{ids.size} ids for documents of {int(lengths.sum(dtype=np.int64))} ids")
        self._append(np.ascontiguousarray(ids).view(np.uint8).data, lengths)

    def append_files(self, ids_path: str, lengths_path: str, hashes: tuple[Hash, Hash]) -> None:
        """Add documents from a file of ids and a file of int32 lengths, as for `append`. Updates the hash of each file."""
        lengths = np.fromfile(lengths_path, np.int32)
        hashes[1].update(lengths.data)
        with open(ids_path, "rb", buffering=0) as stream:
            block = memoryview(self._buffer)
            while size := stream.readinto(block):
                hashes[0].update(block[:size])
                self._append(block[:size], lengths[:0])
        self._append(block[:0], lengths)

    def _append(self, content: memoryview, lengths: npt.NDArray[np.int32]) -> None:
        try:
            self._bin.write(content)
            self._lengths.write(np.ascontiguousarray(lengths, np.int32).data)
        except OSError as error:
            raise cannot_write(error, str(self._part(".bin"))) from error
        self._hash.update(content)
        self._num_bytes += len(content)
        self.num_documents += len(lengths)

    def finalize(self, counts: Counts) -> ShardManifest:
        """Write index and manifest, check the sizes, and give all three files their names, the manifest last."""
        try:
            return self._finalize(counts)
        except OSError as error:
            raise cannot_write(error, self.prefix) from error

    def _finalize(self, counts: Counts) -> ShardManifest:
        close_synced(self._bin)
        self._lengths.close()
        lengths = np.memmap(self._part(".len"), np.int32, "r") if self.num_documents else np.zeros(0, np.int32)
        size = self._part(".bin").stat().st_size
        num_tokens = int(lengths.sum(dtype=np.int64))
        if num_tokens * self.dtype.itemsize != size or size != self._num_bytes:
            raise DataError(
                f"{self.prefix}.bin has {size:,} bytes, its {len(lengths):,} documents need"
                f" {num_tokens * self.dtype.itemsize:,}; the disk may be full, or another program changed the file: run again"
            )
        manifest = ShardManifest(
            **{item.name: getattr(self.provenance, item.name) for item in fields(Provenance) if item.name != "readings"},
            **{item.name: getattr(counts, item.name) for item in fields(Counts)},
            dtype=self.dtype.name,
            num_documents=len(lengths),
            num_tokens=num_tokens,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=self._write_index(lengths),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            reading=stored_reading(self.provenance.readings[0]),
            format_version=FORMAT_VERSION if self.provenance.is_plain else WITH_READING,
        )
        stream = self._create(".json")
        stream.write(manifest.to_json())
        close_synced(stream)
        self._rename()
        return manifest

    def _write_index(self, lengths: npt.NDArray[np.int32]) -> str:
        stream = self._create(".idx")
        digest = hashlib.sha256()
        for block in index_blocks(lengths, self.dtype):
            stream.write(block)
            digest.update(block)
        close_synced(stream)
        return digest.hexdigest()

    def _rename(self) -> None:
        self._part(".len").unlink()
        withdraw(self._files[".json"])  # an old manifest must never exist next to new ids
        for suffix in SUFFIXES:
            publish(self._part(suffix), self._files[suffix])
            self._made.append(self._files[suffix])
        self._made_folders.clear()
        self._made.clear()  # finished: `abort` must remove nothing

    def abort(self) -> None:
        """Remove everything written so far."""
        with contextlib.suppress(OSError):  # flushing the buffer fails on a full disk, and its content is not needed
            self._bin.close()
        with contextlib.suppress(OSError):
            self._lengths.close()
        for path in self._made:
            path.unlink(missing_ok=True)
        self._lock.close()  # before the folders are removed, which contain its file
        for folder in self._made_folders:
            with contextlib.suppress(OSError):  # it may contain files of another task
                folder.rmdir()
        self._made.clear()
        self._made_folders.clear()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


def _prefixes_to_lock(prefix: str) -> list[str]:
    """Return the prefixes that a writer locks: its own, and those to which links of its file names lead."""
    linked = {str(path).removesuffix(suffix) for suffix, path in real_files(prefix).items()}
    return [prefix, *sorted(linked - {os.path.realpath(prefix)})]


def load_manifest(prefix: str) -> ShardManifest:
    """Read PREFIX.json. If there is none, the error explains the likely reason."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        for suffix in SUFFIXES:
            if prefix.endswith(suffix) and Path(f"{prefix.removesuffix(suffix)}.json").is_file():
                raise UsageError(f"{prefix} is one file of a shard; give the prefix {prefix.removesuffix(suffix)}")
        if existing_files(prefix):
            raise DataError(
                f"{prefix}.bin or .idx exists, but the manifest {path} does not: the shard was not finished, or another tool"
                " wrote it; make it again with ledom preprocess-data"
            )
        raise UsageError(f"there is no shard {prefix} ({path} does not exist); give the prefix of its .bin, .idx and .json")
    try:
        stored = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); make the shard again") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path} does not contain a JSON object; make the shard again")
    return ShardManifest.from_dict(stored, str(path))


def check_shard(prefix: str) -> ShardManifest:
    """Check that manifest, file sizes and index header agree, without reading ids, and return the manifest. Raises DataError."""
    manifest = load_manifest(prefix)
    if manifest.dtype not in SHARD_DTYPES:
        raise DataError(f"{prefix}.json has dtype {manifest.dtype!r}, expected one of {[*SHARD_DTYPES]}; make the shard again")
    expected = {
        ".bin": manifest.num_tokens * np.dtype(manifest.dtype).itemsize,
        ".idx": index_bytes(manifest.num_documents, manifest.num_documents),
        **({TARGETS: manifest.num_tokens} if manifest.pairs else {}),
    }
    for suffix, size in expected.items():
        path = Path(prefix + suffix)
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise DataError(f"{path} is missing; copy the shard again or make it again with ledom preprocess-data")
        if found != size:
            state = "truncated" if found < size else "too long"
            raise DataError(
                f"{path} is {state}: it has {found:,} bytes, its manifest says {size:,};"
                " copy the shard again or make it again with ledom preprocess-data"
            )
    header = read_header(f"{prefix}.idx")
    if header != shard_header(manifest.dtype, manifest.num_documents):
        raise DataError(f"{prefix}.idx has the header {header}, which does not match its manifest; make the shard again")
    return manifest


class ShardReader:
    """A checked and memory-mapped shard."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.manifest = check_shard(prefix)
        count = self.manifest.num_documents
        self.lengths, self.pointers, self.document_indices = map_index(f"{prefix}.idx", count, count)
        """Arrays of the index, one entry per document; lengths count the eod. See IndexArrays."""
        dtype = np.dtype(self.manifest.dtype)
        num_tokens = self.manifest.num_tokens
        self.ids: npt.NDArray[Any] = np.memmap(f"{prefix}.bin", mode="r", dtype=dtype) if num_tokens else np.zeros(0, dtype)
        """All stored ids [tokens], model order."""

    def __len__(self) -> int:
        return self.manifest.num_documents

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return the ids of a document in model order [length], with its eod."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        begin = int(self.pointers[index]) // self.ids.itemsize
        return self.ids[begin : begin + int(self.lengths[index])]
