"""The chain of a checkpoint: a record of each checkpoint from which its weights come, the oldest first.

`init_from` makes such records, and so does an average. They are in the manifest of every later checkpoint, so that nothing has to be read
from the folders of earlier runs, which may be gone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.checkpoint.manifest import MANIFEST, CheckpointManifest
from megatron_ledom.storage.hashes import checksum
from megatron_ledom.storage.records import Record


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """The part of the training that one run of a chain did."""

    run: str
    """Name of the run folder."""
    iteration: int
    """Iteration of the checkpoint that was taken."""
    iterations: int
    """Iterations that this run did up to there, without those of the run before it that it continues (`init_state=all`)."""
    tokens: int
    """Training tokens of these iterations."""
    shards: list[list[Any]] | None
    """`train_shards` of the checkpoint; None if the record is older than this value."""
    average: Record | None
    """For averaged weights, what `average-checkpoints` recorded."""
    is_imported: bool
    """True for weights of another model, whose tokens are not known."""
    taken: str
    """Value of `init_state` with which the next run started from it; empty for the last part."""


def run_name(checkpoint: str) -> str:
    """Return the name of the run folder of a checkpoint."""
    return os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))))


def describe_checkpoint(checkpoint: str, manifest: CheckpointManifest, init_from: str, init_state: str) -> Record:
    """Return the record of a checkpoint from which a run starts."""
    return {
        "init_from": init_from,
        "init_state": init_state,
        "path": os.path.abspath(checkpoint),
        "iteration": manifest.iteration,
        "consumed_train_tokens": manifest.consumed_train_tokens,
        "manifest_sha256": checksum(os.path.join(checkpoint, MANIFEST))["sha256"],
        "train_shards": manifest.train_shards,
        "average": manifest.average,
        "weights_only": manifest.weights_only,
    }


def continued_chain(checkpoint: str, manifest: CheckpointManifest) -> list[Record]:
    """Return the chain of a run that resumes from its own checkpoint. Imported or averaged weights, its iteration 0, become a part."""
    if not manifest.weights_only:
        return manifest.started_from
    return [*manifest.started_from, describe_checkpoint(checkpoint, manifest, os.path.abspath(checkpoint), "weights")]


def tokens_before(chain: Sequence[Record]) -> int:
    """Return the training tokens of earlier runs that a run does not count itself.

    With init_state=all a run continues to count from those of the checkpoint.
    """
    total = 0
    for record in chain:
        total += 0 if record["init_state"] == "all" else record["consumed_train_tokens"]
    return total


def trained_parts(chain: Sequence[Record], checkpoint: str, manifest: CheckpointManifest) -> list[TrainedPart]:
    """Return the part of each run of a chain, the oldest first, and of the run of the checkpoint itself."""
    return parts_of([*chain, describe_checkpoint(checkpoint, manifest, "", "")])


def parts_of(chain: Sequence[Record]) -> list[TrainedPart]:
    """Return the part of each run of a chain, the oldest first."""
    parts: list[TrainedPart] = []
    done_iterations = done_tokens = 0
    for record in chain:
        parts.append(
            TrainedPart(
                run=run_name(record["path"]),
                iteration=record["iteration"],
                iterations=record["iteration"] - done_iterations,
                tokens=record["consumed_train_tokens"] - done_tokens,
                shards=record.get("train_shards"),
                average=record.get("average"),
                is_imported=bool(record.get("weights_only")) and record.get("average") is None,
                taken=record["init_state"],
            )
        )
        continues = record["init_state"] == "all"
        done_iterations = record["iteration"] if continues else 0
        done_tokens = record["consumed_train_tokens"] if continues else 0
    return parts
