"""Import and export of stock models: bit-equal weights for many shapes, and stock transformers' logits for every architecture."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.convert.core_side import core_side
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.convert.verify import ParityCheck
from megatron_ledom.direction import Direction
from tests.support.conversion_checks import check_same_folders, check_same_runs, core_weights, folder_weights
from tests.support.legible import VOCAB_SIZE
from tests.support.stock_folders import FAMILY, family_folder, stock_config, stock_folder

REVERSE = Direction.REVERSE


@pytest.mark.parametrize("how", ["whole", "layers"])
@pytest.mark.parametrize("case", FAMILY)
def test_the_core_model_computes_the_logits_of_stock_transformers(tmp_path: Path, case: str, how: Any) -> None:
    source = family_folder(tmp_path / "stock", case)
    check = import_hf(str(source), str(tmp_path / "run"), direction=REVERSE, verify=how)
    assert isinstance(check, ParityCheck)
    assert check.largest_logit_difference < 2e-5
    checkpoint = find_checkpoint(str(tmp_path / "run"))
    ids = torch.randint(0, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(5))
    with core_side(checkpoint, load_manifest(checkpoint)) as core:
        found = core.forward(ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits[..., :VOCAB_SIZE]
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_whole_models_are_compared_only_where_they_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = family_folder(tmp_path / "stock", "Llama")
    found = {}
    for limit in (2**29, 0):
        monkeypatch.setattr("megatron_ledom.convert.verify.WHOLE_BELOW", limit)
        check = import_hf(str(source), str(tmp_path / f"run{limit}"), direction=REVERSE)
        assert check is not None
        found[limit] = check.how
    assert found == {2**29: "whole models", 0: "layer by layer"}


@pytest.mark.parametrize("case", FAMILY)
def test_an_imported_model_is_exported_unchanged(tmp_path: Path, case: str) -> None:
    """The export has the same bits and a stock architecture with the same results; its config imports as before."""
    source = family_folder(tmp_path / "stock", case)
    import_hf(str(source), str(tmp_path / "run"), direction=REVERSE)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), max_shard_size=20_000)
    check_same_folders(tmp_path / "out", source)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    written = json.loads((tmp_path / "out/config.json").read_text())
    architecture = FAMILY[case][0] if "width" in case else FAMILY[case][0].replace("Mistral", "Llama")
    assert written["architectures"] == [f"{architecture}ForCausalLM"]
    import_hf(str(tmp_path / "out"), str(tmp_path / "again"))
    check_same_runs(tmp_path / "again", tmp_path / "run")
    first, second = (load_manifest(find_checkpoint(str(tmp_path / run))) for run in ("run", "again"))
    assert second.config["model"] == first.config["model"]
    assert second.provenance.to_dict() == {**first.provenance.to_dict(), "tokenizer_name": second.provenance.tokenizer_name}


@dataclass(frozen=True, slots=True)
class Shape:
    """One combination of sizes and options."""

    architecture: str
    heads: int
    groups: int
    width: int
    rows: int
    tied: bool
    dtype: torch.dtype

    def folder(self, path: Path, seed: int) -> Path:
        """Return a random model of this shape."""
        extra = {"sliding_window": None} if self.architecture == "Mistral" else {}
        config = stock_config(
            self.architecture,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.width,
            vocab_size=self.rows,
            tie_word_embeddings=self.tied,
            hidden_size=24,
            intermediate_size=32,
            **extra,
        )
        return stock_folder(path, config, seed=seed, dtype=self.dtype)


def shapes() -> list[Shape]:
    """Return 56 combinations: every pair of heads and key-value heads with every architecture, the rest from a fixed seed."""
    rng = random.Random(6)
    drawn = []
    for heads, groups in [
        (1, 1),
        (2, 1),
        (4, 4),
        (4, 2),
        (4, 1),
        (6, 3),
        (6, 2),
        (8, 8),
        (8, 4),
        (8, 2),
        (8, 1),
        (12, 4),
        (12, 6),
        (24, 1),
    ]:
        for architecture in ("Llama", "Mistral", "Qwen2", "Qwen3"):
            rows = rng.choice([VOCAB_SIZE, VOCAB_SIZE + 1, 1024, 1100])
            dtype = rng.choice([torch.float32, torch.bfloat16])
            drawn.append(Shape(architecture, heads, groups, rng.choice([2, 4, 6, 8, 16]), rows, rng.random() < 0.5, dtype))
    return drawn


@pytest.mark.parametrize("index", range(len(shapes())))
def test_round_trips_are_bit_equal(tmp_path: Path, index: int) -> None:
    """Convert HF -> mcore -> HF, and mcore -> HF -> mcore."""
    shape = shapes()[index]
    source = shape.folder(tmp_path / "stock", index)
    import_hf(str(source), str(tmp_path / "run"), direction=REVERSE, verify=None)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=None, max_shard_size=50_000)
    check_same_folders(tmp_path / "out", source)
    import_hf(str(tmp_path / "out"), str(tmp_path / "again"), verify=None)
    check_same_runs(tmp_path / "again", tmp_path / "run")
    assert {weight.dtype for weight in core_weights(tmp_path / "again").values()} == {shape.dtype}


def test_bf16_reports_the_difference_of_both_models(tmp_path: Path) -> None:
    config = stock_config("Qwen2")
    source = stock_folder(tmp_path / "stock", config, dtype=torch.bfloat16)
    check = import_hf(str(source), str(tmp_path / "run"), direction=REVERSE)
    assert check is not None
    assert check.bf16 is not None
    assert check.largest_logit_difference < 2e-5
    assert check.bf16["mean_cosine"] > 0.999
    assert 0 <= check.bf16["mean_kl_nats"] < 0.01
    assert check.bf16["argmax_agreement"] > 0.9
    card = (tmp_path / "run/VERIFICATION.md").read_text()
    assert "mean cosine, bf16" in card


def test_fp32_weights_can_be_rounded_to_bf16_and_the_parity_check_allows_it(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "stock", stock_config("Llama"))
    import_hf(str(source), str(tmp_path / "run"), direction=REVERSE, params_dtype="bf16")
    found = core_weights(tmp_path / "run")["decoder.final_layernorm.weight"]
    assert torch.equal(found, folder_weights(source)["model.norm.weight"].bfloat16())
