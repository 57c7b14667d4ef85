"""The weights of a Hugging Face folder as a stream: safetensors files of a bounded size, written and read tensor by tensor.

The format is a specification: 8 bytes of length, a JSON header with type, shape and place of every tensor, then their bytes.
The library that reads it everywhere writes a file from memory only; the writer here holds one tensor,
and the next, which is read meanwhile.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ledom.checkpoint.hashed_file import HashedFile, read_ahead
from megatron_ledom.checkpoint.weights_only import grouped
from megatron_ledom.errors import DataError, UsageError

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
BLOCK_ELEMENTS = 1 << 26
"""Of a matrix over the vocabulary, held at once where it is not held whole."""
PICKLED = "pytorch_model.bin"


class WeightsWriter:
    """Writes tensors of one type in a fixed order into files of at most `max_shard_size` bytes each (one tensor may be larger)."""

    def __init__(self, folder: str, shapes: Mapping[str, torch.Size], dtype: torch.dtype, max_shard_size: int) -> None:
        """`shapes`: every tensor that will come, in the order in which it comes."""
        self.folder, self.dtype = folder, dtype
        self._shapes = dict(shapes)
        groups = grouped([(name, shape.numel() * dtype.itemsize) for name, shape in shapes.items()], max_shard_size)
        total = sum(shape.numel() for shape in shapes.values())
        files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        self._files = list(zip(files if len(groups) > 1 else [SINGLE], groups, strict=True))
        self._index = {
            "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
            "weight_map": {name: file for file, names in self._files for name in names},
        }

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
        """Write all tensors, and the index if there are several files; all of it is on disk. Returns sha256 by file name."""
        files = {}
        with ThreadPoolExecutor(4) as threads:
            stream = read_ahead(iter(tensors), threads)
            for name, tensors_inside in self._files:
                files[name] = self._write_file(name, tensors_inside, stream, threads)
            sums = {name: file.sums()["sha256"] for name, file in files.items()}
        if len(self._files) > 1:
            content = json.dumps(self._index, indent=2).encode()
            write_synced(os.path.join(self.folder, INDEX), content)
            sums[INDEX] = hashlib.sha256(content).hexdigest()
        return sums

    def _write_file(
        self, file: str, names: list[str], stream: Iterator[tuple[str, torch.Tensor]], threads: ThreadPoolExecutor
    ) -> HashedFile:
        out = HashedFile(os.path.join(self.folder, file), threads)
        with closing(out):
            out.write(self._header(names))
            for expected in names:
                name, tensor = next(stream)
                assert (name, tensor.shape, tensor.dtype) == (expected, self._shapes[expected], self.dtype)
                out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return out

    def _header(self, names: list[str]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape = self._shapes[name]
            begin, end = end, end + shape.numel() * self.dtype.itemsize
            entries[name] = {"dtype": DTYPE_NAMES[self.dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        return len(text).to_bytes(8, "little") + text


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` (powers of ten) or a number. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text} is no size; give one such as 5GB or 500MB")
    return size


def write_synced(path: str, content: bytes) -> None:
    """Write a small file; it is on disk after this."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class WeightsReader:
    """The tensors of a folder; each is read when it is asked for, and its pages are given back with it."""

    def __init__(self, folder: str) -> None:
        """Reads the headers only. Raises DataError for a file that is missing, truncated or not what the index says."""
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        """As the files spell them: BF16, F16, F32."""
        self._files: dict[str, str] = {}
        claimed = self._claimed_files()
        for file in sorted(set(claimed.values())) if claimed else [SINGLE]:
            self._read_header(file)
        for name, file in claimed.items():
            if self._files.get(name) != file:
                raise DataError(
                    f"{os.path.join(folder, INDEX)} says that {name} is in {file}, which does not hold it; get the folder anew"
                )

    @property
    def num_elements(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file. Raises DataError when there is none of that name."""
        with self._open(self._file_of(name)) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Some rows of a tensor."""
        with self._open(self._file_of(name)) as file:
            rows: torch.Tensor = file.get_slice(name)[start:end]
        return rows

    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self._files.values()))

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise DataError(
                f"{self.folder} has no tensor {name}; its config.json is of another model, or the folder is not whole"
            )
        return self._files[name]

    def _claimed_files(self) -> dict[str, str]:
        """Tensor -> file by the index; {} when there is one file without an index. Raises UsageError without either."""
        path = os.path.join(self.folder, INDEX)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    claimed: dict[str, str] = json.load(file)["weight_map"]
                if all(isinstance(name, str) and name == os.path.basename(name) for name in claimed.values()):
                    return claimed
                raise ValueError("weight_map does not name files of the folder")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path} is no index of safetensors files ({error}); get the folder anew") from error
        if os.path.isfile(os.path.join(self.folder, SINGLE)):
            return {}
        if any(name.startswith("pytorch_model") for name in os.listdir(self.folder)):
            raise UsageError(
                f"{self.folder} has pickled weights only ({PICKLED}), which can run code when loaded and are not read; save it"
                " as safetensors with save_pretrained, where you trust it"
            )
        raise UsageError(f"{self.folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face folder with safetensors")

    def _read_header(self, file: str) -> None:
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                self._files[name] = file
                self.shapes[name], self.dtypes[name] = torch.Size(part.get_shape()), part.get_dtype()

    def _open(self, file: str) -> Any:
        path = os.path.join(self.folder, file)
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing, though {INDEX} names it; get the folder anew") from error
        except SafetensorError as error:
            raise DataError(f"{path} is no whole safetensors file ({error}); get the folder anew") from error
