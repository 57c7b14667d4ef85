"""LoRA with transformers' Trainer and PEFT: text order through the collator equals a shard of reversed documents, bit for bit."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.cli.main import run
from megatron_ledom.convert import import_hf
from megatron_ledom.data import ShardReader
from megatron_ledom.errors import MismatchError
from megatron_ledom.finetune import DocumentCollator, encode_documents, save_finetuned
from megatron_ledom.inference import ReverseLM
from tests.support.legible import write_jsonl
from tests.support.paths import ROOT
from tests.support.tiny_models import CORPUS, random_model_folder
from tests.support.tool_runs import preprocessed

peft = pytest.importorskip("peft", reason="LoRA needs PEFT: pip install '.[finetune]'")
PAGE = (ROOT / "docs/how_to/finetune_lora.md").read_text(encoding="utf-8")
TEXTS = [f"{text} Number {number}." for number in range(4) for text in CORPUS]
EOD = "<EOD>"


def padded(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad rows that are in model order already: a plain collator, which knows no direction."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=int(rows[0][-1])),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def trained(folder: Path, documents: list[dict[str, list[int]]], collate: Any, at: Path) -> tuple[list[float], Any, ReverseLM]:
    """Train an adapter; return the loss of each step, the PEFT model and the language model."""
    from transformers import Trainer, TrainingArguments, set_seed

    lm = ReverseLM.from_pretrained(folder, device="cpu")
    set_seed(1)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(lm.model, lora)
    arguments = TrainingArguments(
        output_dir=str(at),
        learning_rate=1e-2,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, collate, documents)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model, lm


def test_training_equals_that_on_a_reversed_shard(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    shard = ShardReader(str(preprocessed(tmp_path, str(folder), "shard", eod_token=EOD)))
    stored = [{"input_ids": shard.document(index).tolist()} for index in range(len(shard))]
    lm = ReverseLM.from_pretrained(folder, device="cpu")
    documents, collate = encode_documents(lm, TEXTS), DocumentCollator.of(lm)
    assert len(documents) == len(stored) == len(TEXTS)
    losses, model, lm = trained(folder, documents, collate, tmp_path / "ours")
    stored_losses, stored_model, _ = trained(folder, stored, padded, tmp_path / "stored")
    assert len(losses) == 8
    assert losses == stored_losses
    assert losses[-1] < losses[0]
    weights, stored_weights = (dict(one.named_parameters()) for one in (model, stored_model))
    assert weights.keys() == stored_weights.keys()
    assert all(torch.equal(weight, stored_weights[name]) for name, weight in weights.items())
    assert any("lora_B" in name and bool(weight.any()) for name, weight in weights.items())
    forwards = DocumentCollator(direction=collate.direction.other, eod_id=collate.eod_id)
    assert trained(folder, documents, forwards, tmp_path / "forward")[0] != losses
    check_folders(tmp_path, folder, lm, model)


def check_folders(at: Path, source: Path, lm: ReverseLM, model: Any) -> None:
    """Check that the merged folder computes what the adapter computes, keeps the direction, and converts."""
    pair = ("The capital of France", " is Paris.")
    adapted = lm.log_likelihood(*pair).logprob
    model.save_pretrained(at / "adapter")
    save_finetuned(lm, model, source, at / "merged")
    merged = ReverseLM.from_pretrained(at / "merged", device="cpu")
    assert merged.log_likelihood(*pair).logprob == pytest.approx(adapted, abs=1e-3)
    plain = ReverseLM.from_pretrained(source, device="cpu").log_likelihood(*pair).logprob
    assert abs(merged.log_likelihood(*pair).logprob - plain) > 0.01
    recorded = [json.loads((folder / "config.json").read_text()) for folder in (source, at / "merged")]
    names = ("direction", "eod_id", "tokenizer_sha256", "vocab_size", "architectures")
    assert [recorded[1][name] for name in names] == [recorded[0][name] for name in names]
    assert not list((at / "merged").glob("adapter*"))
    import_hf(str(at / "merged"), str(at / "run"))
    assert "direction: reverse" in (at / "run/model.yaml").read_text()
    for name in ("config.json", "tokenizer.json"):
        (at / "adapter" / name).write_bytes((source / name).read_bytes())
    with pytest.raises(MismatchError, match="contains an adapter"):
        ReverseLM.from_pretrained(at / "adapter")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    random_model_folder(tmp_path / "models/reverse", "byte_level", "reverse")
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    script = [words for words in commands if words[0] == "python"]
    assert run_script(monkeypatch, *script[0][1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "finetuned/adapter/adapter_config.json").is_file()
    assert run_script(monkeypatch, *script[0][1:]) == 2
    assert "exists already; name another --output" in capsys.readouterr().err
    for words in commands:
        if words[0] == "ledom":
            assert not run(words[1:])
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "finetune_lora.md", "exec"), {})
    assert ReverseLM.from_pretrained(tmp_path / "finetuned_whole").stop_ids == [3]


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> int:
    """Run a script of the checkout in this process and return its exit code."""
    import runpy

    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return int(ended.value.code or 0)
