"""Names of shards: expand patterns to prefixes, and check that the shards of an array are complete."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ledom.data.shards.shard import SUFFIXES, ShardManifest, existing_files, real_files
from megatron_ledom.errors import DataError, MismatchError, UsageError

TASK = re.compile(r"(?P<base>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def task_prefix(base: str, number: int, count: int) -> str:
    """Return the prefix of the shard of task `number` of `count`."""
    return f"{base}-{number:05d}-of-{count:05d}"


def array_list(numbers: Iterable[int]) -> str:
    """Return numbers in the syntax of SLURM's --array: 3,7-9."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def expand_prefixes(patterns: Sequence[str]) -> list[str]:
    """Return the prefixes in the given order, those of a pattern sorted.

    Raises UsageError for a pattern without a match and for a shard that occurs twice. A prefix matches if any of its files
    exists, so that opening a shard without a manifest reports the missing manifest.
    """
    prefixes: list[str] = []
    for pattern in patterns:
        found = _matches(pattern)
        if not found:
            raise UsageError(f"there is no shard {pattern}: no .bin, .idx or .json of that name; give prefixes without ending")
        prefixes += found
    met: dict[str, str] = {}
    for prefix in prefixes:
        real = os.path.realpath(f"{prefix}.bin")
        if real in met:
            other = "" if met[real] == prefix else f", once as {met[real]}"
            raise UsageError(f"{prefix} is named more than once{other}; name each shard once")
        met[real] = prefix
    return prefixes


def _matches(pattern: str) -> list[str]:
    if existing_files(pattern):
        return [pattern]
    for suffix in SUFFIXES:
        if pattern.endswith(suffix) and glob.glob(pattern):
            raise UsageError(f"{pattern} is one file of a shard; give the prefix {pattern.removesuffix(suffix)}")
    return sorted({file.removesuffix(suffix) for suffix in SUFFIXES for file in glob.glob(pattern + suffix)})


def check_tasks_complete(prefixes: Sequence[str]) -> None:
    """Refuse an incomplete set of shards of an array, such as P-00003-of-00064, and shards of two arrays with the same P."""
    numbers: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for prefix in prefixes:
        if match := TASK.fullmatch(prefix):
            numbers[match["base"]][int(match["count"])].add(int(match["number"]))
    for base, counts in numbers.items():
        if len(counts) > 1:
            raise UsageError(
                f"{base} was written by arrays of {' and of '.join(map(str, sorted(counts)))} tasks, which contain the same text;"
                " name the shards of one array"
            )
        count, found = next(iter(counts.items()))
        if missing := array_list(set(range(count)) - found):
            raise DataError(
                f"of the {count} tasks of {base} these are missing: {missing}; run them again"
                f" (sbatch --array={missing}), or add their shards"
            )


def check_same_inputs(prefixes: Sequence[str], manifests: Sequence[ShardManifest]) -> None:
    """Refuse tasks of one array that divided different inputs, because records at their borders may be lost or duplicated."""
    seen: dict[str, tuple[str, str]] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        match = TASK.fullmatch(prefix)
        if match is None or not manifest.inputs_sha256:
            continue
        first, digest = seen.setdefault(match["base"], (prefix, manifest.inputs_sha256))
        if digest != manifest.inputs_sha256:
            raise MismatchError(
                f"{prefix} and {first} were made from different inputs, so records between them may be lost or duplicated;"
                " run all tasks again with --overwrite"
            )


def check_not_an_input(output_prefix: str, inputs: Sequence[str]) -> None:
    """Refuse to overwrite one of the inputs, also through links."""
    outputs = set(real_files(output_prefix).values())
    for prefix in inputs:
        if any(Path(os.path.realpath(prefix + suffix)) in outputs for suffix in SUFFIXES):
            raise UsageError(f"--output-prefix {output_prefix} is one of the inputs, {prefix}; choose another one")
