"""The sample index: where every sample of a blend begins. It is built once per blend, in a file named by a hash of its content.

A file contains, for each source and each pass over it, the three arrays of megatron-core's GPTDataset: the shuffled documents, the
document and offset at which each sample begins, and the shuffled samples. The first pass equals that of GPTDataset. Each later pass
is shuffled separately, so a longer run begins like a shorter one, and no text is read twice before its whole source was read once.

Layout, little-endian: 8 bytes magic, 32 bytes key, u64 bytes of the body, u64 XXH3 of the body, 8 bytes zero; then for each part
i32 documents [n], i32 samples [s + 1, 2], u32 order [s].
"""

import hashlib
import json
import logging
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from megatron.core.datasets import helpers

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Blend, Source, Sources
from megatron_ledom.data.dataset.build_once import Progress, build_once, cannot_build, node
from megatron_ledom.data.shards.index_file import HEADER as INDEX_HEADER
from megatron_ledom.errors import DataError
from megatron_ledom.platform.launch import Launch
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.storage.files import new_file
from megatron_ledom.storage.hashes import sha256_of

log = logging.getLogger(__name__)

FORMAT = 1
MAGIC = b"LEDOMSIX"
HEADER = struct.Struct("<8s32sQQ8x")
CHUNK_BYTES = 1 << 24
DOCUMENTS_A_WORKER = 2_000_000
"""Number of documents for which another process is worth starting."""

Arrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint32]]
"""documents [n], samples [s + 1, 2], order [s]."""


@dataclass(frozen=True, slots=True)
class Part:
    """One pass over one source, and its position in the file."""

    source: Source
    epoch: int
    num_samples: int
    first_byte: int

    @property
    def num_documents(self) -> int:
        """Number of documents of the source from which the blend draws."""
        return self.source.documents.last - self.source.documents.first

    @property
    def num_bytes(self) -> int:
        """Size of the three arrays in bytes."""
        return 4 * (self.num_documents + 2 * (self.num_samples + 1) + self.num_samples)


