"""The small recipe from text to a training run by one command, with a source in a hub added to it."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_ledom.cli.main import run
from megatron_ledom.config.load import load_config
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import MismatchError
from tests.support.corpus_recipes import tutorial_file
from tests.support.paths import ROOT
from tests.support.source_texts import FILES
from tests.support.stand_in_hub import stand_in_hub
from tests.support.tiny_runs import run_on_ranks

SMALL = ROOT / "examples/corpus/small.yaml"


def test_one_command_makes_a_blend_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(SMALL.read_text(encoding="utf-8"))
    values["sources"]["web"] = {
        **values["sources"]["code"],
        "address": "hf://datasets/org/web",
        "files": ["*.jsonl"],
        "share": 0.2,
        "domain": "web",
    }
    values["sources"]["code"]["share"] -= 0.2
    Path("small.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    changes = ["tokens=60000", "tokenizer_vocab_size=500", "sources.prose.most_bytes=300000", "sources.code.most_bytes=200000"]
    with stand_in_hub() as hub, hub.used_here():
        lines = [json.dumps({"text": text[:3000]}) for text in FILES]
        commit = hub.commit("datasets/org/web", {"a.jsonl": "\n".join(lines).encode()})
        options = [word for change in changes for word in ("--set", change)]
        run(["corpus", "make", "small.yaml", *options, "--workers", "1", "--seq-length", "32", "--global-batch-size", "8"])
        with pytest.raises(MismatchError, match=r"small_tokenizer has 500 pieces, tokenizer_vocab_size=600; name another"):
            run(["corpus", "make", "small.yaml", *options, "--set", "tokenizer_vocab_size=600"])
    assert check_shard("corpus/small/web").source["revision"] == commit
    Path("run_small.yaml").write_text(tutorial_file("base: corpus/small/blend.yaml"), encoding="utf-8")
    load_config("run_small.yaml")
    blend = yaml.safe_load(Path("corpus/small/blend.yaml").read_text(encoding="utf-8"))
    assert blend["train"]["train_iters"] == 60_000 // (32 * 8)
    absolute = [[weight, str(tmp_path / prefix)] for weight, prefix in blend["data"]["train_blend"]]
    records = run_on_ranks(
        tmp_path / "run_small.yaml",
        tmp_path / "run",
        *(
            "train.train_iters=12",
            "data.seq_length=32",
            "optimizer.lr_warmup_iters=2",
            "logging.log_interval=1",
            f"data.train_blend={json.dumps(absolute)}",
            f"data.tokenizer={tmp_path}/corpus/small_tokenizer",
        ),
    )
    losses = [record["lm_loss"] for record in records]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert "| web | hf://datasets/org/web |" in Path("corpus/small/README.md").read_text(encoding="utf-8")
