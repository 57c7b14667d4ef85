"""Records of artifacts: a hash of the bytes, or of the text without times and folders, and the values in it.

Only `MASKED_KEYS` and `MASKED_TEXT` are not recorded.
"""

import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Record = dict[str, Any]

MASKED_KEYS = (
    *(
        "created_at",
        "started_at",
        "saved_at",
        "checkpoint_manifest_sha256",
        "host",
        "git",
        "elapsed_seconds",
        "seconds",
        "slowest_seconds",
        "slowest_task",
    ),
    *("tokens_per_second", "seconds_per_iteration", "mfu", "eta_seconds", "data_wait_seconds", "memory_gib"),
    *("rank_seconds_min", "rank_seconds_mean", "rank_seconds_max", "slowest_rank"),
)
"""Keys of JSON whose values depend on time, speed, host or commit; a checkpoint's manifest contains the time of its save."""
MASKED_TEXT = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"), "TIME"),
    (re.compile(r"(?<![\d.])1[78]\d{17}(?![\d.])"), "0"),
    (re.compile(r"(?<=checkpoint manifest sha256 \| )[0-9a-f]{64}"), "HASH"),
    (re.compile(r"[\d.,]+ \w+ are free"), "SPACE is free"),
    (re.compile(r"^speed +\d.*", re.MULTILINE), "SPEED"),
    (re.compile(r"base64,[A-Za-z0-9+/=]+"), "PICTURE"),
    (
        re.compile(
            r"((?:\bmegatron[-_]ledom(?:_version)?|\bpackage[_ ]version|\bby version)(?:[\"':| ]|&#x27;|&quot;)+)\d+\.\d+\.\d+"
        ),
        r"\1VERSION",
    ),
)
"""Times, as text and in nanoseconds, speeds, free space, pictures within pages, and the version of this package."""
BYTES = {".bin", ".idx", ".targets", ".index", ".hashes", ".model"}
MOST_CHARACTERS = 40_000
"""Longest text whose lines are recorded, too."""
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


def read_artifact(path: Path, places: Sequence[tuple[str, str]]) -> Record:
    """Return the record of a file, by the ending of its name, or of a checkpoint folder."""
    if path.is_dir():
        return {"kind": "tensors", "tensors": checkpoint_tensors(path), "files": sorted(file.name for file in path.iterdir())}
    if path.suffix == ".safetensors":
        return {"kind": "tensors", "tensors": {name: tensor_record(value) for name, value in sorted(load_file(path).items())}}
    if path.suffix == ".png":
        return {"kind": "picture", "is_one": path.read_bytes().startswith(b"\x89PNG")}
    if path.suffix in BYTES:
        return {"kind": "bytes", "sha256": hash_of(path.read_bytes()), "num_bytes": path.stat().st_size}
    return text_record(path.read_bytes().decode("utf-8"), path.suffix, places)


def text_record(text: str, kind: str, places: Sequence[tuple[str, str]]) -> Record:
    """Return the record of a text: the hash of the masked text, and its values or lines."""
    text = masked(text, places)
    record: Record = {"kind": "text", "sha256": hash_of(text.encode())}
    if kind == "numbers":
        return {"kind": "numbers", "lines": [NUMBER.findall(line) for line in text.splitlines() if NUMBER.search(line)]}
    if kind == "structure":
        return {"kind": "text", "lines": NUMBER.sub("NUMBER", text).splitlines()}
    if len(text) > MOST_CHARACTERS and kind != ".html":
        return record
    if kind == ".json":
        return {**record, "kind": "values", "values": json.loads(text)}
    if kind == ".jsonl":
        return {**record, "kind": "values", "values": [json.loads(line) for line in text.splitlines()]}
    return {**record, "lines": (visible(text) if kind == ".html" else text).splitlines()}


def masked(text: str, places: Sequence[tuple[str, str]]) -> str:
    """Return the text with words in place of folders, times and the values of masked keys."""
    for place, word in places:
        text = text.replace(place, word)
    for pattern, word in MASKED_TEXT:
        text = pattern.sub(word, text)
    value = r'("(?:[^"\\]|\\.)*"|\{[^{}]*\}|\[[^\[\]]*\]|[^\s,{}\[\]"]+)'
    return re.sub(rf'"({"|".join(MASKED_KEYS)})": ?{value}', r'"\1": "MASKED"', text)


def visible(page: str) -> str:
    """Return the words of a page, one line per element with words."""
    page = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    words = (html.unescape(part).strip() for part in re.split(r"<[^>]*>", page))
    return "\n".join(part for part in words if part)


def checkpoint_tensors(folder: Path) -> Record:
    """Return the record of every tensor of a checkpoint, and the content of common.pt."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sorted(stored.items())
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    records = {name: tensor_record(value) for name, value in tensors.items()}
    common = torch.load(folder / "common.pt", weights_only=True)
    return {**records, "common.pt": json.loads(json.dumps(common, default=str))}


def tensor_record(tensor: torch.Tensor) -> Record:
    """Return type, shape and hash of a tensor; and its norm and weighted sum, for machines with other last bits."""
    content = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    values = tensor.double().flatten()
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64) / max(1, len(values))
    return {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": hash_of(content.numpy().tobytes()),
        "norm": float(values.norm()),
        "weighted": float((values.abs() * weights).sum()),
    }


def hash_of(content: bytes) -> str:
    """Return the sha256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
