"""Where samples come from: shard and documents, for the diagnosis of a bad step."""

from collections.abc import Iterable
from typing import Any

from megatron_ledom.data.dataset import BlendSamples


def sample_origins(dataset: BlendSamples, samples: Iterable[int]) -> list[dict[str, Any]]:
    """For each sample of a training dataset: its id, the prefix of its shard, and the numbers of its documents there."""
    return [_origin(dataset, sample) for sample in samples]


def _origin(dataset: BlendSamples, sample: int) -> dict[str, Any]:
    source, documents = dataset.origin(sample)
    return {"sample": sample, "source": source.prefix, "documents": documents}
