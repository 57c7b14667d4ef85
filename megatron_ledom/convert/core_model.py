"""A checkpoint as one whole megatron-core model in this process, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.checkpoint.store import load_weights
from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE


@contextmanager
def whole_model(checkpoint: str, manifest: CheckpointManifest) -> Iterator[Any]:
    """The GPTModel of a checkpoint of any layout, evaluation mode, fp32; its process group ends with the context."""
    trained = manifest.run_config(checkpoint)
    config = replace(
        trained,
        parallel=ParallelConfig(),
        model=replace(trained.model, params_dtype="fp32", transformer_impl="torch", fp8=None),
    )
    platform = prepare_platform(config.train.num_threads, ALONE)
    groups = start_distributed(platform, config.parallel, ALONE)
    try:
        chunks = build_model_chunks(config, manifest.provenance.vocab_size, groups, LayerChoice("torch", "conversion"))
        load_weights(checkpoint, chunks, checkpoint_metadata(groups))
        model = chunks[0].eval()
        with torch.no_grad():
            yield model
    finally:
        stop_distributed()
