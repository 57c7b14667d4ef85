"""Exports of tiny runs: stock transformers has the trained model's logits, and stops at the trained beginning of a text."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.convert.core_side import core_side
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.inference import ReverseLM
from tests.support.paths import ROOT
from tests.support.tiny_models import CORPUS, EOD_TOKEN, sentencepiece_like_json
from tests.support.tiny_runs import TinyData, run_on_ranks

PAIRS = [("The capital of France", " is Paris."), ("Berl", "in is"), ("", "漢字 and café"), ("def area(", "width)\n")]

CASES = {
    "4 key-value heads from TP2": (
        2,
        ["parallel.tensor_model_parallel_size=2", "model.num_query_groups=4", "model.kv_channels=16"],
    ),
    "2 key-value heads, tied, bf16 from PP2": (
        2,
        [
            "parallel.pipeline_model_parallel_size=2",
            "model.num_query_groups=2",
            "model.share_embeddings_and_output_weights=true",
            "model.params_dtype=bf16",
        ],
    ),
    "1 key-value head": (1, ["model.num_query_groups=1", "model.rotary_base=500.0"]),
}
SETTINGS = (  # large weights, so that a wrong one shows
    *(
        "train.train_iters=2",
        "train.global_batch_size=4",
        "optimizer.lr_warmup_iters=0",
        "model.init_method_std=0.2",
        "data.path_to_cache=null",
    ),
)
Exported = Callable[[str], tuple[Path, Path]]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return data in SentencePiece-like ids whose tokenizer has </s> as eos, preprocessed with --eod-token <EOD>."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "words").mkdir()
    (folder / "words/tokenizer.json").write_text(sentencepiece_like_json(), encoding="utf-8")
    (folder / "words/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 6), encoding="utf-8")
    settings = PreprocessSettings(
        input=[str(folder / "corpus.jsonl")],
        tokenizer=str(folder / "words"),
        output_prefix=str(folder / "train"),
        direction=Direction.REVERSE,
        eod_token=EOD_TOKEN,
        workers=1,
    )
    preprocess(settings)
    return settings.output_prefix


@pytest.fixture(scope="module")
def exported(data: TinyData, shard: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Train and export a case once. Returns (run folder, Hugging Face folder)."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp("export")
            num_ranks, overrides = CASES[name]
            blend = f"data.train_blend=[[1.0,{shard}]]"
            run_on_ranks(data.config, folder / "run", *SETTINGS, blend, *overrides, num_ranks=num_ranks)
            export_hf(str(folder / "run"), str(folder / "hf"))
            done[name] = folder / "run", folder / "hf"
        return done[name]

    return make


def convert(*arguments: str) -> int:
    """Run tools/convert_checkpoint.py in this process, and return its exit code."""
    before, sys.argv = sys.argv, ["convert_checkpoint.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the command did not exit")


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_the_trained_models_logits(
    exported: Exported, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, folder = exported(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(stock, LlamaForCausalLM)
    checkpoint = find_checkpoint(str(run_dir))
    manifest = load_manifest(checkpoint)
    ids = torch.randint(0, manifest.provenance.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    with core_side(checkpoint, manifest) as core:
        expected = core.forward(ids)
    with torch.no_grad():
        found = stock(ids).logits
    assert found.shape == expected.shape  # without padding rows
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_export_records_what_was_trained(exported: Exported, name: str) -> None:
    run_dir, folder = exported(name)
    manifest = load_manifest(find_checkpoint(str(run_dir)))
    trained = manifest.run_config("the checkpoint").model
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["direction"] == "reverse"
    assert config["num_key_value_heads"] == trained.num_query_groups
    assert config["head_dim"] == (trained.kv_channels or 8)
    assert config["vocab_size"] == manifest.provenance.vocab_size
    assert config["tie_word_embeddings"] is trained.share_embeddings_and_output_weights
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {
        {"bf16": torch.bfloat16, "fp32": torch.float32}[trained.params_dtype]
    }
    assert weights["model.embed_tokens.weight"].shape == (manifest.provenance.vocab_size, 32)
    assert manifest.provenance.vocab_size % trained.make_vocab_size_divisible_by  # the run had padding
    assert ("lm_head.weight" in weights) is not trained.share_embeddings_and_output_weights
    assert not list(folder.parent.glob("*.part"))


def test_generation_stops_at_the_trained_eod_for_any_eos_of_the_tokenizer(exported: Exported) -> None:
    """If the trained stop id were not the exported tokenizer's eos, generation would never stop."""
    _, folder = exported("1 key-value head")
    source = Tokenizer.from_str(sentencepiece_like_json())
    eod_id = source.token_to_id(EOD_TOKEN)
    assert source.token_to_id("</s>") == 2 != eod_id
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.eos_token_id == eod_id
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == eod_id
    assert GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id == eod_id
    assert ReverseLM.from_pretrained(folder).stop_ids[0] == eod_id
    assert tokenizer("The cat").input_ids == source.encode("The cat", add_special_tokens=False).ids  # no BOS, no EOS


