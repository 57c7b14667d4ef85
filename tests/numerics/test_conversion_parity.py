"""If one rule is wrong, the parity check fails, names the weight and the kind of error, and no output is left."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ledom.convert import hf_export as exporting
from megatron_ledom.convert import rules
from megatron_ledom.convert.core_side import CoreSide
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.convert.rules import Fusion, Parts, Rule, Sizes
from megatron_ledom.direction import Direction
from megatron_ledom.errors import VerificationError
from tests.support.stock_folders import stock_config, stock_folder

HEAD = 8
Break = Callable[[Parts], Sequence[torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an imported run for each architecture. hidden_size is heads x width, so all projections but keys and values are square."""
    made = {}
    for architecture in ("Llama", "Qwen2", "Qwen3"):
        folder = tmp_path_factory.mktemp(architecture)
        changed = {"tie_word_embeddings": True} if architecture == "Qwen2" else {}
        source = stock_folder(folder / "stock", stock_config(architecture, intermediate_size=32, **changed))
        import_hf(str(source), str(folder / "run"), direction=Direction.REVERSE, verify=None)
        made[architecture] = folder / "run"
    return made


def at(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """Change one of a rule's tensors."""
    return lambda parts: [change(part) if number == index else part for number, part in enumerate(parts)]


def exchange(first: int, second: int) -> Break:
    """Give two of a rule's tensors each other's names."""

    def exchanged(parts: Parts) -> list[torch.Tensor]:
        order = list(range(len(parts)))
        order[first], order[second] = second, first
        return [parts[number] for number in order]

    return exchanged


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Order the rows of each head in pairs (i, i + 1) instead of (i, i + D / 2), as other frameworks' rotary layout."""
    return weight.unflatten(0, (-1, 2, HEAD // 2)).transpose(1, 2).flatten(0, 2)


def other_heads(weight: torch.Tensor) -> torch.Tensor:
    """Order the heads as if a grouped layout were read as a plain one."""
    return weight.unflatten(0, (-1, HEAD)).roll(1, 0).flatten(0, 1)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.T


def twice(weight: torch.Tensor) -> torch.Tensor:
    return 2 * weight


def rolled(weight: torch.Tensor) -> torch.Tensor:
    return weight.roll(1, 0)


QKV, PROJ = "linear_qkv.weight", "linear_proj.weight"
ERRORS: list[tuple[str, str, Break, str, str]] = [
    ("Llama", "word_embeddings.weight", at(0, twice), "embed_tokens", "scaled"),
    ("Llama", "word_embeddings.weight", at(0, rolled), "embed_tokens", "other values"),
    ("Llama", "linear_qkv.layer_norm_weight", at(0, twice), "input norm", "norm eps, or the weight"),
    ("Llama", "linear_qkv.layer_norm_weight", at(0, rolled), "input norm", "other values"),
    ("Llama", QKV, exchange(1, 2), "k_proj", "QKV order: it equals the expected values"),
    ("Llama", QKV, at(0, interleaved), "q_proj", "rotary layout"),
    ("Llama", QKV, at(1, interleaved), "k_proj", "rotary layout"),
    ("Llama", QKV, at(0, other_heads), "q_proj", "QKV order: the heads are in another order"),
    ("Llama", QKV, at(2, other_heads), "v_proj", "QKV order: the heads are in another order"),
    ("Llama", QKV, at(0, transposed), "q_proj", "transposed"),
    ("Llama", QKV, at(0, twice), "q_proj", "scaled: the result is 2 times"),
    ("Llama", PROJ, at(0, transposed), "o_proj", "transposed"),
    ("Llama", PROJ, at(0, twice), "o_proj", "scaled: the result is 2 times"),
    ("Llama", "linear_fc1.layer_norm_weight", at(0, twice), "post-attention norm", "norm eps, or the weight"),
    ("Llama", "linear_fc1.weight", exchange(0, 1), "gate_proj", "gate/up order"),
    ("Llama", "linear_fc1.weight", at(1, transposed), "up_proj", "transposed"),
    ("Llama", "linear_fc1.weight", at(1, rolled), "up_proj", "rows are in another order"),
    ("Llama", "linear_fc2.weight", at(0, transposed), "down_proj", "transposed"),
    ("Llama", "linear_fc2.weight", at(0, twice), "down_proj", "scaled: the result is 2 times"),
    ("Llama", "final_layernorm.weight", at(0, twice), "model.norm.weight", "norm eps, or the weight"),
    ("Llama", "output_layer.weight", at(0, rolled), "lm_head", "vocabulary padding or order"),
    ("Llama", "output_layer.weight", at(0, twice), "lm_head", "scaled"),
    ("Qwen2", "linear_qkv.bias", exchange(1, 2), "k_proj", "other values"),
    ("Qwen2", "linear_qkv.bias", at(0, twice), "q_proj", "other values"),
    ("Qwen3", "q_layernorm.weight", at(0, rolled), "q_proj", "other values"),
    ("Qwen3", "k_layernorm.weight", at(0, twice), "k_proj", "scaled"),
]


def broken(core: str, change: Break) -> tuple[Rule, ...]:
    """Return the table with the result of one rule changed."""

    def one(rule: Rule) -> Rule:
        def split(tensor: torch.Tensor, sizes: Sizes) -> Parts:
            parts = rule.fusion.split(tensor, sizes)
            return tuple(part.contiguous() for part in (change(parts) if tensor.device.type != "meta" else parts))

        return replace(rule, fusion=Fusion(split, rule.fusion.join))

    table = tuple(one(rule) if rule.core.endswith(core) else rule for rule in rules.RULES)
    assert table != rules.RULES
    return table


@pytest.mark.parametrize(
    ("architecture", "core", "change", "weight", "cause"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_broken_rule_is_caught_and_named(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    core: str,
    change: Break,
    weight: str,
    cause: str,
) -> None:
    monkeypatch.setattr(rules, "RULES", broken(core, change))
    how: Any = "layers" if core in (QKV, "output_layer.weight", "word_embeddings.weight") else "whole"
    with pytest.raises(VerificationError) as caught:
        export_hf(str(runs[architecture]), str(tmp_path / "new/hf"), verify=how)
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert weight in message
    assert cause in message
    assert list(tmp_path.iterdir()) == []


def test_every_rule_has_an_error_above() -> None:
    assert [rule.core for rule in rules.RULES if not any(rule.core.endswith(core) for _, core, *_ in ERRORS)] == []


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"rms_norm_eps": 0.1}, "norm eps"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rotary layout, base or scaling"),
    "scaling": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}},
        "rotary layout, base or scaling",
    ),
    "tied": ({"tie_word_embeddings": True}, "tied head"),
}


