"""Reading raw text: JSON lines (plain, .gz, .zst), Parquet and plain text, in bounded memory, every bad record named.

A file is read by one process in batches of whole records (`SourceFile.batches`); taking a batch apart (`texts_of`) is the
dear half and happens in worker processes. Text is always text order here.
"""

import glob
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_ledom.data.shard import InputFile
from megatron_ledom.errors import DataError, UsageError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
SUPPORTED = "*.jsonl, *.ndjson or *.json (each also .gz or .zst), *.parquet, *.txt"
READ_BYTES = 1 << 16  # of compressed input at a time
HASH_BYTES = 1 << 20
PARQUET_ROWS = 256
BATCH_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

OnError = Literal["fail", "skip"]


@dataclass(slots=True)
class Batch:
    """Consecutive records of one file: whole JSON lines in one block, or texts that are ready (UTF-8; None is a missing one)."""

    path: str
    first: int
    """Number of the first record in the file, from 1: a line of JSON lines, a row of Parquet."""
    lines: bytes = b""
    texts: list[bytes | None] = field(default_factory=list)
    position: int = 0
    """Bytes of the input file read up to here; for the progress bar."""

    @property
    def where(self) -> str:
        """The batch in words, for errors that are not about one record."""
        return f"{self.path} from record {self.first:,} on"


class BadRecordError(Exception):
    """One record that cannot be used; `reason` is its name in the counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, each once, sorted by path; refused: no match, a folder, an unknown ending, no access."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise UsageError(f"input {pattern} does not exist or matches no file; check --input")
        found.update(matches)
    paths = [Path(name) for name in sorted(found)]
    for path in paths:
        if path.is_dir():
            raise UsageError(f"input {path} is a folder; name files, for example {path}/*.jsonl")
        if _kind(path) is None:
            raise UsageError(f"input {path} has an ending that is not known; expected {SUPPORTED}")
        if not os.access(path, os.R_OK):
            raise UsageError(f"input {path} cannot be read; change its permissions or leave it out of --input")
    return paths


def _kind(path: Path) -> Literal["lines", "parquet", "text"] | None:
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if inner.suffix in LINE_SUFFIXES:
        return "lines"
    kinds: dict[str, Literal["parquet", "text"]] = {".parquet": "parquet", ".txt": "text"}
    return kinds.get(path.suffix)


def share_of_task(sizes: Sequence[int], task_id: int, num_tasks: int) -> range:
    """Which files (indices into `sizes`, bytes) are a task's: neighbours, about the same bytes each, at least one a task."""
    if num_tasks < 1:
        raise UsageError(f"--num-tasks {num_tasks} is not possible; use 1 or more")
    if not 0 <= task_id < num_tasks:
        raise UsageError(f"--task-id {task_id} is not in 0..{num_tasks - 1} (--num-tasks {num_tasks})")
    if num_tasks > len(sizes):
        raise UsageError(f"{num_tasks} tasks for {len(sizes)} input files; use --num-tasks {len(sizes)} or fewer")
    total, done, bounds = sum(sizes), 0, [0]
    for index, size in enumerate(sizes[:-1], 1):
        done += size
        left_tasks = num_tasks - len(bounds)
        due = done * num_tasks >= total * len(bounds) or len(sizes) - index <= left_tasks
        if left_tasks and due:
            bounds.append(index)
    bounds.append(len(sizes))
    return range(bounds[task_id], bounds[task_id + 1])


