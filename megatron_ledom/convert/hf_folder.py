"""The files of a Hugging Face folder: weights as a stream, and the tokenizer and configs that stand beside them.

Weights are safetensors files of a bounded size, written and read tensor by tensor.

The format is a specification: 8 bytes of length, a JSON header with type, shape and place of every tensor, then their bytes.
The library that reads it everywhere writes a file from memory only; the writer here holds one tensor,
and the next, which is read meanwhile.
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
"""Of a matrix over the vocabulary, held at once where it is not held whole."""
PICKLED = "pytorch_model.bin"
TOKENIZER = "tokenizer"
"""Folder in a run folder."""
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


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
        """Write all tensors, which are on disk then, and the index if there are several files. Returns sha256 by file name."""
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
    """Return the bytes of `5GB`, `500MB` (powers of ten) or a number. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text} is no size; give one such as 5GB or 500MB")
    return size


class WeightsReader:
    """The tensors of a folder; each is read when it is asked for, and its pages are given back with it.

    Files are chosen as stock transformers chooses them: the one that config.json names, else one whole file, else those of the
    index. A tensor that several of them hold is taken from the last.
    """

    def __init__(self, folder: str, named: str | None = None) -> None:
        """Reads the headers only. `named`: transformers_weights of config.json.

        Raises DataError for a file that is missing, truncated or not what the index says.
        """
        check_no_adapter(folder)
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        """As the files spell them: BF16, F16, F32."""
        self._files: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._start = self._first_file() if named is None else self._checked(named)
        self._claimed = self._read_index() if self._start.endswith(".index.json") else {}
        also_in: dict[str, str] = {}
        for file in sorted(set(self._claimed.values())) or [self._start]:
            also_in |= self._read_header(file)
        self._check_claims(also_in)

    def holding_dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly: theirs, if they have one type, else fp32."""
        types = {dtype for dtype, name in DTYPE_NAMES.items() if name in set(self.dtypes.values())}
        return types.pop() if len(types) == 1 else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file. Raises DataError when there is none of that name."""
        with self._open(self._file_of(name)) as file:
            tensor: torch.Tensor = file.get_tensor(self._aliases.get(name, name))
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Some rows of a tensor."""
        with self._open(self._file_of(name)) as file:
            rows: torch.Tensor = file.get_slice(self._aliases.get(name, name))[start:end]
        return rows

    def rename(self, stored: str, name: str) -> None:
        """Give the tensor that the files call `stored` the name `name`."""
        self.shapes[name], self.dtypes[name] = self.shapes.pop(stored), self.dtypes.pop(stored)
        self._files[name] = self._files.pop(stored)
        self._aliases[name] = stored

    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self._files.values()))

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise DataError(
                f"{self.folder} has no tensor {name}; its config.json is of another model, or the folder is not whole"
            )
        return self._files[name]

    def _first_file(self) -> str:
        """The file that loading begins with. Raises UsageError without one."""
        there = [name for name in (SINGLE, INDEX) if os.path.isfile(os.path.join(self.folder, name))]
        if len(there) == 2:
            log.warning(
                "%s holds %s and %s: the weights are those of %s, as stock transformers reads them; the index and its files may be"
                " of another save, and other programs may read those: remove what is old",
                *(self.folder, SINGLE, INDEX, SINGLE),
            )
        if there:
            return there[0]
        if any(name.startswith("pytorch_model") for name in os.listdir(self.folder)):
            raise UsageError(
                f"{self.folder} has pickled weights only ({PICKLED}), which can run code when loaded and are not read; save it"
                " as safetensors with save_pretrained, where you trust it"
            )
        raise UsageError(f"{self.folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face folder with safetensors")

    def _checked(self, named: str) -> str:
        """The file that config.json names. Raises DataError for one that is not in the folder or is pickled."""
        if (
            not isinstance(named, str)
            or named != os.path.basename(named)
            or not named.endswith((".safetensors", ".index.json"))
        ):
            raise DataError(
                f"{self.folder}/config.json has transformers_weights={named!r}, expected the name of a .safetensors file or of a"
                " .safetensors.index.json in the folder; correct it, or remove the key"
            )
        return named

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file by the index."""
        path = os.path.join(self.folder, self._start)
        try:
            with open(path, encoding="utf-8") as file:
                stored = json.load(file)
            claimed: dict[str, str] = stored["weight_map"]
            stored["metadata"]  # stock transformers does not load an index without
            if claimed and all(isinstance(name, str) and name == os.path.basename(name) for name in claimed.values()):
                return claimed
            raise ValueError("weight_map does not name files of the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no index of safetensors files ({type(error).__name__}: {error}); save the folder once more with"
                " save_pretrained, or copy this file again"
            ) from error

    def _check_claims(self, also_in: dict[str, str]) -> None:
        """Warn of tensors that are not where the index says they are. Raises DataError for one that is nowhere."""
        for name, file in self._claimed.items():
            if name not in self._files:
                raise DataError(
                    f"{os.path.join(self.folder, self._start)} says that {name} is in {file}, which does not hold it, nor does"
                    " another file of the index: they are of different saves, or one was changed; save or copy them once more"
                )
        moved = [name for name, file in self._claimed.items() if self._files[name] != file]
        if odd := list(dict.fromkeys([*moved, *also_in])):
            first = odd[0]
            log.warning(
                "%s: %d tensors are read from another file than the index says, or are in several, as stock transformers reads them:"
                " %s, of %s and %s, from %s; the files may be of different saves",
                *(self.folder, len(odd), first, self._claimed.get(first), also_in.get(first, self._files[first])),
                self._files[first],
            )

    def _read_header(self, file: str) -> dict[str, str]:
        """Note the tensors of a file. Returns those which an earlier file holds too -> that file."""
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
            raise DataError(f"{path} is missing, though {self._named_by()} names it; copy it there once more") from error
        except SafetensorError as error:
            raise DataError(
                f"{path} is no whole safetensors file ({error}): a copy that was cut short, or another format; copy it once more"
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    def _named_by(self) -> str:
        return self._start if self._start.endswith(".index.json") else "transformers_weights of config.json"


def run_tokenizer(checkpoint: str, provenance: Provenance) -> str:
    """Return the folder of the run's copy of its tokenizer. Raises DataError without one, MismatchError if it is another one."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))), TOKENIZER)
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is missing, so the export would have no tokenizer: set data.tokenizer in the run's config and start the run"
            " once more (it copies the tokenizer and goes on), or copy the tokenizer folder there"
        )
    file = Path(folder, "tokenizer.json")
    found = vocabulary_hash(file.read_bytes()) if file.is_file() else "none"
    if found != provenance.tokenizer_sha256:
        raise MismatchError(
            f"{file} has hash {found[:12]}, the run was trained with {provenance.tokenizer_sha256[:12]}: the export's ids would"
            " mean other texts; put the tokenizer there that the shards were made with"
        )
    return folder


def write_companions(folder: str, tokenizer: str, provenance: Provenance) -> None:
    """Write everything but weights, cards and config.json. Raises DataError when stock transformers would not stop at the eod."""
    build_generation_config(provenance).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if (config := Path(folder, TOKENIZER_CONFIG)).is_file():  # a run of an earlier release may hold paths in it
        kept = json.dumps(without_local(read_object(config, json)), indent=2, ensure_ascii=False)
        config.write_text(kept, encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if loaded.eos_token_id != provenance.eod_id:
        raise DataError(
            f"the tokenizer in {tokenizer} has eos id {loaded.eos_token_id}, the run was trained with eod {provenance.eod_id}:"
            " generation would never stop; put the run's own tokenizer there"
        )


def write_config(folder: str, name: str, hf_config: PreTrainedConfig) -> None:
    """Write what becomes config.json, without which no folder loads: call it when all else is written and checked."""
    Path(folder, name).write_text(hf_config.to_json_string(), encoding="utf-8")