@pytest.mark.parametrize(
    ("error_name", "how"),
    [(error_name, how) for error_name in CONFIG_ERRORS for how in ("whole", "layers")],
)
def test_a_wrong_config_is_caught_and_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_name: str, how: Any
) -> None:
    changed, cause = CONFIG_ERRORS[error_name]
    build = exporting.build_hf_config

    def build_wrong(*arguments: Any) -> Any:
        config = build(*arguments)
        for key, value in changed.items():
            setattr(config, key, value)
        return config

    monkeypatch.setattr(exporting, "build_hf_config", build_wrong)
    with pytest.raises(VerificationError, match=cause):
        export_hf(str(runs["Llama"]), str(tmp_path / "hf"), verify=how)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bf16 folder whose queries and keys have outliers: rounding to bf16 alone changes some of its logits a lot."""
    folder = stock_folder(tmp_path_factory.mktemp("rough") / "hf", stock_config("Llama"), dtype=torch.bfloat16)
    return plant_outliers(folder, 32)


def plant_outliers(folder: Path, times: int) -> Path:
    """Enlarge every fourth row of queries and keys."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight[::4] *= times
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_an_exact_conversion_passes_however_much_bf16_rounds(rough: Path, tmp_path: Path, how: Any) -> None:
    check = import_hf(str(rough), str(tmp_path / "run"), direction=Direction.REVERSE, verify=how)
    assert check is not None
    assert check.bf16 is not None
    assert check.bf16["mean_kl_nats"] > 0.02  # twice the value that was once refused
    assert check.bf16["stock_mean_kl_nats"] > 0.02
    assert check.limits["mean_kl_nats"] == 4 * check.bf16["stock_mean_kl_nats"]
    check = export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=how)
    card = json.loads((tmp_path / "out/export.json").read_text())["verification"]
    assert check is not None
    assert card["limits"] == check.limits
    assert "stock mean kl nats" in (tmp_path / "out/VERIFICATION.md").read_text()


