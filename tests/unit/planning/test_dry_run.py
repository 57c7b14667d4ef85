"""The dry run: its numbers, its blend and its verdicts, without importing torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.data.shards.shard import ShardManifest
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.planning.dry_run import dry_run
from megatron_ledom.planning.verdicts import checkpoints_to_come
from tests.support.forked import run_forked
from tests.support.paths import ROOT

CONFIGS = ROOT / "examples/configs"


def plan(name: str, world_size: int, *overrides: str) -> str:
    return dry_run(load_config(str(CONFIGS / f"{name}.yaml"), overrides), world_size).text


def row(text: str, name: str) -> str:
    found = re.findall(rf"^  {re.escape(name)}  +(.*)$", text, re.MULTILINE)
    assert len(found) == 1, f"{name} is {len(found)} times in\n{text}"
    return str(found[0])


def write_manifest(prefix: Path, num_tokens: int, vocab_size: int = 500, direction: Direction = Direction.REVERSE) -> None:
    manifest = ShardManifest(
        direction=direction,
        tokenizer_name="legible",
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        eod_id=2,
        dtype="uint16",
        num_documents=3,
        num_tokens=num_tokens,
        text_bytes=4 * num_tokens,
        skipped={},
        input_files=[],
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    prefix.with_suffix(".json").write_bytes(manifest.to_json())


def test_dry_run_of_the_scorer_config() -> None:
    text = plan("ledom_7b_scorer", 8)
    assert "loss_tokens: scored" in text
    assert "lr: 1.0e-05" in text
    assert "1,024" in text


def test_7b_prints_the_published_numbers() -> None:
    text = plan("ledom_7b", 64)
    assert row(text, "parameters") == "7.794 B (7,793,716,224)"
    assert row(text, "padded vocabulary") == "64,256 rows for 64,005 ids"
    assert row(text, "tokens") == "435.37 B (435,368,755,200)"
    assert row(text, "iterations") == "51,900"
    assert row(text, "micro-batches") == "32 an iteration"
    assert row(text, "data parallel") == "32"
    assert row(text, "global batch") == "1,024 samples, 8,388,608 tokens"
    assert row(text, "warm-up") == "2,000 iterations, 16.777 B tokens"
    assert row(text, "FLOPs a token").startswith("54.03 GFLOP")
    drawn = "259,830,104,064", "31,717,542"  # whole samples
    assert row(text, "data/dclm_01").split() == ["no", "shard", "yet", "259,833,174,808", "59.68%", *drawn]


def test_execution_of_a_gpu_run_is_described_without_a_gpu(tmp_path: Path) -> None:
    nccl = tmp_path / "nccl.yaml"
    nccl.write_text("dp_cp: {max_ctas: 16}")
    fp8 = ["model.fp8=hybrid", "model.fp8_recipe=mxfp8", "parallel.tp_comm_overlap=true", "parallel.use_sharp=true"]
    settings = [f"parallel.nccl_communicator_config_path={nccl}", "parallel.high_priority_stream_groups=[dp_cp,tp]"]
    full = ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=3"]
    text = plan("ledom_7b", 64, *fp8, *settings, *[f"parallel.{setting}" for setting in full])
    assert row(text, "implementation") == "Transformer Engine; the run stops if it or CUDA is missing"
    assert row(text, "fp8") == "hybrid, mxfp8; not yet run on hardware"
    assert row(text, "fp8 needs") == "compute capability 10.0 (Blackwell or newer), Transformer Engine 2.1"
    assert row(text, "recompute") == "full, block: the first 3 layers of a model chunk"
    assert row(text, "overlapped") == "overlap_grad_reduce, overlap_param_gather, tp_comm_overlap"
    assert row(text, "NCCL") == (
        f"settings of {nccl}; high priority for dp_cp, tp; SHARP for the data-parallel group (ignored on a CPU)"
    )
    plain = plan("ledom_7b", 64, "data.reset_attention_mask=true", "parallel.recompute_granularity=selective")
    assert (
        row(plain, "implementation")
        == "fused operators of this package if they can run, else torch; with SDPA and a document mask"
    )
    assert row(plain, "recompute") == "selective: core_attn of every layer"
    assert row(plain, "NCCL") == "defaults"


def test_the_bytes_of_all_checkpoints_are_printed() -> None:
    text = plan("ledom_7b", 64)

    assert re.fullmatch(
        r"104, about 101.\d+ GiB each, [\d,]+.\d GiB written over the run, .*, the newest 5 kept", row(text, "checkpoints")
    )
    text = plan("ledom_7b", 64, "checkpoint.keep_last=null", "checkpoint.mirror=s3://bucket/run")
    assert row(text, "checkpoints").endswith(", all kept")
    assert re.fullmatch(r"s3://bucket/run, the newest 3, about 40\d.\d GiB at most", row(text, "mirror"))
    assert re.search(r"(?m)^# disk: .*; the run writes 10.\d TiB in all", text)


def test_2b_prints_the_published_numbers() -> None:
    text = plan("ledom_2b", 64)
    assert row(text, "parameters").startswith("2.245 B")
    assert row(text, "micro-batches") == "16 an iteration"
    assert row(text, "heads x width") == "8 x 256, 1 key-value heads"


def test_dry_run_begins_with_the_resolved_run(tmp_path: Path) -> None:
    yaml = plan("ledom_7b", 64, "train.seed=7").split("\n\nmodel\n")[0]
    (tmp_path / "resolved.yaml").write_text(yaml, encoding="utf-8")
    assert load_config(str(tmp_path / "resolved.yaml")) == load_config(str(CONFIGS / "ledom_7b.yaml"), ["train.seed=7"])


def test_manifests_give_vocabulary_tokens_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "a", num_tokens=614_400)
    size = ["data.seq_length=256", "train.global_batch_size=16", "train.train_iters=300"]
    text = plan("quickstart_reverse", 1, "data.train_blend=[[3,a],[1,b]]", "data.valid_blend=[]", *size)
    assert row(text, "padded vocabulary") == "512 rows for 500 ids"
    assert row(text, "a").split() == ["614,400", "3", "75.00%", "921,600", "1.5000", "3,600"]
    assert row(text, "b").split() == ["no", "shard", "yet", "1", "25.00%", "307,200", "1,200"]
    assert "shards that would repeat: 1, most often a; this needs data.allow_repeats=true" in text
    assert row(text, "validations").startswith("none: ")


def test_dry_run_without_vocabulary_or_data_names_the_unknowns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = plan("quickstart_reverse", 1, "data.train_blend=[]")
    assert "set model.vocab_size" in row(text, "vocabulary")
    assert "none: data.train_blend is empty" in text


def test_dry_run_plans_the_configured_hardware() -> None:
    text = plan("ledom_7b", 64)
    assert row(text, "hardware") == "A100-SXM 80 GB"
    assert row(text, "memory a device").startswith("49.8 of 79.1 GiB on stage 0: state 23.1, activations 23.2")
    assert row(text, "seconds an iteration").startswith("33.6")
    assert "does not fit" in row(plan("ledom_7b", 64, "parallel.hardware=a100-40"), "memory a device")
    assert row(plan("quickstart_reverse", 1), "hardware").startswith("not set: set parallel.hardware")
    with pytest.raises(ConfigError, match="hardware a100 is not known"):
        plan("ledom_7b", 64, "parallel.hardware=a100")


def test_verdicts_are_at_the_top() -> None:
    memory, disk = plan("ledom_7b", 64, "parallel.hardware=a100-40").splitlines()[:2]
    assert re.match(r"# memory: NO: \d+\.\d of 39\.4 GiB a device of A100-SXM 40 GB on stage 0", memory)
    assert disk.startswith("# disk: 6 more checkpoints of 101.6 GiB at one time (checkpoint.keep_last=5) need 609.7 GiB, ")
    assert plan("quickstart_reverse", 1).startswith("# memory: not planned: parallel.hardware is not set\n")


def test_a_dry_run_whose_plan_does_not_fit_ends_with_1() -> None:
    options = ["--config", str(CONFIGS / "ledom_7b.yaml"), "--dry-run", "parallel.hardware=a100-40"]
    command = ["-m", "megatron_ledom.pretrain", *options]
    done = run_forked(command)
    assert done.returncode == 1
    assert "error: memory: NO: " in done.stderr
    assert "or accept the plan with --accept-plan" in done.stderr
    assert "\nmodel\n" in done.stdout  # the whole text is printed first
    assert run_forked([*command, "--accept-plan"]).returncode == 0


@pytest.mark.parametrize(
    "where", ["data.train_blend=[[1,a],[1,b]]", "data.valid_blend=[[1,b]]", "data.valid_sets={x: [[1,b]]}"]
)
def test_a_dry_run_refuses_shards_of_the_other_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "a", 614_400)
    write_manifest(tmp_path / "b", 614_400, direction=Direction.FORWARD)
    settings = ["data.train_blend=[[1,a]]", "data.valid_blend=[]", where]
    with pytest.raises(MismatchError, match=r"the shard b is forward, the run has data.direction=reverse"):
        plan("quickstart_reverse", 1, *settings)
    with pytest.raises(MismatchError, match=r"the shard b is forward, the run has data.direction=reverse"):
        plan("quickstart_reverse", 1, "data.train_blend=[[1,b]]", "data.valid_blend=[]")


def test_a_dry_run_refuses_shards_of_another_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "a", 614_400)
    with pytest.raises(MismatchError, match=r"model.vocab_size=300, but the shard a has a vocabulary of 500"):
        plan("quickstart_reverse", 1, "data.train_blend=[[1,a]]", "data.valid_blend=[]", "model.vocab_size=300")


@pytest.mark.parametrize(
    ("settings", "there", "count"),
    [
        ([], [], 4),  # 30, 60, 90, 100
        ([], [30, 60], 2),
        (["checkpoint.keep_last=2"], [], 3),
        (["checkpoint.keep_last=2"], [30, 60], 1),
        (["checkpoint.keep_last=2", "checkpoint.mirror=s3://bucket/run"], [], 4),  # one is held while it is copied
        (["checkpoint.keep_last=1", "checkpoint.keep_interval=30"], [], 4),
        (["checkpoint.keep_last=1", "checkpoint.keep_interval=60"], [], 3),
    ],
)
def test_checkpoints_to_come(settings: list[str], there: list[int], count: int) -> None:
    size = ["train.train_iters=100", "checkpoint.save_interval=30", "optimizer.lr_warmup_iters=1"]
    config = load_config(str(CONFIGS / "quickstart_reverse.yaml"), [*size, *settings])
    assert checkpoints_to_come(config, there) == count


def test_layout_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="64, but 2 ranks"):
        plan("ledom_7b", 2)


@pytest.mark.parametrize("copies", [1, 4])
def test_state_of_a_rank_by_hand(copies: int) -> None:
    settings = ["parallel.use_distributed_optimizer=true", "model.vocab_size=512", "train.micro_batch_size=1"]
    text = plan("quickstart_reverse", copies, *settings)
    parameters = int(row(text, "parameters").split("(")[1].rstrip(")").replace(",", ""))
    assert row(text, "model state a rank").split()[1] == f"{parameters * (6 + 12 / copies) / 2**30:.2f}"


def test_dry_run_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_ledom.config.load import load_config;"
        "from megatron_ledom.planning.dry_run import dry_run;"
        f"dry_run(load_config({str(CONFIGS / 'ledom_7b.yaml')!r}), 64);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
