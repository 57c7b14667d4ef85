"""Samples of a run: megatron-core's GPTDataset and blends over our shards, indices cached by content."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ledom.config.derived import train_samples
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.sources import Source, Sources
from megatron_ledom.errors import DataError, UsageError

Dataset = Any
"""A map-style dataset of megatron-core: sample index -> tokens, labels, loss_mask, position_ids."""


class ShardVocabulary:
    """What GPTDataset asks of a tokenizer: the eod id, and an identity for the key of its index cache.

    The identity holds the content hash of every shard, so that a rewritten shard never meets the index of the old one.
    """

    vocab_size = None

    def __init__(self, eod_id: int, sources: Sequence[Source]) -> None:
        self.eod = eod_id
        self.unique_identifiers = {
            "eod": eod_id,
            "shards": {source.prefix: source.manifest.bin_sha256 for source in sources},
        }


def build_train_dataset(config: RunConfig, sources: Sources, cache: str) -> Dataset:
    """Exactly the samples of the whole run, blended and shuffled by `train.seed`. Call on every rank."""
    samples = train_samples(config)
    return _build(config, sources.train, sources.provenance.eod_id, samples, cache)


def build_valid_datasets(config: RunConfig, sources: Sources, cache: str) -> dict[str, Dataset]:
    """One dataset a validation shard, named by its prefix; whole global batches, never a sample twice."""
    datasets = {}
    for source in sources.valid:
        batches = source.samples_available(config.data.seq_length) // config.train.global_batch_size
        samples = min(batches, config.train.eval_iters) * config.train.global_batch_size
        datasets[source.prefix] = _build(config, [source], sources.provenance.eod_id, samples, cache)
    return datasets


def _build(config: RunConfig, sources: Sequence[Source], eod_id: int, samples: int, cache: str) -> Dataset:
    blend = ([source.prefix for source in sources], [source.weight for source in sources])
    data_config = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.data.seq_length,
        blend_per_split=[blend, None, None],
        path_to_cache=cache,
        tokenizer=ShardVocabulary(eod_id, sources),
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=False,  # a batch says where documents end, and the attention makes its mask of that
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, data_config)
    try:
        dataset = builder.build()[0]
    except (EOFError, ValueError) as error:
        raise DataError(f"the sample index in {cache} is damaged ({error}); delete that folder, it is made anew") from error
    except Exception as error:  # megatron-core wraps the OSError of a write in a plain Exception
        if not isinstance(error.__cause__, OSError):
            raise
        raise UsageError(
            f"the sample index cannot be written to {cache} ({error.__cause__}); set data.path_to_cache to a writable folder"
        ) from error
    if len(dataset) < samples:
        raise UsageError(f"the shards {blend[0]} give {len(dataset)} samples, {samples} are needed; lower train.train_iters")
    if dist.is_initialized():
        dist.barrier()
    return dataset
