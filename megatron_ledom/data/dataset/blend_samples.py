"""The samples of a run. megatron-core's GPTDataset reads them from the shards; our blend and our index determine their order.

The sample at a position is a function of the sources, their weights, `data.seq_length` and `train.seed`. It does not depend on
the layout, the batch size, the length of the run or its history.
"""

import os
import resource
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import Blend, Source, Sources
from megatron_ledom.data.dataset.sample_index import Arrays, SampleIndex, index_spec
from megatron_ledom.data.shards.targets import TargetMasks
from megatron_ledom.errors import DataError, TransientError, may_pass

FILES_A_SHARD = 3
"""Open files of an open shard: .idx mapped, .bin, and .bin mapped."""


class ShardVocabulary:
    """The eod id, in the form of a tokenizer for GPTDataset."""

    vocab_size = None

    def __init__(self, eod_id: int) -> None:
        self.eod = eod_id
        self.unique_identifiers = {"eod": eod_id}


class SourceSamples(GPTDataset):  # type: ignore[misc]  # megatron-core has no types
    """One pass over one source: a GPTDataset that gets its arrays and does not build them."""

    def __init__(self, prefix: str, arrays: Arrays, config: GPTDatasetConfig, masks: TargetMasks | None) -> None:
        self._arrays, self._masks = arrays, masks
        super().__init__(IndexedDataset(prefix), prefix, np.zeros(0, np.int32), None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> Arrays:
        return self._arrays

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return the fields of a sample. A sample of a shard of pairs is one pack, and gets the loss mask of the pack."""
        fields: dict[str, torch.Tensor] = super().__getitem__(position)
        if self._masks is None:
            return fields
        document, offset = self.sample_index[self.shuffle_index[position]]
        assert offset == 0, f"sample {position} of {self.dataset_path} begins inside a pack"
        return {**fields, "loss_mask": self._masks.loss_mask(int(self.document_index[document]))}


class BlendSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples of a blend in the order of training: tokens, labels, loss_mask, position_ids [seq_length].

    A shard is opened for its first sample. As many shards stay open as the process's limit on open files allows.
    """

    def __init__(self, config: RunConfig, blend: Blend, eod_id: int, cache: str) -> None:
        self.blend = blend
        self._seq_length, self._loss_tokens = config.data.seq_length, config.data.loss_tokens
        self._index = SampleIndex(index_spec(config, blend), cache)
        self._config = GPTDatasetConfig(
            random_seed=config.train.seed,
            sequence_length=config.data.seq_length,
            blend_per_split=[([source.prefix for source in blend.sources], None), None, None],
            path_to_cache=cache,
            tokenizer=ShardVocabulary(eod_id),
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=False,  # attention makes its mask from the document numbers of the batch
            eod_mask_loss=config.data.eod_mask_loss,
            create_attention_mask=False,
        )
        self._source = lru_cache(maxsize=most_open_shards())(self._open)

    def __len__(self) -> int:
        return self.blend.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        source, epoch, position = self._locate(sample)
        samples = self._source(source, epoch)
        self.blend.sources[source].files.check()  # even an open file can be overwritten
        return samples[position]

    def origin(self, sample: int) -> tuple[Source, list[int]]:
        """Return the shard of a sample, and the numbers of its documents in the shard."""
        source, epoch, position = self._locate(sample)
        samples = self._source(source, epoch)
        row = int(samples.shuffle_index[position])
        first, last = (int(samples.sample_index[row + end][0]) for end in (0, 1))
        return self.blend.sources[source], [int(number) for number in samples.document_index[first : last + 1]]

    def _locate(self, sample: int) -> tuple[int, int, int]:
        """Return (source, pass over the source, position in that pass)."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        source, number = self.blend.interleave.locate(sample)
        return source, *divmod(number, self.blend.sources[source].samples_available(self._seq_length))

    def _open(self, source: int, epoch: int) -> SourceSamples:
        part, arrays = self._index.part(source, epoch)
        part.source.files.check()
        prefix, manifest = part.source.prefix, part.source.manifest
        try:
            masks = TargetMasks(prefix, manifest, self._loss_tokens) if manifest.pairs else None
            return SourceSamples(prefix, arrays, self._config, masks)
        except (OSError, AssertionError, ValueError) as error:
            # megatron-core asserts that the files exist
            is_away = not all(os.path.exists(part.source.prefix + ending) for ending in (".bin", ".idx"))
            raise (TransientError if is_away or may_pass(error) else DataError)(
                f"the shard {part.source.prefix} was intact when the run started and cannot be opened now ({error}); find out what"
                " changes it, then start again: the run resumes from its last checkpoint"
            ) from error


def most_open_shards() -> int:
    """Return the limit on open shards: a fraction of this process's limit on open files, because it needs other files too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // (4 * FILES_A_SHARD)))


def index_cache(config: RunConfig) -> str:
    """Return the folder of the sample index of the run."""
    return config.data.path_to_cache or os.path.join(config.run_dir, "index_cache")


def build_train_dataset(config: RunConfig, sources: Sources, cache: str) -> BlendSamples:
    """Return the samples of the whole run. Call `sample_index.prepare_indices` first."""
    return BlendSamples(config, sources.train, sources.provenance.eod_id, cache)


def build_held_out_datasets(config: RunConfig, sources: Sources, sets: dict[str, Blend], cache: str) -> dict[str, BlendSamples]:
    """Return a dataset for each of `sets`, the validation or test sets of `sources`: whole global batches, no sample twice."""
    return {name: BlendSamples(config, blend, sources.provenance.eod_id, cache) for name, blend in sets.items()}


def sample_origins(dataset: BlendSamples, samples: Iterable[int]) -> list[dict[str, Any]]:
    """Return for each sample: its id, the prefix of its shard, and the numbers of its documents in the shard."""
    origins = [(sample, *dataset.origin(sample)) for sample in samples]
    return [{"sample": sample, "source": source.prefix, "documents": documents} for sample, source, documents in origins]
