"""Batches of documents for transformers' Trainer, and fine-tuned folders."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.finetune.documents import IGNORED, DocumentCollator, encode_documents, save_finetuned
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.provenance import vocabulary_hash
from tests.support.legible import EOD_ID, legible_ids
from tests.support.tiny_models import random_model_folder

DOCUMENTS = [{"input_ids": legible_ids(1, 3)}, {"input_ids": legible_ids(2, 1)}]


def test_documents_are_reversed_closed_and_padded() -> None:
    collate = DocumentCollator(direction=Direction.REVERSE, eod_id=EOD_ID)
    batch = collate(DOCUMENTS)
    assert batch["input_ids"].tolist() == [[102, 101, 100, EOD_ID], [200, EOD_ID, EOD_ID, EOD_ID]]
    assert batch["labels"].tolist() == [[102, 101, 100, EOD_ID], [200, EOD_ID, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    forward = DocumentCollator(direction=Direction.FORWARD, eod_id=EOD_ID)(DOCUMENTS)
    assert forward["input_ids"].tolist() == [[100, 101, 102, EOD_ID], [200, EOD_ID, EOD_ID, EOD_ID]]
    assert DOCUMENTS[0]["input_ids"] == legible_ids(1, 3)


@pytest.mark.parametrize(("length", "row"), [(4, [102, 101, 100, EOD_ID]), (3, [102, 101, 100]), (2, [102, 101])])
def test_of_a_long_document_the_end_of_the_text_stays(length: int, row: list[int]) -> None:
    collate = DocumentCollator(direction=Direction.REVERSE, eod_id=EOD_ID, max_length=length)
    assert collate(DOCUMENTS[:1])["input_ids"].tolist() == [row]


def test_invalid_documents_are_refused() -> None:
    collate = DocumentCollator(direction=Direction.REVERSE, eod_id=EOD_ID)
    with pytest.raises(DataError, match="contains the eod"):
        collate([{"input_ids": [100, EOD_ID]}])
    with pytest.raises(DataError, match="contains no tokens"):
        collate([{"input_ids": []}])
    with pytest.raises(DataError, match="has no input_ids, its keys are: text"):
        collate([{"text": "Paris"}])
    with pytest.raises(UsageError, match="leaves nothing to predict"):
        DocumentCollator(direction=Direction.REVERSE, eod_id=EOD_ID, max_length=1)


def test_a_loss_of_the_collator_is_the_score_of_the_text(tmp_path: Path) -> None:
    lm = ReverseLM.from_pretrained(random_model_folder(tmp_path / "model", "byte_level", "reverse"), device="cpu")
    text = "The capital of France is Paris."
    [document] = encode_documents(lm, [text, ""])
    with torch.no_grad():
        loss = lm.model(**DocumentCollator.of(lm)([document])).loss
    preceding, last = (lm.tokenizer.decode(document["input_ids"][begin:end]) for begin, end in ((0, -1), (-1, None)))
    score = lm.log_likelihood(preceding, last, include_beginning=True)  # the last token of the text is given, eod is scored
    assert [*score.text_ids, document["input_ids"][-1]] == document["input_ids"]
    assert float(loss) == pytest.approx(-score.logprob / len(document["input_ids"]), abs=1e-5)


def test_a_folder_keeps_the_direction(tmp_path: Path) -> None:
    source = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    lm = ReverseLM.from_pretrained(source, device="cpu")
    recorded = ("direction", "eod_id", "tokenizer_sha256")
    before = json.loads((source / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "stock")
    assert {name: json.loads((tmp_path / "stock/config.json").read_text())[name] for name in recorded} == {
        name: before[name] for name in recorded
    }
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1.5)
    save_finetuned(lm, lm.model, source, tmp_path / "saved")
    again = ReverseLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.stop_ids == lm.stop_ids
    pair = (["The cat"], [" sat on the mat."])
    assert again.log_likelihood(*pair)[0].logprob == lm.log_likelihood(*pair)[0].logprob
    with pytest.raises(MismatchError, match="records the direction reverse"):
        ForwardLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="exists"):
        save_finetuned(lm, lm.model, source, tmp_path / "saved")


def test_a_published_folder_gets_its_direction(tmp_path: Path) -> None:
    source = random_model_folder(tmp_path / "model", "byte_level", None)
    lm = ReverseLM.from_pretrained(source, device="cpu", direction="reverse", eod_id=3)
    save_finetuned(lm, lm.model, source, tmp_path / "saved")
    again = ReverseLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.stop_ids == [3]
    recorded = json.loads((tmp_path / "saved/config.json").read_text())
    assert recorded["tokenizer_sha256"] == vocabulary_hash((source / "tokenizer.json").read_bytes())
    assert again.log_likelihood("The cat", " sat").logprob == lm.log_likelihood("The cat", " sat").logprob
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(stock, LlamaForCausalLM)
    assert stock.generation_config.eos_token_id == 3
