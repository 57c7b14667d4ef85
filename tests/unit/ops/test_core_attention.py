"""SDPA and unfused attention compared with softmax(QK^T / sqrt(D)) V written out, and isolation of documents.

Shape letters: S sequence, B batch, H query heads, G key-value heads, D head width.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.batch import document_numbers
from megatron_ledom.data.dataset.blend_samples import build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.model.builder import build_model_chunks
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.ops.core_attention import CausalCoreAttention, SDPACoreAttention, UnfusedCoreAttention
from megatron_ledom.parallel.groups import seed_iteration, start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE
from tests.support.legible import EOD_ID
from tests.support.tiny_runs import TinyData

S, B, H, D = 13, 2, 4, 8
FP32_SOFTMAX = 1e-6
"""Rounding error of UnfusedCoreAttention, whose softmax is in fp32 for every type."""
BUILT: Any = SimpleNamespace(tp=None, cp=None)


BACKENDS = pytest.mark.parametrize("backend", [SDPACoreAttention, UnfusedCoreAttention])


def attention(backend: type[CausalCoreAttention], dropout: float = 0.0) -> CausalCoreAttention:
    config: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=dropout, sequence_parallel=False)
    return backend(config, 1, None, "self", pg_collection=BUILT)


def floor_of(backend: type[CausalCoreAttention]) -> float:
    return FP32_SOFTMAX if backend is UnfusedCoreAttention else 0.0


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the formula in float64; hidden [S, S] or [B, 1, S, S] is True for invisible keys."""
    repeats = query.shape[2] // key.shape[2]
    q_BHSD, k_BHSD, v_BHSD = (
        t.double().repeat_interleave(r, 2).permute(1, 2, 0, 3) for t, r in ((query, 1), (key, repeats), (value, repeats))
    )
    scores = (q_BHSD @ k_BHSD.transpose(2, 3) / D**0.5).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v_BHSD).permute(2, 0, 1, 3).flatten(2)


def random_qkv(groups: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    return [torch.randn(S, B, heads, D, generator=generator, dtype=torch.float64).to(dtype) for heads in (H, groups, groups)]


def numbered(lengths: list[int]) -> torch.Tensor:
    """Return [1, S]: the number of each position's document."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def hidden_positions(documents: torch.Tensor) -> torch.Tensor:
    """Return [B, 1, S, S]: True above the diagonal and across documents."""
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    return (causal | (documents[:, :, None] != documents[:, None]))[:, None]


@BACKENDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_attention_is_the_formula(
    groups: int, dtype: torch.dtype, tolerance: float, backend: type[CausalCoreAttention]
) -> None:
    query, key, value = random_qkv(groups, dtype)
    expected = written_out(query, key, value, torch.ones(S, S, dtype=torch.bool).triu(1))
    found = attention(backend)(query, key, value)
    assert found.shape == (S, B, H * D)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=max(tolerance, floor_of(backend)))


@BACKENDS
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_document_mask_is_the_formula_with_hidden_scores(groups: int, backend: type[CausalCoreAttention]) -> None:
    query, key, value = random_qkv(groups)
    documents = torch.cat([numbered([5, 1, 7]), numbered([13])])
    found = attention(backend)(query, key, value, attention_mask=documents)
    expected = written_out(query, key, value, hidden_positions(documents))
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-12, floor_of(backend)))


def test_a_document_ends_with_its_eod() -> None:
    tokens = torch.tensor([[7, 8, EOD_ID, 9, EOD_ID, EOD_ID, 3], [EOD_ID, 1, 2, 3, 4, 5, EOD_ID]])
    assert document_numbers(tokens, EOD_ID).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@BACKENDS
def test_gradients_are_the_formulas(backend: type[CausalCoreAttention]) -> None:
    tensors = [t.requires_grad_() for t in random_qkv(2)]
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    found = torch.autograd.grad(attention(backend)(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(written_out(*tensors, causal).square().sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=max(1e-11, 10 * floor_of(backend)))


@pytest.fixture
def started(data: TinyData, tmp_path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Return config, groups and dataset of a run that isolates documents, in this process."""
    overrides = ["data.reset_attention_mask=true", "data.path_to_cache=null", "data.reset_position_ids=true"]
    config = load_config(str(data.config), [f"run_dir={tmp_path / 'run'}", *overrides])
    groups = start_distributed(prepare_platform(1), config.parallel)
    try:
        sources, cache = load_sources(config), str(tmp_path / "cache")
        prepare_indices(config, sources, cache, ALONE)
        yield config, groups, build_train_dataset(config, sources, cache)
    finally:
        stop_distributed()


@BACKENDS
def test_dropout_draws_from_the_state_that_tensor_parallel_ranks_do_not_share(
    started: tuple[Any, Any, Any], backend: type[CausalCoreAttention]
) -> None:
    """Ranks have different heads; with a common state they would all drop the same positions."""
    _, groups, _ = started
    seed_iteration(1, 0, groups)
    layer = attention(backend, dropout=0.5).train()
    query, key, value = random_qkv(4, torch.float32)
    common = torch.get_rng_state()
    first, second = layer(query, key, value), layer(query, key, value)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), common)
    assert torch.equal(layer.eval()(query, key, value), layer.eval()(query, key, value))


def test_a_changed_token_changes_nothing_in_other_documents(started: tuple[Any, Any, Any]) -> None:
    config, groups, dataset = started
    model = build_model_chunks(config, 1024, groups, choose_layers(config))[0].eval()
    samples = (default_collate([dataset[index]]) for index in range(len(dataset)))
    sample = next(one for one in samples if EOD_ID in one["tokens"][0, 5:-5].tolist())
    tokens, place = sample["tokens"], 1
    documents = document_numbers(tokens, EOD_ID)
    end = tokens[0].tolist().index(EOD_ID) + 1  # the first document's part of the sample, including its eod
    assert sample["position_ids"][0, end] == 0
    changed = tokens.clone()
    changed[0, place] = (tokens[0, place] + 1) % 1000
    with torch.no_grad():
        one, other = (model(ids, sample["position_ids"], documents) for ids in (tokens, changed))
        leaking = model(changed, sample["position_ids"], None)
    assert torch.equal(one[0, end:], other[0, end:])
    assert torch.equal(one[0, :place], other[0, :place])
    assert not torch.equal(one[0, place:end], other[0, place:end])
    assert not torch.equal(one[0, end:], leaking[0, end:])  # without the mask the change is visible
