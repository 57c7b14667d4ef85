"""PREFIX.targets: the role of each id of a shard of pairs, one byte per id, from which a run chooses the ids that its loss counts.

A shard of pairs (`ledom prepare-pairs`) contains packs. A pack is a document of exactly `manifest.pairs["seq_length"]` ids: whole
pairs, each closed by an eod, then eods as padding. So a sample of that length is one pack, and no pair is cut.
"""

from typing import TYPE_CHECKING

import numpy as np

from megatron_ledom.data.shards.shard import TARGETS, ShardManifest

if TYPE_CHECKING:
    import torch

NOTHING, GIVEN, SCORED, END = range(4)
"""NOTHING: padding, and the first id of a pair, which has no context. GIVEN: the given part. SCORED: the scored part. END: eod."""
COUNTED = {"all": (GIVEN, SCORED, END), "scored": (SCORED,), "scored_and_eod": (SCORED, END)}
"""Roles that the loss counts, by `data.loss_tokens`."""


class TargetMasks:
    """Loss masks of the packs of a shard."""

    def __init__(self, prefix: str, manifest: ShardManifest, loss_tokens: str) -> None:
        shape = (manifest.num_documents, manifest.pairs["seq_length"])
        self._targets = np.memmap(prefix + TARGETS, np.uint8, "r", shape=shape)
        self._counted = COUNTED[loss_tokens]

    def loss_mask(self, pack: int) -> "torch.Tensor":
        """Return the mask [seq_length]: 1 for labels that count. The last label belongs to another pack and never counts."""
        import torch  # not at the top: it takes seconds, and a dry run reads only manifests

        counts = np.isin(self._targets[pack], self._counted)
        mask = torch.zeros(len(counts))
        mask[:-1] = torch.from_numpy(counts[1:].astype(np.float32))
        return mask


def counted_bytes_per_token(manifest: ShardManifest, loss_tokens: str, *, eod_mask_loss: bool) -> float:
    """Return the UTF-8 bytes of text per id that the loss counts.

    In a shard of text these are all ids. With eod_mask_loss the first id of a document does not count: a marker then does not count,
    but without a marker the first id is text, to which the mean loss of the others is applied.
    """
    pairs = manifest.pairs
    if not pairs:
        is_uncounted = eod_mask_loss and manifest.model_order.marker_id is not None
        return manifest.text_bytes / (manifest.num_tokens - (manifest.num_documents if is_uncounted else 0))
    text = pairs["scored_bytes"] if loss_tokens != "all" else manifest.text_bytes
    counted = {GIVEN: pairs["given_tokens"], SCORED: pairs["scored_tokens"], END: pairs["num_pairs"]}
    return text / sum(counted[kind] for kind in COUNTED[loss_tokens])
