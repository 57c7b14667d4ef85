"""The files of a Hugging Face folder: weights, tokenizer and configs.

Weights are safetensors files of limited size, written and read tensor by tensor. A file has 8 bytes with the length of the
header, a JSON header with type, shape and offsets of every tensor, then the bytes of the tensors. The safetensors library can
write only files whose tensors are all in memory; the writer here needs memory for two tensors, the current and the next one.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig

from megatron_ledom.checkpoint.weights_only import grouped
from megatron_ledom.convert.hf_config import build_generation_config
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.model_folder import check_no_adapter
from megatron_ledom.provenance import Provenance, vocabulary_hash
from megatron_ledom.storage.hashed_file import HashedFile, read_ahead
from megatron_ledom.tokenizers.corpus_tokenizer import without_local
from megatron_ledom.tokenizers.json_objects import read_object

log = logging.getLogger(__name__)

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_ELEMENTS = 1 << 26
"""Elements of one block, when a matrix over the vocabulary is read block by block."""
PICKLED = "pytorch_model.bin"
TOKENIZER = "tokenizer"
"""Name of the tokenizer's folder in a run folder."""
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


class WeightsWriter:
    """Writes tensors of one type into files of at most `max_shard_size` bytes. A larger tensor gets a file of its own."""

    def __init__(self, folder: str, shapes: Mapping[str, torch.Size], dtype: torch.dtype, max_shard_size: int) -> None:
        """`shapes`: all tensors, in the order in which they will be written."""
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
        """Write all tensors to the disk, and the index if there are several files. Returns file name -> sha256."""
        files = {}
        with ThreadPoolExecutor(4) as threads:
            stream = read_ahead(iter(tensors), threads)
            for name, tensors_inside in self._files:
                files[name] = self._write_file(name, tensors_inside, stream, threads)
            sums = {name: file.sums()["sha256"] for name, file in files.items()}
        if len(self._files) > 1:
            content = json.dumps(self._index, indent=2, allow_nan=False).encode()
            Path(self.folder, INDEX).write_bytes(content)
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
    """Return the bytes of a size such as `5GB` or `500MB` (powers of ten), or of a number. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text} is not a size; give one such as 5GB or 500MB")
    return size


class WeightsReader:
    """The tensors of a folder. Each is memory-mapped when it is requested, and unmapped when the tensor is freed.

    Files are chosen as stock transformers does: the one that config.json names, else the single file, else those of the index. If
    several files contain a tensor, the last file is used.
    """

    def __init__(self, folder: str, named: str | None = None) -> None:
        """Read the headers. `named`: the value of transformers_weights in config.json.

        Raises DataError if a file is missing, truncated or contradicts the index.
        """
        check_no_adapter(folder)
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        """Types as the files name them: BF16, F16, F32."""
        self._files: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._start = self._first_file() if named is None else self._checked(named)
        self._claimed = self._read_index() if self._start.endswith(".index.json") else {}
        also_in: dict[str, str] = {}
        for file in sorted(set(self._claimed.values())) or [self._start]:
            also_in |= self._read_header(file)
        self._check_claims(also_in)

    def exact_dtype(self) -> torch.dtype:
        """Return the smallest type that represents every tensor exactly: their common type, else fp32."""
        types = {dtype for dtype, name in DTYPE_NAMES.items() if name in set(self.dtypes.values())}
        return types.pop() if len(types) == 1 else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file. Raises DataError if no tensor has that name."""
        with self._open(self._file_of(name)) as file:
            tensor: torch.Tensor = file.get_tensor(self._aliases.get(name, name))
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return the rows `start` to `end` of a tensor."""
        with self._open(self._file_of(name)) as file:
            rows: torch.Tensor = file.get_slice(self._aliases.get(name, name))[start:end]
        return rows

    def rename(self, stored: str, name: str) -> None:
        """Rename the tensor `stored` of the files to `name`."""
        self.shapes[name], self.dtypes[name] = self.shapes.pop(stored), self.dtypes.pop(stored)
        self._files[name] = self._files.pop(stored)
        self._aliases[name] = stored

    def files(self) -> list[str]:
        """Return the names of the files that contain tensors."""
        return sorted(set(self._files.values()))

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise DataError(
                f"{self.folder} has no tensor {name}; its config.json belongs to another model, or files are missing: copy the folder again"
            )
        return self._files[name]

    def _first_file(self) -> str:
        """Return the file with which loading begins. Raises UsageError without one."""
        present = [name for name in (SINGLE, INDEX) if os.path.isfile(os.path.join(self.folder, name))]
        if len(present) == 2:
            log.warning(
                "%s has both %s and %s: the weights of %s are used, as by stock transformers; the index and its files may be"
                " of another save, which other programs may read: remove the old files",
                *(self.folder, SINGLE, INDEX, SINGLE),
            )
        if present:
            return present[0]
        if any(name.startswith("pytorch_model") for name in os.listdir(self.folder)):
            raise UsageError(
                f"{self.folder} has only pickled weights ({PICKLED}), which are not read because they can run code; if you trust them, save"
                " them as safetensors with save_pretrained"
            )
        raise UsageError(f"{self.folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face folder with safetensors")

    def _checked(self, named: str) -> str:
        """Return the file that config.json names. Raises DataError if it is outside the folder or pickled."""
        if (
            not isinstance(named, str)
            or named != os.path.basename(named)
            or not named.endswith((".safetensors", ".index.json"))
        ):
            raise DataError(
                f"{self.folder}/config.json has transformers_weights={named!r}, expected the name of a .safetensors file or a"
                " .safetensors.index.json of the folder; correct or remove the key"
            )
        return named

    def _read_index(self) -> dict[str, str]:
        """Return tensor -> file of the index."""
        path = os.path.join(self.folder, self._start)
        try:
            with open(path, encoding="utf-8") as file:
                stored = json.load(file)
            claimed: dict[str, str] = stored["weight_map"]
            stored["metadata"]  # stock transformers does not load an index without metadata
            if claimed and all(isinstance(name, str) and name == os.path.basename(name) for name in claimed.values()):
                return claimed
            raise ValueError("weight_map does not name files of the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not an index of safetensors files ({type(error).__name__}: {error}); save the folder again with"
                " save_pretrained, or copy this file again"
            ) from error

    def _check_claims(self, also_in: dict[str, str]) -> None:
        """Warn of tensors in other files than the index names. Raises DataError if a tensor is missing."""
        for name, file in self._claimed.items():
            if name not in self._files:
                raise DataError(
                    f"{os.path.join(self.folder, self._start)} names {file} for {name}, but neither this file nor any other file of the index"
                    " contains it: the files are of different saves, or one was changed; save or copy them again"
                )
        moved = [name for name, file in self._claimed.items() if self._files[name] != file]
        if misplaced := list(dict.fromkeys([*moved, *also_in])):
            first = misplaced[0]
            log.warning(
                "%s: %d tensors are in another file than the index names, or in several files; they are read as by stock transformers"
                " (%s of %s and %s: from %s); the files may be of different saves",
                *(self.folder, len(misplaced), first, self._claimed.get(first), also_in.get(first, self._files[first])),
                self._files[first],
            )

    def _read_header(self, file: str) -> dict[str, str]:
        """Record the tensors of a file. Returns tensor -> earlier file, for tensors that an earlier file contains too."""
        twice = {}
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    twice[name] = self._files[name]
                part = opened.get_slice(name)
                self._files[name] = file
                self.shapes[name], self.dtypes[name] = torch.Size(part.get_shape()), part.get_dtype()
        return twice

    def _open(self, file: str) -> Any:
        path = os.path.join(self.folder, file)
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing, but {self._named_by()} names it; copy it again") from error
        except SafetensorError as error:
            raise DataError(
                f"{path} is not a complete safetensors file ({error}): it was truncated, or has another format; copy it again"
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; make it readable") from error

    def _named_by(self) -> str:
        return self._start if self._start.endswith(".index.json") else "transformers_weights of config.json"


def run_tokenizer(checkpoint: str, provenance: Provenance) -> str:
    """Return the folder with the run's copy of its tokenizer.

    Raises DataError if it is missing, MismatchError if it is another tokenizer.
    """
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))), TOKENIZER)
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is missing, so the export would have no tokenizer: set data.tokenizer in the config of the run and start it"
            " again (it copies the tokenizer and resumes), or copy the tokenizer folder there"
        )
    file = Path(folder, "tokenizer.json")
    found = vocabulary_hash(file.read_bytes()) if file.is_file() else "none"
    if found != provenance.tokenizer_sha256:
        raise MismatchError(
            f"{file} has hash {found[:12]}, but the run was trained with {provenance.tokenizer_sha256[:12]}: the ids of the"
            " export would mean other texts; put the tokenizer of the shards there"
        )
    return folder


def write_companions(folder: str, tokenizer: str, provenance: Provenance) -> None:
    """Write all files except weights, cards and config.json.

    Raises DataError if generation with stock transformers would not stop at the eod.
    """
    build_generation_config(provenance).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if (config := Path(folder, TOKENIZER_CONFIG)).is_file():  # in a run of an earlier release it may contain paths
        kept = json.dumps(without_local(read_object(config, json)), indent=2, ensure_ascii=False)
        config.write_text(kept, encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if loaded.eos_token_id != provenance.eod_id:
        raise DataError(
            f"the tokenizer in {tokenizer} has eos id {loaded.eos_token_id}, but the run was trained with eod"
            f" {provenance.eod_id}: generation would never stop; put the tokenizer of the run there"
        )


def write_config(folder: str, name: str, hf_config: PreTrainedConfig) -> None:
    """Write the config to the file `name`, which becomes config.json. Call it last: no folder loads without it."""
    Path(folder, name).write_text(hf_config.to_json_string(), encoding="utf-8")