class IndexSpec:
    """Specification of the index of one blend: its parts, and the key of its file."""

    def __init__(self, blend: Blend, seq_length: int, seed: int) -> None:
        self.seq_length, self.seed = seq_length, seed
        self.parts: dict[tuple[int, int], Part] = {}
        """Parts by (number of the source, pass)."""
        first_byte = HEADER.size
        content = []
        counts = blend.interleave.counts(blend.num_samples).tolist()
        for number, (source, drawn) in enumerate(zip(blend.sources, counts, strict=True)):
            samples = source.samples_available(seq_length)
            passes = -(-drawn // samples) if drawn else 0
            for epoch in range(passes):
                part = self.parts[number, epoch] = Part(source, epoch, samples, first_byte)
                first_byte += part.num_bytes
            content.append([*_content(source), passes])
        self.num_bytes = first_byte
        described = json.dumps([FORMAT, seq_length, seed, content], separators=(",", ":"))
        self.key = hashlib.sha256(described.encode()).digest()

    def path(self, cache: str) -> str:
        """Return the path of the index in the folder `cache`."""
        return os.path.join(cache, f"{self.key.hex()[:32]}.index")

    def is_built(self, cache: str) -> bool:
        """Return True if the file exists and has the right key and size. Does not read its body."""
        try:
            with open(self.path(cache), "rb") as stream:
                content = stream.read(HEADER.size)
                size = os.fstat(stream.fileno()).st_size
        except (FileNotFoundError, NotADirectoryError):
            return False
        if len(content) < HEADER.size:
            return False
        magic, key, body, _ = HEADER.unpack(content)
        return bool((magic, key, body + HEADER.size, size) == (MAGIC, self.key, self.num_bytes, self.num_bytes))

    def is_intact(self, cache: str) -> bool:
        """Return True if the file `is_built` and its body has the checksum in its header. Reads the whole file."""
        if not self.is_built(cache):
            return False
        with open(self.path(cache), "rb") as stream:
            _, _, _, expected = HEADER.unpack(stream.read(HEADER.size))
            digest = xxhash.xxh3_64()
            while block := stream.read(CHUNK_BYTES):
                digest.update(block)
        return digest.intdigest() == int(expected)


def _content(source: Source) -> list[str | int]:
    """Return the values that determine the samples of a source: its content, not its name or date."""
    manifest, documents = source.manifest, source.documents
    stated: list[str | int] = [manifest.bin_sha256, manifest.idx_sha256, manifest.dtype]
    return [*stated, manifest.num_documents, manifest.num_tokens, documents.first, documents.last]


class SampleIndex:
    """The memory-mapped index file of a spec."""

    def __init__(self, spec: IndexSpec, cache: str) -> None:
        path = spec.path(cache)
        if not spec.is_built(cache):
            raise DataError(f"node {node()}: the sample index {path} is missing or damaged; delete it and start again")
        self._spec = spec
        self._content: npt.NDArray[Any] = np.asarray(np.memmap(path, np.uint8, "r")) if spec.parts else np.zeros(0, np.uint8)

    def part(self, source: int, epoch: int) -> tuple[Part, Arrays]:
        """Return the part and the arrays of one pass over one source."""
        part = self._spec.parts[source, epoch]
        words = self._content[part.first_byte : part.first_byte + part.num_bytes].view("<i4")
        documents, rest = words[: part.num_documents], words[part.num_documents :]
        samples, order = rest[: 2 * (part.num_samples + 1)], rest[2 * (part.num_samples + 1) :]
        return part, (documents, samples.reshape(-1, 2), order.view("<u4"))


def index_spec(config: RunConfig, blend: Blend) -> IndexSpec:
    """Return the specification of the index of a blend of the run."""
    return IndexSpec(blend, config.data.seq_length, config.train.seed)


def prepare_indices(config: RunConfig, sources: Sources, cache: str, launch: Launch) -> None:
    """Make sure that the folder `cache` has the index of every blend of the run. Call on every rank, before making process groups.

    The first rank of each node, by `launch`, checks the `.idx` of the shards against their manifests and builds missing files. The
    other ranks wait for the files. Raises DataError for a changed shard, and on a waiting rank if its builder is gone.
    """
    specs = [index_spec(config, blend) for blend in sources.all_blends()]
    may_build = launch.local_rank == 0
    damaged: list[IndexSpec] = []

    def is_done() -> bool:
        return not damaged and all(spec.is_built(cache) for spec in specs)

    def build(note: Any) -> None:
        """Check the shards, and build the missing files."""
        check_indexed(sources)
        for spec in specs:
            if not (spec.is_intact(cache) if damaged else spec.is_built(cache)):  # another node may have built it meanwhile
                build_index(spec, cache, note)

    if may_build and is_done():
        check_indexed(sources)
        damaged += [spec for spec in specs if not spec.is_intact(cache)]
        for spec in damaged:  # do not delete the file: another node may have replaced it already
            log.warning("node %s: the sample index %s is damaged and will be rebuilt", node(), spec.path(cache))
    build_once(os.path.join(cache, "lock"), is_done, build, may_build=may_build)


def check_indexed(sources: Sources) -> None:
    """Raise DataError if a `.idx` does not have the hash of its manifest."""
    manifests = {source.prefix: source.manifest for blend in sources.all_blends() for source in blend.sources}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = threads.map(lambda prefix: sha256_of(f"{prefix}.idx"), manifests)
        for (prefix, manifest), digest in zip(manifests.items(), found, strict=True):
            if digest != manifest.idx_sha256:
                raise DataError(
                    f"node {node()}: {prefix}.idx does not have the sha256 of its manifest: it was replaced or damaged; run"
                    f" ledom inspect-shard {prefix} --verify to see the problem, and copy the shard again"
                )


def build_index(spec: IndexSpec, cache: str, note: Any = lambda text: None) -> None:
    """Build the index file of a spec in the folder `cache`, with all cores that this process may use."""
    path, started = spec.path(cache), time.monotonic()
    parts = sorted(spec.parts.values(), key=lambda part: -part.num_documents)  # the longest first
    total = sum(part.num_documents for part in parts)
    progress = Progress("sample index", total, note)
    workers = min(len(os.sched_getaffinity(0)), total // DOCUMENTS_A_WORKER)
    try:
        os.makedirs(cache, exist_ok=True)
        with new_file(path, is_shared=True) as stream:  # without working locks several processes may write it
            stream.truncate(spec.num_bytes)
            write = partial(_write_part, spec.seq_length, spec.seed, stream.name)
            written = {}
            sums = ordered_map(write, parts, workers, _name, progress.advance) if workers > 1 else map(write, parts)
            for part, checksum in zip(parts, sums, strict=True):
                written[part.first_byte] = checksum
                progress.advance(part.num_documents)
            _seal(spec, stream.name, written)
    except OSError as error:
        raise cannot_build(error, cache) from error
    finally:
        progress.bar.close()
    size = spec.num_bytes / 1e6
    log.info("built the sample index %s: %d parts, %.1f MB, %.1f s", path, len(parts), size, time.monotonic() - started)


def _name(part: Part) -> str:
    return f"the sample index of {part.source.prefix}"


def _seal(spec: IndexSpec, path: str, written: dict[int, int]) -> None:
    """Write header and checksum of the file. Raises DataError if a part on the disk differs from the part in memory.

    written: first byte of each part -> checksum of the part in memory. So the checksum of the file is that of the built arrays.
    """
    digest = xxhash.xxh3_64()
    with open(path, "r+b") as stream:
        for part in spec.parts.values():
            stream.seek(part.first_byte)
            of_part, left = xxhash.xxh3_64(), part.num_bytes
            while left and (block := stream.read(min(left, CHUNK_BYTES))):
                digest.update(block)
                of_part.update(block)
                left -= len(block)
            if of_part.intdigest() != written[part.first_byte]:
                raise DataError(
                    f"node {node()}: {path} has changed since the part for {part.source.prefix} was written; check the disk, or set"
                    " data.path_to_cache to a folder on another disk"
                )
        stream.seek(0)
        stream.write(HEADER.pack(MAGIC, spec.key, spec.num_bytes - HEADER.size, digest.intdigest()))


def _write_part(seq_length: int, seed: int, path: str, part: Part) -> int:
    """Build and write the arrays of a part. Returns their checksum, computed before writing."""
    digest = xxhash.xxh3_64()
    try:
        with open(path, "r+b") as stream:
            stream.seek(part.first_byte)
            for array in build_arrays(part.source, seq_length, seed, part.epoch):
                digest.update(np.ascontiguousarray(array).data)
                array.tofile(stream)
        return digest.intdigest()
    except OSError as error:
        raise cannot_build(error, os.path.dirname(path)) from error


def build_arrays(source: Source, seq_length: int, seed: int, epoch: int) -> Arrays:
    """Return the three arrays of pass `epoch` over a source. Pass 0 equals GPTDataset. Takes 8 bytes of memory per document."""
    first, last = source.documents.first, source.documents.last
    lengths = np.fromfile(f"{source.prefix}.idx", "<i4", last - first, offset=INDEX_HEADER.size + 4 * first)
    if len(lengths) != last - first or int(lengths.sum(dtype=np.int64)) != source.documents.num_tokens:
        raise DataError(f"node {node()}: {source.prefix}.idx does not match its manifest; copy the shard again")
    random = np.random.RandomState(seed if epoch == 0 else [seed, epoch])
    documents = np.arange(last - first, dtype=np.int32)
    random.shuffle(documents)
    samples = helpers.build_sample_idx(lengths, documents, seq_length, 1, source.documents.num_tokens, True, True)
    del lengths
    documents += first
    order = np.arange(len(samples) - 1, dtype=np.uint32)
    random.shuffle(order)
    return documents, samples, order
