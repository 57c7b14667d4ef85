"""Where samples come from: shard and documents, for the diagnosis of a bad step."""

from collections.abc import Iterable
from typing import Any

from megatron_ledom.data.sources import Source


def sample_origins(dataset: Any, sources: list[Source], samples: Iterable[int]) -> list[dict[str, Any]]:
    """For each sample of a blended dataset: its id, the prefix of its shard, and the numbers of its documents there."""
    return [_origin(dataset, sources, sample) for sample in samples]


def _origin(dataset: Any, sources: list[Source], sample: int) -> dict[str, Any]:
    dataset[sample]  # the indices are opened at the first access
    number = int(dataset.dataset_index[sample])
    source = dataset.datasets[number]
    place = source.shuffle_index[int(dataset.dataset_sample_index[sample])]
    first, last = (int(source.sample_index[place + end][0]) for end in (0, 1))
    documents = [int(document) for document in source.document_index[first : last + 1]]
    return {"sample": sample, "source": sources[number].prefix, "documents": documents}
