"""Store the finished parts of an unfinished shard in the work folder PREFIX.work, see `storage.jobs`.

A part consists of its ids (.bin), the lengths of its documents (.len) and its record (.json).
"""

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ledom.data.shards.shard import InputFile, ShardWriter
from megatron_ledom.errors import DataError, cannot_write
from megatron_ledom.storage.jobs import Request, WorkFolder, finish_unit

HASH_BYTES = 1 << 22


@dataclass(slots=True, kw_only=True)
class PartRecord:
    """Numbers, messages and hash of a finished part."""

    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """Descriptions of the first bad records."""
    input_files: list[InputFile] = field(default_factory=list)
    contamination: dict[str, Any] = field(default_factory=dict)
    """`ContaminationCounts` of the part; empty without a search."""
    xxh3: str = ""
    """Hash of the ids, then of the lengths. Parts are not forced to the disk, because that would write every shard twice. When the
    work resumes, this hash shows a part that a power failure destroyed, and the part is made again."""
    seconds: float = 0.0
    """Wall-clock time of the worker."""


class PartFile:
    """The files of an unfinished part."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._ids = open(f"{path}.bin", "wb", buffering=0)  # noqa: SIM115  closed by finish or by the process's end
            self._lengths = open(f"{path}.len", "wb")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(error, path) from error
        self._ids_hash, self._lengths_hash = xxhash.xxh3_64(), xxhash.xxh3_64()
        self.num_documents = 0
        self.num_tokens = 0

    def append(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Add documents, as for `ShardWriter.append`."""
        _write_all(self._ids, ids, f"{self.path}.bin", self._ids_hash)
        _write_all(self._lengths, lengths, f"{self.path}.len", self._lengths_hash)
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def finish(self, record: PartRecord) -> PartRecord:
        """Close the files and write the record, which makes the part finished."""
        record.xxh3 = self._ids_hash.hexdigest() + self._lengths_hash.hexdigest()
        try:
            for stream in (self._ids, self._lengths):
                stream.close()
            finish_unit(self.path, asdict(record))
        except OSError as error:
            raise cannot_write(error, self.path) from error
        return record


def _write_all(stream: Any, values: npt.NDArray[Any], path: str, digest: Any) -> None:
    content = np.ascontiguousarray(values).view(np.uint8).data
    digest.update(content)
    try:
        while content:
            content = content[stream.write(content) :]
    except OSError as error:
        raise cannot_write(error, path) from error


def _hash_of(path: str) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


class PartStore(WorkFolder):
    """The parts of one shard, see `WorkFolder`."""

    def __init__(self, prefix: str, request: Request, *, start_over: bool) -> None:
        super().__init__(prefix, request, start_over=start_over, serves=_served)

    def part_path(self, number: int) -> str:
        """Return the path of a part, without ending."""
        return self.path(_unit(number))

    def intact(self, number: int) -> PartRecord | None:
        """Return the record of a finished part whose files match its hash. Otherwise remove the record and return None."""
        stored, path = self.finished(_unit(number)), self.part_path(number)
        if stored is None:
            return None
        record = PartRecord(**{**stored, "input_files": [InputFile(**item) for item in stored["input_files"]]})
        with contextlib.suppress(FileNotFoundError):
            if _hash_of(f"{path}.bin") + _hash_of(f"{path}.len") == record.xxh3:
                return record
        self.forget(_unit(number))
        return None

    def append_to(self, writer: ShardWriter, number: int, record: PartRecord) -> None:
        """Add a finished part to the shard. Raises DataError if its files do not match its hash."""
        path, hashes = self.part_path(number), (xxhash.xxh3_64(), xxhash.xxh3_64())
        writer.append_files(f"{path}.bin", f"{path}.len", hashes)
        if "".join(digest.hexdigest() for digest in hashes) != record.xxh3:
            raise DataError(f"{path}.bin has changed since it was written: check the disk, then run the same command again")


def _unit(number: int) -> str:
    return f"part-{number:06d}"


def _served(before: Request, now: Request) -> Request:
    """Return the request nearest to `now` that the parts of `before` satisfy. Parts of `--on-error fail` also satisfy `skip`."""
    return {**before, "on_error": now.get("on_error")} if before.get("on_error") == "fail" else before
