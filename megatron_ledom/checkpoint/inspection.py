"""Print the content of a checkpoint: position, layout, tensors by group, files, and all problems."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ledom.checkpoint.folder import find_checkpoint, finished_checkpoints, latest_name
from megatron_ledom.checkpoint.manifest import CheckpointManifest, load_manifest
from megatron_ledom.checkpoint.stored_tensors import tensors_of
from megatron_ledom.config.derived import data_parallel_size
from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.errors import DataError, LedomError, VerificationError
from megatron_ledom.provenance import describe_readings
from megatron_ledom.storage.hashes import content_problems, size_problems


@dataclass(slots=True)
class TensorGroup:
    """Totals of the tensors of one printed line."""

    tensors: int = 0
    elements: int = 0
    num_bytes: int = 0


def inspect_checkpoint(where: str, *, verify: bool = False) -> None:
    """Print a checkpoint to stdout. For a run folder, print a list of all checkpoints, then the latest one.

    `verify` reads every file again. Problems are printed to stderr, one per line. Raises VerificationError if there are any.
    """
    all_of_run = os.path.join(where, "checkpoints")
    if os.path.isdir(all_of_run):
        _print_all(all_of_run)
    checkpoint = find_checkpoint(where)
    manifest = load_manifest(checkpoint)
    for name, value in _rows(checkpoint, manifest):
        print(f"{name:<12}  {value}")
    problems = size_problems(checkpoint, manifest.files)
    if verify:
        problems = problems or content_problems(checkpoint, manifest.files)
    try:
        _print_groups(tensors_of(checkpoint))
    except DataError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise VerificationError(
            f"{checkpoint} is damaged, {len(problems)} problem{'s'[: len(problems) > 1]}; use an earlier one by writing its name into"
            " the file `latest` next to it"
        )
    if verify:
        print(
            f"verified: {len(manifest.files)} files"
            if manifest.files
            else "nothing to verify: written by a version without checksums"
        )


def group_of(name: str) -> str:
    """Return the group of a tensor, such as `weights: decoder` or `optimizer: exp_avg`."""
    words = name.split(".")
    return f"optimizer: {words[2]}" if words[:2] == ["optimizer", "state"] else f"weights: {words[0]}"


def layout_of(parallel: ParallelConfig, world_size: int | None) -> str:
    """Return a text such as `4 ranks: TP 2, PP 2 of 2 chunks, CP 1, DP 1, distributed optimizer`."""
    chunks = parallel.virtual_pipeline_model_parallel_size
    words = [
        f"TP {parallel.tensor_model_parallel_size}",
        f"PP {parallel.pipeline_model_parallel_size}" + (f" of {chunks} chunks" if chunks else ""),
        f"CP {parallel.context_parallel_size}",
        f"DP {'unknown' if world_size is None else data_parallel_size(parallel, world_size)}",
        f"{'distributed' if parallel.use_distributed_optimizer else 'ordinary'} optimizer",
    ]
    return f"{'unknown number of' if world_size is None else world_size} ranks: {', '.join(words)}"


def _rows(checkpoint: str, manifest: CheckpointManifest) -> Iterator[tuple[str, str]]:
    provenance = manifest.provenance
    yield "checkpoint", checkpoint
    yield "iteration", f"{manifest.iteration:,}"
    yield "consumed", f"{manifest.consumed_train_samples:,} samples, {manifest.consumed_train_tokens:,} tokens"
    yield "written by", layout_of(manifest.run_config(checkpoint).parallel, manifest.world_size)
    yield "direction", str(provenance.direction)
    if not provenance.is_plain:
        yield "reads", describe_readings(provenance.readings)
    yield "tokenizer", f"{provenance.tokenizer_name} ({provenance.tokenizer_sha256[:12]}), {provenance.vocab_size:,} ids"
    yield "written at", f"{manifest.created_at} by version {manifest.package_version}"
    size = sum(sums["bytes"] for sums in manifest.files.values())
    yield (
        "files",
        f"{len(manifest.files):,}, {size / 2**30:,.3f} GiB"
        if manifest.files
        else "not listed: written by a version without checksums",
    )


def _print_groups(tensors: dict[str, TensorStorageMetadata]) -> None:
    groups: dict[str, TensorGroup] = {}
    for name, tensor in tensors.items():
        group = groups.setdefault(group_of(name), TensorGroup())
        group.tensors += 1
        group.elements += tensor.size.numel()
        group.num_bytes += tensor.size.numel() * tensor.properties.dtype.itemsize
    print(f"\n{'tensors':<32}  {'number':>8}  {'elements':>18}  {'GiB':>10}")
    for name, group in sorted(groups.items(), reverse=True):
        print(f"{name:<32}  {group.tensors:>8,}  {group.elements:>18,}  {group.num_bytes / 2**30:>10,.3f}")


def _print_all(folder: str) -> None:
    """Print one line for each finished checkpoint."""
    latest = latest_name(folder)
    for name in finished_checkpoints(folder).values():
        try:
            manifest = load_manifest(os.path.join(folder, name))
            size = sum(sums["bytes"] for sums in manifest.files.values()) / 2**30
            line = f"{manifest.consumed_train_tokens:>18,} tokens  {size:>10,.3f} GiB  {manifest.created_at}"
        except LedomError as error:
            line = f"unreadable: {error}"
        print(f"{name}  {line}{'  <- latest' if name == latest else ''}")
    print()
