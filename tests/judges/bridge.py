"""Reads Hugging Face folders with NVIDIA's Megatron Bridge, into models of its own, and writes their weights.

`python -m tests.support.te_without_extension tests.judges.bridge FOLDER...` writes FOLDER/bridge/weights.safetensors: weights under
the names of megatron-core's modules, each layer with its number.
"""

import sys
from dataclasses import replace
from pathlib import Path

from megatron.bridge import AutoBridge
from safetensors.torch import save_file

from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.parallel.groups import seed_iteration, start_distributed, stop_distributed
from megatron_ledom.platform.launch import ALONE
from tests.judges.te_models import pretend_cuda

NEEDS_EXTENSIONS = (
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "bias_activation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
)
"""Options of Bridge's models that need compiled code."""


def read(folder: Path) -> None:
    """Load one folder as Bridge does, and write the weights of its model."""
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=False)
    for option in NEEDS_EXTENSIONS:
        setattr(provider, option, False)
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    written = folder / "bridge"
    written.mkdir()
    save_file({name: weight.detach().clone() for name, weight in model.named_parameters()}, written / "weights.safetensors")


def main() -> None:
    platform = replace(pretend_cuda(), backend="gloo")
    groups = start_distributed(platform, ParallelConfig(), ALONE)
    seed_iteration(1, 0, groups)
    for folder in sys.argv[1:]:
        read(Path(folder))
    stop_distributed()


if __name__ == "__main__":
    main()