@pytest.mark.parametrize("name", CASES)
def test_a_log_likelihood_is_the_megatron_core_models_on_the_same_ids(exported: Exported, name: str) -> None:
    """Compare over the tokenizer's ids: an export has no padding rows."""
    run_dir, folder = exported(name)
    lm = ReverseLM.from_pretrained(folder)
    scores = lm.log_likelihood([a for a, _ in PAIRS], [b for _, b in PAIRS])
    checkpoint = find_checkpoint(str(run_dir))
    manifest = load_manifest(checkpoint)
    with core_side(checkpoint, manifest) as core:
        for (preceding, following), score in zip(PAIRS, scores, strict=True):
            text_ids, num_preceding = lm.tokenizer.split(preceding, following)
            tokens = torch.tensor([to_model_order(text_ids, Direction.REVERSE)])
            logprobs = core.forward(tokens)[0].log_softmax(-1)
            picked = logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0]
            expected = picked[tokens.shape[1] - num_preceding - 1 :].sum()
            assert len(score.token_logprobs) == num_preceding
            assert score.logprob == pytest.approx(float(expected), abs=1e-4)


def test_the_command_exports_and_refuses_to_replace_unasked(exported: Exported, tmp_path: Path) -> None:
    run_dir, folder = exported("1 key-value head")
    arguments = ["mcore-to-hf", "--load", str(run_dir), "--save", str(tmp_path / "hf")]
    assert convert(*arguments) == 0
    written = tmp_path / "hf/model.safetensors"
    assert written.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert convert(*arguments) == 2
    assert convert(*arguments, "--overwrite") == 0
    assert written.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_the_command_imports_what_it_exported(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = exported("1 key-value head")
    arguments = ["hf-to-mcore", "--load", str(folder), "--save", str(tmp_path / "run"), "--seq-length", "16"]
    assert convert(*arguments, "--max-shard-size", "100KB") == 0
    assert (tmp_path / "run/checkpoints/latest").read_text() == "iter_0000000\n"
    assert json.loads((tmp_path / "run/import.json").read_text())["verification"]["largest_logit_difference"] <= 1e-4
    assert convert(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert("mcore-to-hf", "--load", str(tmp_path / "run"), "--save", str(tmp_path / "hf"), "--no-verify") == 0
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_overwrite_removes_nothing_but_an_export(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = exported("1 key-value head")
    for save in (run_dir, run_dir / "checkpoints"):
        assert convert("mcore-to-hf", "--load", str(run_dir), "--save", str(save), "--overwrite") == 2
        assert "is not an earlier export" in capsys.readouterr().err
    assert (run_dir / "checkpoints/latest").exists()


def test_the_export_refuses_a_tokenizer_that_is_not_the_runs(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(exported("1 key-value head")[0], tmp_path / "run")
    file = run_dir / "tokenizer/tokenizer.json"
    stored = json.loads(file.read_text())
    vocab = stored["model"]["vocab"]
    first, second = list(vocab)[7:9]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(stored))
    assert convert("mcore-to-hf", "--load", str(run_dir), "--save", str(tmp_path / "hf")) == 1
    assert "the run was trained with" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_run_that_cannot_be_exported_is_refused_with_the_reason(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = exported("1 key-value head")
    (tmp_path / "young/checkpoints").mkdir(parents=True)
    (tmp_path / "unfinished").mkdir()
    for load, code, words in [
        (tmp_path / "none", 2, "is not a folder"),
        (tmp_path / "young", 2, "has no finished checkpoint yet"),
        (tmp_path / "unfinished", 1, "has no manifest.json"),
    ]:
        assert convert("mcore-to-hf", "--load", str(load), "--save", str(tmp_path / "hf")) == code
        assert words in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()
    assert run_dir.exists()


def test_the_slurm_script_exports(exported: Exported, tmp_path: Path, python: Path) -> None:
    run_dir, folder = exported("1 key-value head")
    variables = {"LOAD": str(run_dir), "SAVE": str(tmp_path / "hf"), "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    variables["SLURM_JOB_ID"] = "1"  # the same command as in the job
    script = ["bash", "examples/slurm/convert.sbatch"]
    done = subprocess.run(script, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_export_of_a_run_that_was_stopped_is_reported(
    data: TinyData, shard: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = [*SETTINGS, f"data.train_blend=[[1.0,{shard}]]", "train.train_iters=3", "train.exit_interval=2"]
    for said in (["iter_0000002 is iteration 2 of 3"], []):  # the second start completes the run
        caplog.clear()
        run_on_ranks(data.config, tmp_path / "run", *stopped)
        export_hf(str(tmp_path / "run"), str(tmp_path / "hf"), overwrite=True, verify=None)
        warned = [record.getMessage() for record in caplog.records if "not complete" in record.getMessage()]
        assert len(warned) == len(said)
        assert all(text in one for text, one in zip(said, warned, strict=True))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_model_card_describes_the_run_and_its_examples_work(
    data: TinyData, tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blends = [f"data.{part}_blend=[[1.0,{data.shard(f'{direction}_{part}')}]]" for part in ("train", "valid")]
    run_on_ranks(data.config, tmp_path / "run", f"data.direction={direction}", *blends, "train.train_iters=4")
    export_hf(str(tmp_path / "run"), str(tmp_path / "tiny-model"), verify=None)
    card = (tmp_path / "tiny-model/README.md").read_text()
    manifest = load_manifest(find_checkpoint(str(tmp_path / "run")))
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    for text in (
        "# tiny-model\n",
        f"{manifest.consumed_train_tokens:,} in 4 iterations",
        f"{last['lm_loss']:.4f} nats per token, at iteration 4",
        manifest.provenance.tokenizer_sha256[:12],
        f"ends at the id {manifest.provenance.eod_id}",
        "This export was not compared",
        f"- {direction}-language-model\n",
    ):
        assert text in card
    assert ("**Warning:**" in card) == (direction == "reverse")
    assert str(tmp_path) not in card
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {"folder": str(tmp_path / "tiny-model")})
        assert capsys.readouterr().out.strip()