class SourceFile:
    """One input file, read once from start to end; its size and hash are known afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def batches(self, text_key: str, batch_bytes: int = BATCH_BYTES) -> Iterator[Batch]:
        """The file's records in order, about `batch_bytes` of them at a time."""
        kind = _kind(self.path)
        try:
            if kind == "lines":
                yield from self._line_batches(batch_bytes)
            elif kind == "parquet":
                yield from self._parquet_batches(text_key, batch_bytes)
            else:
                text = b"".join(self._raw_blocks(HASH_BYTES))
                yield Batch(str(self.path), 1, texts=[text], position=self._num_bytes)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror or error}); check the disk, or leave it out"
            ) from error

    def record(self) -> InputFile:
        """What the manifest says of the file; call it after the last batch."""
        return InputFile(path=str(self.path), num_bytes=self._num_bytes, sha256=self._hash.hexdigest())

    def _raw_blocks(self, size: int) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            while block := stream.read(size):
                self._hash.update(block)
                self._num_bytes += len(block)
                yield block

    def _line_batches(self, batch_bytes: int) -> Iterator[Batch]:
        pending, first, searched = bytearray(), 1, 0
        for block in self._blocks(batch_bytes):
            pending += block
            cut = pending.rfind(b"\n", searched) + 1 if len(pending) >= batch_bytes else 0
            if len(pending) >= batch_bytes:
                searched = len(pending)  # a line longer than a batch is searched once
            if cut:
                yield Batch(str(self.path), first, lines=bytes(pending[:cut]), position=self._num_bytes)
                first += pending.count(b"\n", 0, cut)
                del pending[:cut]
                searched = 0
        if pending:
            yield Batch(str(self.path), first, lines=bytes(pending), position=self._num_bytes)

    def _blocks(self, batch_bytes: int) -> Iterator[bytes]:
        if self.path.suffix == ".gz":
            return self._decompressed(lambda: zlib.decompressobj(wbits=31), zlib.error)
        if self.path.suffix == ".zst":
            import zstandard

            return self._decompressed(lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)
        return self._raw_blocks(min(HASH_BYTES, batch_bytes))

    def _decompressed(self, start: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
        """Blocks of a file of one or more compressed members or frames; one that ends too early is an error, not an end."""
        engine = None
        for block in self._raw_blocks(READ_BYTES):
            while block := block if engine else block.lstrip(b"\0"):  # gzip files may be padded with zeros
                engine = engine or start()
                try:
                    yield engine.decompress(block)
                except failure as error:
                    raise DataError(f"{self.path} is damaged ({error}); fetch it again, or leave it out") from error
                block = engine.unused_data if engine.eof else b""
                engine = None if engine.eof else engine
        if engine is not None:
            raise DataError(f"{self.path} is truncated: its compressed data ends too early; fetch it again, or leave it out")

    def _parquet_batches(self, text_key: str, batch_bytes: int) -> Iterator[Batch]:
        import pyarrow
        from pyarrow import parquet

        for _ in self._raw_blocks(HASH_BYTES):  # the hash; Parquet itself is not read from start to end
            pass
        texts: list[bytes | None] = []
        first, num_bytes = 1, 0
        try:
            with parquet.ParquetFile(self.path) as table:
                self._check_column(table.schema_arrow, text_key)
                num_rows = max(1, table.metadata.num_rows)
                for rows in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key], use_threads=False):
                    some = rows.column(0).cast(pyarrow.large_binary()).to_pylist()
                    texts += some
                    num_bytes += sum(len(text) for text in some if text is not None)
                    if num_bytes >= batch_bytes:
                        read = first - 1 + len(texts)
                        yield Batch(str(self.path), first, texts=texts, position=self._num_bytes * read // num_rows)
                        first, num_bytes, texts = read + 1, 0, []
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} is damaged or not Parquet ({error}); fetch it again, or leave it out") from error
        if texts:
            yield Batch(str(self.path), first, texts=texts, position=self._num_bytes)

    def _check_column(self, schema: Any, text_key: str) -> None:
        if text_key not in schema.names:
            raise DataError(f"{self.path} has no column {text_key!r} but {', '.join(schema.names)}; name one by --text-key")
        kind = str(schema.field(text_key).type)
        if not any(word in kind for word in ("string", "binary")):
            raise DataError(f"{self.path}: column {text_key!r} holds {kind}, not text; name another by --text-key")


def texts_of(batch: Batch, text_key: str, on_error: OnError, skipped: Counter[str], messages: list[str]) -> list[str]:
    """The texts of a batch. A bad record raises DataError; with `skip` it is counted by reason and described in `messages`."""
    texts: list[str] = []
    records = _lines_of(batch) if batch.lines else _texts_at(batch)
    for where, record in records:
        try:
            texts.append(_text_of_line(record, text_key) if batch.lines else _decoded(record))
        except BadRecordError as bad:
            if on_error == "fail":
                raise DataError(f"{where}: {bad}; repair it, or leave such records out with --on-error skip") from bad
            skipped[bad.reason] += 1
            messages.append(f"{where}: {bad}")
    return texts


def _lines_of(batch: Batch) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(batch.lines.split(b"\n"), batch.first):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line and not line.isspace():
            yield f"{batch.path}:{number}", line


def _texts_at(batch: Batch) -> Iterator[tuple[str, bytes | None]]:
    is_text_file = batch.path.endswith(".txt")
    for number, text in enumerate(batch.texts, batch.first):
        yield (batch.path if is_text_file else f"{batch.path}: row {number}"), text


def _text_of_line(line: bytes | None, text_key: str) -> str:
    try:
        record = orjson.loads(line or b"")
    except orjson.JSONDecodeError as error:
        _decoded(line)
        raise BadRecordError("malformed_json", f"malformed JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecordError(
            "not_an_object", f"a JSON {type(record).__name__} where an object with the key {text_key!r} was expected"
        )
    if text_key not in record:
        keys = ", ".join(list(record)[:8]) or "no keys"
        raise BadRecordError("missing_text_key", f"no key {text_key!r} among {keys} (name it by --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadRecordError("text_is_not_a_string", f"key {text_key!r} holds {type(text).__name__}, not a string")
    return text


def _decoded(text: bytes | None) -> str:
    if text is None:
        raise BadRecordError("text_is_not_a_string", "the text is null")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError("invalid_utf8", f"invalid UTF-8 ({error.reason} at byte {error.start})") from None


def read_texts(paths: Iterable[Path], text_key: str) -> Iterator[str]:
    """All texts of some files, one after the other; a bad record raises DataError."""
    for path in paths:
        for batch in SourceFile(path).batches(text_key):
            yield from texts_of(batch, text_key, "fail", Counter(), [])
