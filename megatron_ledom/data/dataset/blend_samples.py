"""Samples of a run: megatron-core's GPTDataset cuts them out of the shards, our index and our blend say which.

Which sample comes at which place is a pure function of the sources, their shares, `data.seq_length` and `train.seed`: it depends on
no layout, no batch size, no length of the run and no history.
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
"""That stay open with a shard: .idx mapped, .bin, and .bin mapped."""


class ShardVocabulary:
    """The eod id, as GPTDataset asks it of a tokenizer."""

    vocab_size = None

    def __init__(self, eod_id: int) -> None:
        self.eod = eod_id
        self.unique_identifiers = {"eod": eod_id}


class SourceSamples(GPTDataset):  # type: ignore[misc]  # megatron-core has no types
    """One pass over one source: GPTDataset with arrays that are given instead of built."""

    def __init__(self, prefix: str, arrays: Arrays, config: GPTDatasetConfig, masks: TargetMasks | None) -> None:
        self._arrays, self._masks = arrays, masks
        super().__init__(IndexedDataset(prefix), prefix, np.zeros(0, np.int32), None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> Arrays:
        return self._arrays

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        """The fields of a sample; a shard of pairs says itself what counts in its packs, each a document and a sample."""
        fields: dict[str, torch.Tensor] = super().__getitem__(place)
        if self._masks is None:
            return fields
        document, offset = self.sample_index[self.shuffle_index[place]]
        assert offset == 0, f"sample {place} of {self.dataset_path} begins inside a pack"
        return {**fields, "loss_mask": self._masks.loss_mask(int(self.document_index[document]))}


class BlendSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples of a blend in the order of training: tokens, labels, loss_mask, position_ids [seq_length].

    Shards are opened when a sample of theirs is asked for; as many stay open as the process's limit of files allows.
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
            reset_attention_mask=False,  # a batch says where documents end, and the attention makes its mask of that
            eod_mask_loss=config.data.eod_mask_loss,
            create_attention_mask=False,
        )
        self._source = lru_cache(maxsize=most_open_shards())(self._open)

    def __len__(self) -> int:
        return self.blend.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        source, epoch, place = self._locate(sample)
        samples = self._source(source, epoch)
        self.blend.sources[source].files.check()  # also what is open can be written over
        return samples[place]

    def origin(self, sample: int) -> tuple[Source, list[int]]:
        """The shard that a sample is cut from, and the numbers of its documents there."""
        source, epoch, place = self._locate(sample)
        samples = self._source(source, epoch)
        row = int(samples.shuffle_index[place])
        first, last = (int(samples.sample_index[row + end][0]) for end in (0, 1))
        return self.blend.sources[source], [int(number) for number in samples.document_index[first : last + 1]]

    def _locate(self, sample: int) -> tuple[int, int, int]:
        """Source, pass over it, and place in that pass."""
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
            # megatron-core asserts that they are there
            is_away = not all(os.path.exists(part.source.prefix + ending) for ending in (".bin", ".idx"))
            raise (TransientError if is_away or may_pass(error) else DataError)(
                f"the shard {part.source.prefix} was sound when the run started and cannot be opened now ({error}); look for what"
                " changes it, then start again: the run goes on from its last checkpoint"
            ) from error


def most_open_shards() -> int:
    """Shards that stay open: a fraction of the files this process may open, since others need some, too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // (4 * FILES_A_SHARD)))


def index_cache(config: RunConfig) -> str:
    """The folder of the run's sample index."""
    return config.data.path_to_cache or os.path.join(config.run_dir, "index_cache")


def build_train_dataset(config: RunConfig, sources: Sources, cache: str) -> BlendSamples:
    """Exactly the samples of the whole run. Call `sample_index.prepare_indices` first."""
    return BlendSamples(config, sources.train, sources.provenance.eod_id, cache)


def build_held_out_datasets(config: RunConfig, sources: Sources, sets: dict[str, Blend], cache: str) -> dict[str, BlendSamples]:
    """One dataset for each of `sets`, the validation or the test sets of `sources`; whole global batches, no sample twice."""
    return {name: BlendSamples(config, blend, sources.provenance.eod_id, cache) for name, blend in sets.items()}


def sample_origins(dataset: BlendSamples, samples: Iterable[int]) -> list[dict[str, Any]]:
    """Return, for each sample of a training dataset, its id, the prefix of its shard, and the numbers of its documents there."""
    origins = [(sample, *dataset.origin(sample)) for sample in samples]
    return [{"sample": sample, "source": source.prefix, "documents": documents} for sample, source, documents in origins]
