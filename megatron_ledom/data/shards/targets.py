"""PREFIX.targets: what each id of a shard of pairs is to its pair, one byte an id, so that a run can choose what its loss counts.

Shards of pairs (`ledom prepare-pairs`) hold packs: documents of exactly `manifest.pairs["seq_length"]` ids, each of whole pairs
closed by eod and filled up with eods. A sample of that length is therefore one pack, and no pair is cut.
"""

from typing import TYPE_CHECKING

import numpy as np

from megatron_ledom.data.shards.shard import TARGETS, ShardManifest

if TYPE_CHECKING:
    import torch

NOTHING, GIVEN, SCORED, END = range(4)
"""The first id of a pair, which nothing conditions, and filling; the given part; the part that a scorer scores; the pair's eod."""
COUNTED = {"all": (GIVEN, SCORED, END), "scored": (SCORED,), "scored_and_eod": (SCORED, END)}
"""By `data.loss_tokens`."""


class TargetMasks:
    """Loss masks of the packs of a shard."""

    def __init__(self, prefix: str, manifest: ShardManifest, loss_tokens: str) -> None:
        shape = (manifest.num_documents, manifest.pairs["seq_length"])
        self._targets = np.memmap(prefix + TARGETS, np.uint8, "r", shape=shape)
        self._counted = COUNTED[loss_tokens]

    def loss_mask(self, pack: int) -> "torch.Tensor":
        """1 where the label counts, [seq_length]; the label of the last position is of another pack and never does."""
        import torch  # seconds that a dry run, which reads manifests only, does not wait for

        counts = np.isin(self._targets[pack], self._counted)
        mask = torch.zeros(len(counts))
        mask[:-1] = torch.from_numpy(counts[1:].astype(np.float32))
        return mask


def counted_bytes_per_token(manifest: ShardManifest, loss_tokens: str) -> float:
    """UTF-8 bytes of text for each id that the loss counts; of an ordinary shard for each id."""
    pairs = manifest.pairs
    if not pairs:
        return manifest.text_bytes / manifest.num_tokens
    text = pairs["scored_bytes"] if loss_tokens != "all" else manifest.text_bytes
    counted = {GIVEN: pairs["given_tokens"], SCORED: pairs["scored_tokens"], END: pairs["num_pairs"]}
    return text / sum(counted[kind] for kind in COUNTED[loss_tokens])
