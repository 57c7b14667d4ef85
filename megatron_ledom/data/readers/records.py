"""Read the texts of byte ranges of files: JSON lines, tables, web archives and plain text, in bounded memory.

A bad record raises an error that names it, or is skipped and counted. Texts are in text order. All of this runs in a worker.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from megatron_ledom.data.readers import tables, web_archive
from megatron_ledom.data.readers.byte_ranges import ByteRange, InputPath
from megatron_ledom.data.readers.json_lines import BYTE_ORDER_MARK, check_is_lines, check_text, loads_leniently
from megatron_ledom.data.readers.remote import check_hash
from megatron_ledom.data.readers.streams import (
    MAX_RECORD_BYTES,
    BadRecordError,
    LineReader,
    Progress,
    too_large,
    whole_file,
)
from megatron_ledom.data.readers.text_template import TextTemplate
from megatron_ledom.data.shards.shard import InputFile
from megatron_ledom.errors import DataError

BATCH_BYTES = 1 << 20
MAX_MESSAGES = 10  # limit on the bad records of a byte range that are described one by one
OnError = Literal["fail", "skip"]


@dataclass(slots=True, kw_only=True)
class ReadSettings:
    """Settings of reading records."""

    text_key: str = "text"
    """JSON key or column of the text. `a.b` is key b of the object at key a, unless a key is named `a.b`."""
    template: TextTemplate | None = None
    """Joins the texts of several keys. Replaces `text_key`."""
    on_error: OnError = "fail"
    batch_bytes: int = BATCH_BYTES
    max_record_bytes: int = MAX_RECORD_BYTES
    """A longer record counts as bad, and is never in memory as a whole."""
    keep_records: bool = False
    """If true, batches contain the whole records too, for a filter."""
    keep_lines: bool = False
    """If true, batches of JSON lines contain the lines too."""


@dataclass(slots=True)
class TextBatch:
    """Consecutive texts of a file."""

    texts: list[str] = field(default_factory=list)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    """The whole record of each text, if `keep_records` is set; {text_key: text} in formats without other fields."""
    origins: list[tuple["RecordReader", int | str]] = field(default_factory=list)
    """Position of each text, see `RecordReader.name`. A later step may find that the record is bad, and then reports it."""
    lines: list[bytes] = field(default_factory=list)
    """The line of each text without line end, if `keep_lines` is set."""
    position: int = 0
    """Bytes of the byte range read so far."""

    def of(self, indices: Sequence[int]) -> "TextBatch":
        """Return a batch of the texts at `indices`."""
        return self if len(indices) == len(self.texts) else self.at(indices)

    def at(self, indices: Sequence[int]) -> "TextBatch":
        """Return a new batch of the texts at `indices`, which may repeat."""
        return TextBatch(
            texts=[self.texts[index] for index in indices],
            records=[self.records[index] for index in indices] if self.records else [],
            origins=[self.origins[index] for index in indices],
            lines=[self.lines[index] for index in indices] if self.lines else [],
            position=self.position,
        )


def read_texts(
    sources: Iterable[InputPath],
    text_key: str = "text",
    *,
    read: ReadSettings | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[str]:
    """Yield all texts of some files in order, read with the settings `read`, or else from `text_key`.

    Raises DataError for a bad record. With `on_error="skip"` it is counted in `skipped` by its reason instead.
    """
    for source in sources:
        reader = RecordReader(ByteRange(source, 0, source.num_bytes), read or ReadSettings(text_key=text_key))
        for batch in reader.batches():
            yield from batch.texts
        if skipped is not None:
            skipped += reader.skipped


class RecordReader:
    """Reader of one byte range. After the last batch it also has the skipped records and the hash of the bytes."""

    def __init__(self, byte_range: ByteRange, settings: ReadSettings) -> None:
        self.byte_range = byte_range
        self.settings = settings
        self.skipped: Counter[str] = Counter()
        """Bad records, by reason."""
        self.messages: list[str] = []
        self._progress = Progress()
        self._line_reader: LineReader | None = None

    def batches(self) -> Iterator[TextBatch]:
        """Yield the texts of the byte range in order. A bad record raises DataError, or is counted and skipped."""
        kind = self.byte_range.source.kind
        if kind == "lines":
            yield from self._lines()
        elif kind == "text":
            yield from self._whole_file()
        else:
            yield from self._texts(kind)

    def record(self) -> InputFile:
        """Return the entry of the byte range in the manifest. Call after the last batch. Raises DataError for damaged bytes."""
        byte_range, progress = self.byte_range, self._progress
        if byte_range.source.kind not in ("parquet", "arrow"):
            check_hash(byte_range.source, progress.num_bytes, progress.digest.hexdigest())
        return InputFile(
            path=byte_range.source.path,
            num_bytes=byte_range.num_bytes,
            sha256=progress.digest.hexdigest(),
            first_byte=byte_range.start,
        )

    def _lines(self) -> Iterator[TextBatch]:
        reader = self._line_reader = LineReader(self.byte_range, self.settings.batch_bytes, self.settings.max_record_bytes)
        self._progress = reader.progress
        for block in reader.blocks():
            batch = TextBatch(position=reader.progress.num_bytes)
            if block.is_first_of_file:
                check_is_lines(self.byte_range.source.path, reader.head, block.lines)
            if block.too_long is not None:
                bad_line = too_large(block.too_long, self.settings.max_record_bytes)
                self._reject(bad_line, block.first)
            for number, line in enumerate(block.lines, block.first):
                if number == 0 and block.is_first_of_file:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line or line.isspace():
                    continue
                try:
                    if len(line) > self.settings.max_record_bytes:
                        raise too_large(len(line), self.settings.max_record_bytes)
                    self._add(batch, *_text_of_line(line, self.settings), number)
                    if self.settings.keep_lines:
                        batch.lines.append(line)
                except BadRecordError as bad:
                    self._reject(bad, number)
            yield batch

    def name(self, origin: int | str, *, exactly: bool | None = None) -> str:
        """Return the position of a record for messages: FILE:LINE for a line. By default it is exact if a bad record ends the run."""
        if isinstance(origin, str) or self._line_reader is None:
            return str(origin)
        exactly = self.settings.on_error == "fail" if exactly is None else exactly
        return self._line_reader.name_line(origin, exactly=exactly)

    def _add(self, batch: TextBatch, text: str, record: Mapping[str, Any], origin: int | str) -> None:
        batch.texts.append(text)
        batch.origins.append((self, origin))
        if self.settings.keep_records:
            batch.records.append(record)

    def _reject(self, bad: BadRecordError, origin: int | str) -> None:
        self.reject(bad, origin, self.skipped, self.messages)

    def reject(self, bad: BadRecordError, origin: int | str, skipped: Counter[str], messages: list[str]) -> None:
        """Raise DataError for a bad record. With --on-error skip count it, and describe the first ones in `messages`."""
        if self.settings.on_error == "fail":
            raise DataError(f"{self.name(origin)}: {bad}; repair it, or skip such records with --on-error skip") from bad
        skipped[bad.reason] += 1
        if len(messages) < MAX_MESSAGES:
            messages.append(f"{self.name(origin)}: {bad}")

    def _whole_file(self) -> Iterator[TextBatch]:
        source = self.byte_range.source
        content, size = bytearray(), 0
        for block in whole_file(self.byte_range, self._progress, refuse_compressed=True):
            size += len(block)
            if size <= self.settings.max_record_bytes:
                content += block
        batch = TextBatch(position=self.byte_range.num_bytes)
        try:
            if size > self.settings.max_record_bytes:
                raise too_large(size, self.settings.max_record_bytes)
            text = _decoded(bytes(content.removeprefix(BYTE_ORDER_MARK)))
            record = {self.settings.text_key: text}
            text = text if self.settings.template is None else _text_of(record, self.settings)
            self._add(batch, text, record, source.path)
        except BadRecordError as bad:
            self._reject(bad, source.path)
        yield batch

    def _texts(self, kind: Literal["parquet", "arrow", "warc"]) -> Iterator[TextBatch]:
        for rows in self._rows(kind):
            batch = TextBatch(position=rows.position)
            for number, content in enumerate(rows.texts):
                origin = f"{self.byte_range.source.path}: {rows.unit} {rows.first + number + 1}"
                try:
                    text, record = self._row(content, rows.records[number] if rows.records else None)
                except BadRecordError as bad:
                    self._reject(bad, origin)
                    continue
                self._add(batch, text, record, origin)
            yield batch

    def _rows(self, kind: Literal["parquet", "arrow", "warc"]) -> Iterator[tables.Rows]:
        read, template = self.settings, self.settings.template
        if kind == "warc":
            keep_records = read.keep_records or template is not None
            return web_archive.read_rows(self.byte_range, read.text_key, keep_records, self._progress, read.max_record_bytes)
        request = tables.Request(
            byte_range=self.byte_range,
            keys=(read.text_key,) if template is None else tuple(template.fields),
            option="--text-key" if template is None else "--text-template",
            with_records=read.keep_records or template is not None,
            all_columns=read.keep_records,
            max_record_bytes=read.max_record_bytes,
        )
        return tables.read_rows(request, self._progress)

    def _row(
        self, content: bytes | BadRecordError | None, record: Mapping[str, Any] | BadRecordError | None
    ) -> tuple[str, Mapping[str, Any]]:
        """Return (text, record) of a table row. content: the value at the text key, or at the first key of the template."""
        for part in (content, record):
            if isinstance(part, BadRecordError):  # a new error: the traceback of the old one would keep the row in memory
                raise BadRecordError(part.reason, str(part))
        assert not isinstance(content, BadRecordError)
        assert not isinstance(record, BadRecordError)
        if self.settings.template is not None:
            assert record is not None
            return _text_of(record, self.settings), record
        if content is not None and len(content) > self.settings.max_record_bytes:
            raise too_large(len(content), self.settings.max_record_bytes)
        text = _decoded(content)
        return text, {self.settings.text_key: text} if record is None else record


def option_to_check(template: TextTemplate | None, text_key: str, reasons: Collection[str]) -> str:
    """Return advice for an input without a single good text. reasons: those of its bad records."""
    if not {"missing_text_key", "text_is_not_a_string"} & set(reasons):
        return "check --input"
    if template is None:
        return f"check --text-key {text_key}: these records have no text at that key"
    return f"check the keys of --text-template {template.template!r}: these records lack one of them, or it is not a text"


def _text_of_line(line: bytes, settings: ReadSettings) -> tuple[str, Mapping[str, Any]]:
    is_strict = True
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:  # the mistake may be at another key
        is_strict, record = False, loads_leniently(line, error)
    if not isinstance(record, dict):
        keys = settings.text_key if settings.template is None else ", ".join(settings.template.fields)
        raise BadRecordError("not_an_object", f"found a JSON {type(record).__name__}, expected an object with the key {keys!r}")
    text = _text_of(record, settings)
    if not is_strict:
        check_text(text, line)
    return text, record


def _text_of(record: Mapping[str, Any], settings: ReadSettings) -> str:
    """Return the text of a record: the value at its text key, or the filled-in template."""
    if settings.template is None:
        return _string_at(record, settings.text_key, "--text-key")
    text = settings.template.render(lambda key: _string_at(record, key, "--text-template"))
    limit = settings.max_record_bytes
    if 4 * len(text) > limit and (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
        raise too_large(size, limit)
    return text


def _string_at(record: Mapping[str, Any], key: str, option: str) -> str:
    text = record.get(key, record)
    if text is record:
        text = _nested(record, key, option)
    if isinstance(text, bytes):  # a binary column of a table
        return _decoded(text)
    if not isinstance(text, str):
        raise BadRecordError("text_is_not_a_string", f"key {key!r} has type {type(text).__name__}, expected a string")
    return text


def _nested(record: Mapping[str, Any], text_key: str, option: str) -> Any:
    found: Any = record
    for name in text_key.split("."):
        if not isinstance(found, dict) or name not in found:
            keys = ", ".join(list(found)[:8]) or "no keys" if isinstance(found, dict) else f"a {type(found).__name__}"
            raise BadRecordError("missing_text_key", f"no key {text_key!r} among {keys} (name it by {option})")
        found = found[name]
    return found


def _decoded(text: bytes | None) -> str:
    if text is None:
        raise BadRecordError("text_is_not_a_string", "the text is null")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError("invalid_utf8", f"invalid UTF-8 ({error.reason} at byte {error.start})") from None
