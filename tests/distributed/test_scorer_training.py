"""A reverse model fine-tuned on pairs: its loss equals the scorer's in every layout, and a resumed run equals an uninterrupted one."""

import json
from pathlib import Path

import pytest

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.finetune.pairs import PairSettings, prepare_pairs
from megatron_ledom.inference import ReverseLM
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, curve, run_each_on_ranks, run_on_ranks

PAIRS = [(f"{100 * k} {100 * k + 1} ", f"{100 * k + 7} {100 * k + 8} {100 * k + 9}") for k in range(4)]
"""Each pair has six tokens with its eod, and its question can be predicted from its answer."""


def shard_of(folder: Path, data: TinyData, pairs: list[tuple[str, str]], seq_length: int) -> str:
    """Write a shard of pairs with the tokenizer of the tiny data, and return its prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps({"question": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    names = {"tokenizer": str(data.folder / "legible"), "output_prefix": str(folder / "pairs"), "prompt_template": "{question}"}
    prepare_pairs(PairSettings(input=[str(source)], seq_length=seq_length, **names))
    return str(folder / "pairs")


@pytest.fixture(scope="module")
def settings(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run on pairs. A sample of 24 tokens contains all four pairs, so that validation samples are alike."""
    folder = tmp_path_factory.mktemp("pairs")
    train = shard_of(folder / "train", data, PAIRS * 30 + PAIRS[:3] * 5, 24)
    valid = shard_of(folder / "valid", data, PAIRS * 9, 24)
    blends = [f"data.train_blend=[[1.0,{train}]]", f"data.valid_blend=[[1.0,{valid}]]", "data.allow_repeats=true"]
    masks = ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.loss_tokens=scored", "data.seq_length=24"]
    return [*blends, *masks, "train.train_iters=12", "train.global_batch_size=4", "train.eval_iters=2", "train.eval_interval=6"]


def test_the_loss_falls_and_equals_that_of_the_scorer(data: TinyData, settings: list[str], tmp_path: Path) -> None:
    records = run_on_ranks(data.config, tmp_path / "run", *settings)
    (valid,) = records[-1]["validation"].values()
    assert valid["lm_loss"] < records[0]["lm_loss"] - 1
    export_hf(str(tmp_path / "run"), str(tmp_path / "model"))
    model = ReverseLM.from_pretrained(tmp_path / "model")
    scores = model.log_likelihood([prompt for prompt, _ in PAIRS], [answer for _, answer in PAIRS])
    num_tokens = sum(score.num_tokens for score in scores)
    assert num_tokens == 8
    assert valid["lm_loss"] == pytest.approx(-sum(score.logprob for score in scores) / num_tokens, abs=1e-5)
    num_bytes = sum(len(prompt.encode()) for prompt, _ in PAIRS)
    assert valid["bits_per_byte"] == pytest.approx(-sum(s.logprob for s in scores) / num_bytes / 0.6931471805599453, abs=1e-5)


def test_layouts_agree_and_a_resumed_run_equals_the_uninterrupted_one(
    data: TinyData, settings: list[str], tmp_path: Path
) -> None:
    alone = run_on_ranks(data.config, tmp_path / "alone", *settings)
    layouts = {"dp": [], "tp": ["parallel.tensor_model_parallel_size=2"], "pp": ["parallel.pipeline_model_parallel_size=2"]}
    layouts |= {"cp": ["parallel.context_parallel_size=2"], "stopped": ["train.exit_interval=7"]}
    runs = {tmp_path / name: [*settings, *layout] for name, layout in layouts.items()}
    found = run_each_on_ranks(data.config, runs, num_ranks=2)
    for name in ("dp", "tp", "pp", "cp"):
        for record, other in zip(alone, found[tmp_path / name], strict=True):
            assert record["lm_loss"] == pytest.approx(other["lm_loss"], abs=2e-5), name
            assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4), name
    resumed = run_on_ranks(data.config, tmp_path / "stopped", *settings, num_ranks=2)
    assert curve(resumed) == curve(found[tmp_path / "dp"])


def test_the_config_of_the_papers_scorer_trains(data: TinyData, settings: list[str], tmp_path: Path) -> None:
    shapes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    model = [*[f"model.{key}={value}" for key, value in shapes.items()], "model.vocab_size=null", "model.params_dtype=fp32"]
    layout = ["parallel.world_size=2", "parallel.hardware=null", "train.num_threads=1"]
    speed = ["optimizer.lr=3e-3", "optimizer.min_lr=3e-4", "optimizer.lr_warmup_iters=2"]
    quiet = ["logging.tensorboard=false", "logging.peak_tflops=1.0", f"data.tokenizer={data.folder / 'legible'}"]
    config = ROOT / "examples/configs/ledom_7b_scorer.yaml"
    kept = [
        text for text in settings if not text.startswith(("data.loss_tokens", "data.reset", "data.allow"))
    ]  # the config has its own
    run = tmp_path / "run"
    records = run_each_on_ranks(config, {run: [*kept, *model, *layout, *speed, *quiet]}, num_ranks=2)[run]
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 1
