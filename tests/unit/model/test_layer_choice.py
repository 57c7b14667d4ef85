"""The choice of layers on different machines, which are simulated."""

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError
from megatron_ledom.model import layer_specs
from megatron_ledom.model.layer_specs import check_fp8_hardware, choose_layers
from megatron_ledom.ops.library import Backend
from megatron_ledom.parallel.groups import nccl_options
from megatron_ledom.platform.adam import find_apex
from tests.support.paths import ROOT

CONFIG = ROOT / "examples/configs/ledom_7b.yaml"
Machine = Callable[..., None]


def run(*overrides: str) -> RunConfig:
    return load_config(str(CONFIG), overrides)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate installed packages, Transformer Engine's version and the GPU's compute capability, without our kernels."""
    monkeypatch.setattr(layer_specs, "backend", lambda kind: Backend(False, kind, "not built"))

    def tell(*packages: str, te_version: str = "2.8.0", capability: tuple[int, int] | None = None) -> None:
        look = importlib.util.find_spec

        def find(name: str, package: str | None = None) -> ModuleSpec | None:
            if name in ("transformer_engine", "apex", "amp_C"):
                return ModuleSpec(name, None, origin=f"site/{name}") if name in packages else None
            return look(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(layer_specs, "version", lambda name: te_version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return tell


def test_transformer_engine_is_used_if_it_can_run(machine: Machine) -> None:
    machine("transformer_engine", capability=(9, 0))
    assert choose_layers(run()).implementation == "transformer_engine"
    assert choose_layers(run("model.fp8=hybrid")).implementation == "transformer_engine"
    assert choose_layers(run("model.transformer_impl=torch")).implementation == "torch"
    for packages, capability in ((("transformer_engine",), None), ((), (9, 0))):
        machine(*packages, capability=capability)
        assert choose_layers(run()).implementation == "torch"


def test_unfused_attention_is_not_transformer_engines(machine: Machine) -> None:
    machine("transformer_engine", capability=(9, 0))
    choice = choose_layers(run("model.attention_backend=unfused"))
    assert choice.implementation == "torch"
    assert "model.attention_backend=unfused" in choice.reason


def test_without_transformer_engine_our_operators_are_used_if_they_can_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capability, device in (((9, 0), "cuda"), (None, "cpu")):
        machine(capability=capability)
        monkeypatch.setattr(layer_specs, "backend", lambda kind, there=device: Backend(kind == there, kind, "a reason"))
        choice = choose_layers(run())
        assert choice.implementation == "fused"
        assert f"fused operators for {device}: a reason" in choice.reason
        assert choose_layers(run("data.reset_attention_mask=true")).implementation == "fused"
        assert choose_layers(run("model.transformer_impl=torch")).implementation == "torch"
    machine(capability=(9, 0))
    monkeypatch.setattr(layer_specs, "backend", lambda kind: Backend(kind == "cuda", kind, "a reason"))
    odd = (
        ("model.params_dtype=fp32", "for fp32 on cuda"),
        ("model.kv_channels=24", "heads of width 24, not a multiple of 16"),
        ("model.ffn_hidden_size=44", "a rank's part of model.ffn_hidden_size of 22"),
        ("model.make_vocab_size_divisible_by=4", "make_vocab_size_divisible_by=4"),
    )
    for setting, reason in odd:
        settings = (setting,)
        assert choose_layers(run(*settings)).implementation == "torch"
        with pytest.raises(ConfigError, match=f"transformer_impl=fused cannot run here: no fused operators.*{reason}"):
            choose_layers(run(*settings, "model.transformer_impl=fused"))


@pytest.mark.parametrize(
    "setting", ["model.transformer_impl=transformer_engine", "model.fp8=hybrid", "parallel.tp_comm_overlap=true"]
)
def test_a_setting_that_needs_transformer_engine_is_refused_without_it(machine: Machine, setting: str) -> None:
    for packages, capability in ((("transformer_engine",), None), ((), (9, 0)), ((), None)):
        machine(*packages, capability=capability)
        with pytest.raises(ConfigError, match=f"{setting} cannot run here: Transformer Engine"):
            choose_layers(run(setting))


def test_isolated_documents_never_get_an_attention_that_ignores_their_mask(machine: Machine) -> None:
    machine("transformer_engine", capability=(9, 0))
    isolated = "data.reset_attention_mask=true"
    assert choose_layers(run(isolated)).implementation == "torch"
    for setting in ("model.transformer_impl=transformer_engine", "model.fp8=hybrid", "parallel.tp_comm_overlap=true"):
        with pytest.raises(ConfigError, match="ignores the mask"):
            choose_layers(run(isolated, setting))


@pytest.mark.parametrize(
    ("recipe", "capability", "te_version", "sentence"),
    [
        ("delayed", (8, 0), "2.8.0", "needs compute capability 8.9 .* has 8.0; set model.fp8=null"),
        ("blockwise", (8, 9), "2.8.0", "needs compute capability 9.0 .* set one of delayed, tensorwise"),
        ("mxfp8", (9, 0), "2.8.0", "needs compute capability 10.0 .* set one of delayed, tensorwise, blockwise"),
        ("tensorwise", (9, 0), "2.1.0", "needs Transformer Engine 2.2 or newer, found 2.1.0"),
        ("mxfp8", (10, 0), "2.0.1+cu12", "needs Transformer Engine 2.1 or newer"),
    ],
)
def test_a_recipe_that_the_machine_does_not_support_is_refused(
    machine: Machine, recipe: str, capability: tuple[int, int], te_version: str, sentence: str
) -> None:
    machine("transformer_engine", te_version=te_version, capability=capability)
    with pytest.raises(ConfigError, match=sentence):
        choose_layers(run("model.fp8=hybrid", f"model.fp8_recipe={recipe}"))


def test_a_recipe_that_the_machine_supports_is_used() -> None:
    check_fp8_hardware("tensorwise", (8, 9), "2.2.0")
    check_fp8_hardware("mxfp8", (12, 0), "2.10.0.dev0")


def test_nccl_gets_the_settings_of_the_config() -> None:
    config = run("parallel.high_priority_stream_groups=[dp_cp]", "parallel.use_sharp=true")
    assert nccl_options(config.parallel) == {
        "nccl_communicator_config_path": None,
        "high_priority_stream_groups": ["dp_cp"],
        "use_sharp": True,
    }


def test_only_an_apex_with_kernels_counts_as_nvidias(machine: Machine) -> None:
    machine()
    assert (find_apex().usable, find_apex().state) == (False, "apex not installed")
    machine("apex")
    assert not find_apex().usable
    assert "apex at site/apex ignored" in find_apex().state
    machine("apex", "amp_C")
    assert (find_apex().usable, find_apex().state) == (True, "apex of NVIDIA installed")
