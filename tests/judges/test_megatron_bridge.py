"""Megatron Bridge, NVIDIA's own conversion, reads the same folders: its weights and ours have equal bits, also of our exports."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from tests.judges.installed import ABSENT, has, run_with_transformer_engine
from tests.support.conversion_checks import core_weights
from tests.support.legible import VOCAB_SIZE
from tests.support.stock_folders import FAMILY, family_folder

pytestmark = pytest.mark.skipif(not has("megatron/bridge"), reason=f"{ABSENT}; Megatron Bridge needs Python 3.12")

YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""The bounds that transformers assumes for yarn. Bridge 0.6.2 assumes none and ends with a TypeError if a config lacks them."""
OF_THE_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def name_yarns_bounds(folder: Path) -> None:
    """Write the bounds into the config of a yarn model that lacks them; its meaning stays the same."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        config["rope_parameters"] = YARN_DEFAULTS | rope
        file.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `stock`, `run` and `export` of each case, the first and the last also read by Bridge."""
    made = tmp_path_factory.mktemp("bridge")
    read: list[Path] = []
    for case in FAMILY:
        stock, run, export = (made / case / name for name in ("stock", "run", "export"))
        family_folder(stock, case)
        import_hf(str(stock), str(run), direction=Direction.REVERSE, verify=None)
        export_hf(str(run), str(export), verify=None)
        name_yarns_bounds(stock)
        read += [stock, export]
    run_with_transformer_engine("tests.judges.bridge", *read)
    return made


def bridge_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that Bridge read, under the names of checkpoints, which stack the layers."""
    layers: dict[str, list[torch.Tensor]] = {}
    weights = {}
    for name, weight in sorted(load_file(folder / "bridge/weights.safetensors").items()):
        if found := re.fullmatch(r"decoder\.layers\.(\d)\.(.*)", name):
            layers.setdefault(f"decoder.layers.{found[2]}", []).append(weight)
        else:
            weights[name] = weight
    return weights | {name: torch.stack(parts) for name, parts in layers.items()}


@pytest.mark.parametrize("source", ["stock", "export"])
@pytest.mark.parametrize("case", FAMILY)
def test_megatron_bridge_reads_the_weights_that_we_import(folder: Path, case: str, source: str) -> None:
    ours, theirs = core_weights(folder / case / "run"), bridge_weights(folder / case / source)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        rows = slice(VOCAB_SIZE if name in OF_THE_VOCABULARY else None)
        assert torch.equal(weight[rows], theirs[name][rows]), name
