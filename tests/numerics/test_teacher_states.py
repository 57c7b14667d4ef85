"""The states of a reverse teacher: the right tokens at the right index, equal to those of `ReverseLM`, and the loss from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.batch import Batch
from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.inference.language_model import ReverseLM
from megatron_ledom.model.builder import build_model_chunks
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.reverse_teacher import ReverseTeacher, find_teacher
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.training.trainer import loss_with_teacher
from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_ids
from tests.support.tiny_models import save_model_folder, tiny_config
from tests.support.tiny_runs import TinyData

DOCUMENTS = [legible_ids(1, 9)[3:], legible_ids(2, 2), legible_ids(3, 1), legible_ids(4, 3), legible_ids(5, 40)]
"""The first begins before the sample, the last ends after it."""
POSITIONS = 32
TEXT = [token for document in DOCUMENTS for token in [*document, EOD_ID]][: POSITIONS + 1]
SAMPLE = torch.tensor([TEXT, [*legible_ids(6, 12), EOD_ID, *legible_ids(7, 20)]])
"""Two samples [2, T + 1]."""


@pytest.fixture(scope="module")
def folder(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reverse model with the tokenizer of the legible shards, and the card of an export."""
    torch.manual_seed(3)
    tokenizer = (data.folder / "legible/tokenizer.json").read_text(encoding="utf-8")
    model = LlamaForCausalLM(tiny_config(VOCAB_SIZE))
    folder = save_model_folder(tmp_path_factory.mktemp("teacher"), model, tokenizer, "reverse", EOD_ID)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_name": "legible"}))
    files = {"model.safetensors": sha256_of(folder / "model.safetensors")}
    (folder / "export.json").write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture
def build(data: TinyData, folder: Path, groups: Any) -> Any:
    """Return a function that makes the teacher of a run with further settings."""

    def of(*settings: str) -> ReverseTeacher:
        forward = ["data.direction=forward", f"data.train_blend=[[1.0,{data.shard('forward_train')}]]"]
        chosen = ["train.auxiliary.kind=reverse_state", f"train.auxiliary.teacher={folder}", *settings]
        config = load_config(str(data.config), [*forward, *chosen])
        found = find_teacher(config, load_sources(config).provenance)
        assert found is not None
        return ReverseTeacher(found, config, EOD_ID, groups, torch.device("cpu"))

    return of


def end_of_document(sample: list[int], position: int) -> int:
    """Return the index after the last token of the document of a position, without its eod, in a sample with its last label."""
    return next((index for index in range(position, len(sample)) if sample[index] == EOD_ID), len(sample))


def expected_places(sample: list[int]) -> list[bool]:
    """Return for each position if its document has a token two places later."""
    return [position + 2 < end_of_document(sample, position) for position in range(POSITIONS)]


@pytest.mark.parametrize("layer", [None, 1])
def test_a_state_is_that_of_the_reverse_model_after_the_rest_of_the_document(
    build: Any, folder: Path, layer: int | None
) -> None:
    states, has_state = build(*([] if layer is None else [f"train.auxiliary.teacher_layer={layer}"])).states(SAMPLE)
    model = ReverseLM.from_pretrained(folder).model
    for row, sample in enumerate(SAMPLE.tolist()):
        assert has_state[row].bool().tolist() == expected_places(sample)
        for position in [place for place in range(POSITIONS) if has_state[row, place]]:
            rest = sample[position + 2 : end_of_document(sample, position)]
            read = torch.tensor([to_model_order(rest, Direction.REVERSE)])
            with torch.no_grad():
                hidden = model(read, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
            torch.testing.assert_close(states[row, position], hidden[0, -1], rtol=1e-5, atol=1e-5)
    assert has_state[0].sum() == 6 - 2 + 0 + 0 + 1 + (POSITIONS - 16 - 1)


def test_a_state_depends_on_exactly_the_tokens_from_two_places_later_to_the_end_of_its_document(build: Any) -> None:
    teacher = build()
    states, has_state = teacher.states(SAMPLE[:1])
    for changed in [place for place in range(POSITIONS + 1) if TEXT[place] != EOD_ID]:
        other = SAMPLE[:1].clone()
        other[0, changed] = 999
        moved, still = teacher.states(other)
        assert torch.equal(has_state, still)
        is_other = (moved - states).abs().amax(-1)[0] > 1e-4
        is_same = (moved - states).abs().amax(-1)[0] < 1e-6
        for position in [place for place in range(POSITIONS) if has_state[0, place]]:
            depends = position + 2 <= changed < end_of_document(TEXT, position)
            assert bool(is_other[position]) is depends, (changed, position)
            assert bool(is_same[position]) is not depends, (changed, position)


def batch_of(loss_mask: torch.Tensor) -> Batch:
    return {"sample": SAMPLE, "loss_mask": loss_mask}


@pytest.mark.parametrize("z_loss_coeff", [0.0, 0.1])
def test_the_loss_is_the_language_loss_plus_the_weighted_mean_square_and_differentiates_no_teacher(
    build: Any, z_loss_coeff: float
) -> None:
    teacher, width = build("train.auxiliary.weight=0.5"), 32
    torch.manual_seed(1)
    mask = (torch.rand(2, POSITIONS) > 0.2).float()
    output = torch.randn(2, POSITIONS, (2 if z_loss_coeff else 1) + width, requires_grad=True)
    total, count, report = loss_with_teacher(teacher, batch_of(mask), z_loss_coeff, output)
    states, has_state = teacher.states(SAMPLE)
    counted = has_state * mask
    distance = ((output[..., -width:] - states) ** 2).mean(-1)
    expected = (output[..., 0] * mask).sum() + 0.5 * (distance * counted).sum()
    if z_loss_coeff:
        expected = expected + z_loss_coeff * (output[..., 1] ** 2 * mask).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, output)[0] for one in (total, expected)))
    assert int(count) == int(mask.sum())
    torch.testing.assert_close(report["auxiliary_loss"], torch.stack([(distance * counted).sum(), counted.sum()]))
    assert not [weight for weight in teacher._model.parameters() if weight.requires_grad]
    assert not teacher._model.training


def test_the_loss_of_the_head_reaches_every_layer_of_the_model(data: TinyData, groups: Any) -> None:
    config = load_config(str(data.config), ["data.direction=forward", "train.auxiliary.head=linear"])
    (model,) = build_model_chunks(config, VOCAB_SIZE, groups, choose_layers(config), predicted_width=32)
    positions = torch.arange(POSITIONS).expand(2, -1)
    for weight in model.parameters():
        weight.main_grad = torch.zeros_like(weight)
    found = model.train()(SAMPLE[:, :-1], positions, None, labels=SAMPLE[:, 1:])
    found[..., -32:].square().sum().backward()
    layers = {name: weight for name, weight in model.named_parameters() if "decoder.layers" in name}
    assert layers
    assert [
        name for name, weight in layers.items() if not (weight.main_grad if weight.grad is None else weight.grad).abs().sum()
    ] == []


def test_a_sample_without_a_state_adds_nothing(build: Any) -> None:
    alone = torch.tensor([[token for number in range(11) for token in (100 * (number % 10), 100 * (number % 10) + 1, EOD_ID)]])
    predicted = torch.randn(1, POSITIONS, 32)
    total, found = build().measure({"sample": alone, "loss_mask": torch.ones(1, POSITIONS)}, predicted)
    assert (float(total), found.tolist()) == (0.0, [0.0, 0.0])
