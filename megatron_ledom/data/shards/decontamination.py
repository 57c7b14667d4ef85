"""The record of a search for evaluation items in the manifest of a shard that was made of several."""

import logging
from collections.abc import Sequence
from typing import Any

from megatron_ledom.data.shards.shard import ShardManifest, printable

logger = logging.getLogger(__name__)


def joined_decontamination(prefixes: Sequence[str], manifests: Sequence[ShardManifest]) -> dict[str, Any]:
    """Return the settings and numbers of documents of shards that were searched in the same way; else these for each way, as `parts`.

    Shards have their prefixes as given, so that those of two folders differ.
    Warns in the second case: a part of the documents may have evaluation items. The touched items do not add up, because two shards may
    have the same item; PREFIX.contamination of each has them.
    """
    if len(manifests) == 1:
        return manifests[0].decontamination
    parts: list[dict[str, Any]] = []
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for found in _parts_of(prefix, manifest):
            same = next((part for part in parts if part["settings"] == found["settings"]), None)
            if same is None:
                parts.append(found)
                continue
            same["shards"] += found["shards"]
            same["num_documents"] += found["num_documents"]
            same["documents"] = _sums(same["documents"], found["documents"])
    if len(parts) > 1:
        ways = "; ".join(
            f"{', '.join(part['shards'])} ({part['num_documents']:,} documents): {_described(part)}" for part in parts
        )
        logger.warning(
            "the shards were not searched for evaluation items in the same way, the manifest lists the ways: %s", ways
        )
        return {"parts": parts}
    return {"settings": parts[0]["settings"], "documents": parts[0]["documents"]} if parts[0]["settings"] else {}


def _parts_of(prefix: str, manifest: ShardManifest) -> list[dict[str, Any]]:
    """Return the parts of a shard that were searched in different ways; `settings` and `documents` are empty without a search."""
    found = manifest.decontamination
    if "parts" in found:
        return [{**part, "shards": [*part["shards"]]} for part in found["parts"]]
    searched = {"settings": found.get("settings", {}), "documents": found.get("documents", {})}
    return [{"shards": [printable(prefix)], "num_documents": manifest.num_documents, **searched}]


def _sums(some: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    """Return the sums of counts by name. Shards of different versions may have different names."""
    return {name: some.get(name, 0) + others.get(name, 0) for name in {**some, **others}}


def _described(part: dict[str, Any]) -> str:
    settings = part["settings"]
    if not settings:
        return "not searched"
    return f"{settings['num_items']:,} items of hash {settings['items_sha256'][:12]}, action {settings['action']}"