def sum_of_halves(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `linear` in another order of summation, as another processor or BLAS would. Exact but for rounding."""
    half = weight.shape[1] // 2
    product = inputs[..., :half] @ weight[:, :half].T + inputs[..., half:] @ weight[:, half:].T
    return product if bias is None else product + bias


def test_an_exact_conversion_passes_however_much_fp32_rounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", sum_of_halves)  # else both models may round alike, to the last bit
    folder = stock_folder(tmp_path / "hf", stock_config("Llama"))
    plant_outliers(folder, 64)
    check = import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE, verify="whole", params_dtype="bf16")
    assert check is not None
    assert 1e-4 < check.largest_logit_difference <= check.limits["largest_logit_difference"]
    assert "rounding to fp32 alone" in caplog.text


def larger(name: str, times: float) -> Callable[[CoreSide], None]:
    """Make a weight of the core model larger."""

    def change(core: CoreSide) -> None:
        for found, weight in core.model.named_parameters():
            if name in found:
                weight.mul_(times)

    return change


def coarser(core: CoreSide) -> None:
    """Round to three bits of mantissa; bf16 has seven."""
    for name, weight in core.model.named_parameters():
        if "linear_fc2" in name:
            weight.copy_(weight.to(torch.float8_e4m3fn))


IN_BF16 = {
    "final norm": larger("final_layernorm", 1.05),
    "one projection": larger("layers.1.self_attention.linear_proj", 1.1),
    "precision": coarser,
    "rows": lambda core: core.model.embedding.word_embeddings.weight.copy_(
        core.model.embedding.word_embeddings.weight.roll(1, 0)
    ),
}


@pytest.mark.parametrize("error_name", IN_BF16)
@pytest.mark.parametrize("is_rough", [False, True])
def test_a_model_that_is_wrong_in_bf16_only_is_caught(
    rough: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_name: str, is_rough: bool
) -> None:
    """The stock model's rounding error excuses no larger difference."""
    folder = rough if is_rough else stock_folder(tmp_path / "hf", stock_config("Llama"), dtype=torch.bfloat16)
    make = CoreSide.__init__

    def made_wrong(self: CoreSide, *arguments: Any) -> None:
        make(self, *arguments)
        if self.dtype is torch.bfloat16:
            IN_BF16[error_name](self)

    monkeypatch.setattr(CoreSide, "__init__", made_wrong)
    with pytest.raises(VerificationError, match=r"agree in fp32 but not in bf16: .* so rounding does not explain it"):
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE, verify="whole")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("core", [QKV, "linear_fc2.weight", "linear_fc1.layer_norm_weight", "final_layernorm.weight"])
@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_slightly_wrong_conversion_of_a_rough_model_is_caught(
    rough: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: str, how: Any
) -> None:
    """One value in a hundred is too large, in fp32 and in bf16."""
    import_hf(str(rough), str(tmp_path / "run"), direction=Direction.REVERSE, verify=None)
    monkeypatch.setattr(rules, "RULES", broken(core, at(0, lambda weight: 1.01 * weight)))
    with pytest.raises(VerificationError, match="the logits differ by"):
        export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=how)
    assert not (tmp_path / "out").exists()


def test_without_the_parity_check_a_broken_rule_passes_and_the_card_records_it(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rules, "RULES", broken(QKV, exchange(1, 2)))
    export_hf(str(runs["Llama"]), str(tmp_path / "hf"), verify=None)
    assert "the logits of the two models were not compared" in caplog.text
    assert "**It was not verified**" in (tmp_path / "hf/VERIFICATION.md").read_text()
