"""Where samples come from: shard and documents, for the diagnosis of a bad step."""

from collections.abc import Iterable
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_ledom.data.sources import Source


def sample_origins(dataset: Any, sources: list[Source], samples: Iterable[int]) -> list[dict[str, Any]]:
    """For each sample of a training dataset: its id, the prefix of its shard, and the numbers of its documents there."""
    return [_origin(dataset, sources, sample) for sample in samples]


def _origin(dataset: Any, sources: list[Source], sample: int) -> dict[str, Any]:
    dataset[sample]  # the indices are opened at the first access
    number, place = 0, sample  # a run of one shard has no blend around it
    if isinstance(dataset, BlendedDataset):
        number, place = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        dataset = dataset.datasets[number]
    row = int(dataset.shuffle_index[place])
    first, last = (int(dataset.sample_index[row + end][0]) for end in (0, 1))
    documents = [int(document) for document in dataset.document_index[first : last + 1]]
    return {"sample": sample, "source": sources[number].prefix, "documents": documents}
