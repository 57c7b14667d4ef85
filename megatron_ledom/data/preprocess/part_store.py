"""Finished parts of a shard in the making: PREFIX.work, a folder that a kill at any moment leaves usable.

A part is its ids (.bin), its documents' lengths (.len) and a record (.json) that is renamed into place last: without the record
the part does not exist. `plan.json` says what was asked; the same request goes on from the finished parts, another is refused.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from megatron_ledom.data.shards.shard import InputFile, ShardWriter
from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.storage.files import write_whole

HASH_BYTES = 1 << 22

Request = dict[str, Any]
"""What decides the content of a shard: options, tokenizer, input files with size and version."""


@dataclass(slots=True, kw_only=True)
class PartRecord:
    """What is known of a finished part."""

    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """Descriptions of the first bad records."""
    input_files: list[InputFile] = field(default_factory=list)
    xxh3: str = ""
    """Of the ids and then the lengths. Parts and records are not forced to the disk, which would write every shard twice: a part
    that a power failure took is found by this when the work is taken up, and made again."""
    seconds: float = 0.0
    """Wall-clock time the worker took."""


class PartFile:
    """A part in the making."""

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

    def append(self, packed: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Add what `pack_documents` returned."""
        _write_all(self._ids, packed, f"{self.path}.bin", self._ids_hash)
        _write_all(self._lengths, lengths, f"{self.path}.len", self._lengths_hash)
        self.num_documents += len(lengths)
        self.num_tokens += len(packed)

    def finish(self, record: PartRecord) -> PartRecord:
        """Make the part exist."""
        record.xxh3 = self._ids_hash.hexdigest() + self._lengths_hash.hexdigest()
        try:
            for stream in (self._ids, self._lengths):
                stream.close()
            record_path = Path(f"{self.path}.json")
            record_path.with_suffix(".json.part").write_bytes(orjson.dumps(asdict(record)))
            record_path.with_suffix(".json.part").replace(record_path)
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


class PartStore:
    """The work folder, held by one process. Use as a context manager; `remove` it when the shard is finished.

    Work of another request is refused, or thrown away with `start_over`; that of the same request is always gone on with.
    """

    def __init__(self, prefix: str, request: Request, *, start_over: bool) -> None:
        self.folder = Path(f"{prefix}.work")
        self.request = request
        parents = [path for path in (self.folder.parent, *self.folder.parent.parents) if not path.exists()]
        self._made_folders = [] if self.folder.exists() else parents
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock: BinaryIO = (self.folder / "lock").open("wb")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}); choose another --output-prefix") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(
                f"another process is writing {prefix} now; wait for it, or choose another --output-prefix"
            ) from error
        try:
            self._take_up(start_over)
        except OSError as error:
            self.__exit__(OSError, error, None)
            raise cannot_write(error, str(self.folder / "plan.json")) from error
        except BaseException:
            self._lock.close()
            raise

    def _take_up(self, start_over: bool) -> None:
        plan = self.folder / "plan.json"
        planned = orjson.loads(plan.read_bytes()) if plan.exists() else {}
        difference = request_difference(planned, self.request)
        if planned and difference is None:
            if planned != self.request:  # from now on parts may have skipped bad records
                write_whole(plan, orjson.dumps(self.request))
            return
        if planned and not start_over:
            raise UsageError(
                f"{self.folder} has unfinished work of another request: {difference}; ask the same as before to go on, or start"
                " over with --overwrite"
            )
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        write_whole(plan, orjson.dumps(self.request))

    def path(self, number: int) -> str:
        """Where a part is, without ending."""
        return str(self.folder / f"part-{number:06d}")

    def finished(self, number: int) -> PartRecord | None:
        """The record of a part, None if it is not finished."""
        try:
            stored = orjson.loads(Path(f"{self.path(number)}.json").read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):  # a power failure may have left it empty
            return None
        return PartRecord(**{**stored, "input_files": [InputFile(**item) for item in stored["input_files"]]})

    def intact(self, number: int) -> PartRecord | None:
        """The record of a finished part whose files are what was written; of another one the record is removed."""
        record, path = self.finished(number), self.path(number)
        if record is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            if _hash_of(f"{path}.bin") + _hash_of(f"{path}.len") == record.xxh3:
                return record
        os.unlink(f"{path}.json")
        return None

    def append_to(self, writer: ShardWriter, number: int, record: PartRecord) -> None:
        """Add a finished part to the shard. Raises DataError when its files are not what was written a moment ago."""
        path, hashes = self.path(number), (xxhash.xxh3_64(), xxhash.xxh3_64())
        writer.append_files(f"{path}.bin", f"{path}.len", hashes)
        if "".join(digest.hexdigest() for digest in hashes) != record.xxh3:
            raise DataError(f"{path}.bin is not what was written: check the disk, then run the same command again")

    def num_finished(self) -> int:
        """How many parts are finished."""
        return sum(1 for _ in self.folder.glob("part-*.json"))

    def remove(self) -> None:
        """The shard is finished, or nothing of it is."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "PartStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self.num_finished():
            self.remove()  # nothing to go on from
            for folder in self._made_folders:
                with contextlib.suppress(OSError):  # another task's files may be in it
                    folder.rmdir()
        self._lock.close()


def request_difference(before: Request, now: Request) -> str | None:
    """What differs between two requests, in words; None if nothing that matters does.

    Finished parts had no bad record under `--on-error fail`, so they are those that `skip` would have made.
    """
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new or (name == "on_error" and (old, new) == ("fail", "skip")):
            continue
        if name == "input":
            return _input_difference(old or [], new or [])
        return f"{name} was {_short(old)} and is {_short(new)}"
    return None


def _input_difference(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> str:
    old, new = {item[0]: item[1:] for item in before}, {item[0]: item[1:] for item in now}
    for path in [*old, *new]:
        if path not in new:
            return f"the input {path} is not among the inputs any more"
        if path not in old:
            return f"the input {path} is new"
        if old[path] != new[path]:
            sizes = (
                f"{old[path][0]:,} bytes then, {new[path][0]:,} now"
                if old[path][0] != new[path][0]
                else "same size, written anew"
            )
            return f"the input {path} has changed since ({sizes})"
    return "the order of the inputs has changed"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
