"""ledom plan-blend: the table of a blend and its config lines; repeats must be allowed."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.plan import BlendSettings, check_repeats, describe, parse_tokens, plan_blend, to_yaml
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError
from tests.support.forked import run_forked
from tests.support.legible import legible_ids, legible_provenance, legible_shard
from tests.support.paths import ROOT

ORIGINAL = {  # tokens drawn, fraction of the file (the published run)
    "data/dclm_01": (259_833_174_808, 0.9),
    "data/dclm_02": (24_327_029_000, 0.1),
    "data/math_exam": (51_337_646_588, 1.0),
    "data/math_paper": (37_370_709_647, 1.0),
    "data/math_cc": (14_259_302_578, 1.0),
    "data/code_000": (21_951_239_040, 0.5),
    "data/code_002": (26_294_804_192, 0.6),
}
SIZES = [f"{name}={round(drawn / share)}" for name, (drawn, share) in ORIGINAL.items()]
DRAWN = [str(drawn) for drawn, _ in ORIGINAL.values()]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([ROOT / "tools/plan_blend.py", *arguments])


def plan(*inputs: str, **settings: object) -> list[tuple[str, float, float]]:
    """Return (name, tokens drawn, epochs) of each source."""
    made = plan_blend(BlendSettings(input=list(inputs), **settings))  # type: ignore[arg-type]
    check_repeats(made)
    return [(source.name, round(source.drawn), round(source.epochs, 4)) for source in made.sources]


def test_the_blend_of_the_original_run_is_reproduced() -> None:
    options = ["--seq-length", "8192", "--global-batch-size", "1024"]
    done = run("--input", *SIZES, "--tokens-per-source", *DRAWN, *options)
    assert done.returncode == 0, done.stderr
    table, _, lines = done.stdout.partition("\n\n")
    assert sum(map(int, DRAWN)) == 435_373_905_853
    assert "435,368,755,200" in table  # 51,900 whole iterations
    epochs = {row.split()[0]: float(row.split()[5]) for row in table.splitlines()[1:-1]}
    assert epochs == pytest.approx({name: share for name, (_, share) in ORIGINAL.items()}, abs=1e-4)
    config = yaml.safe_load(lines)
    ours = load_config(str(ROOT / "examples/configs/ledom_7b.yaml"), [])
    assert config["train"] == {"train_iters": 51_900, "global_batch_size": 1024}
    assert config["train"]["train_iters"] == ours.train.train_iters
    assert config["data"]["seq_length"] == ours.data.seq_length
    assert [tuple(entry) for entry in config["data"]["train_blend"]] == [tuple(entry) for entry in ours.data.train_blend]
    assert [prefix for _, prefix in config["data"]["train_blend"]] == list(ORIGINAL)


def test_a_source_that_would_repeat_is_refused_with_the_largest_possible_run() -> None:
    done = run("--input", "web=900B", "math=10B", "--weights", "0.9", "0.1", "--tokens", "200B")
    assert done.returncode == 1
    assert done.stdout.splitlines()[2].split() == ["math", "10,000,000,000", "0.1", "10.00%", "20,000,000,000", "2.0000"]
    assert "read more than once: math (2.0000 times); these weights allow at most 100,000,000,000 tokens" in done.stderr
    assert "train_blend" not in done.stdout
    done = run("--input", "web=900B", "math=10B", "--weights", "0.9", "0.1", "--tokens", "200B", "--allow-repeats")
    assert done.returncode == 0
    assert "  allow_repeats: true\n  train_blend:\n    - [0.9, web]\n    - [0.1, math]\n" in done.stdout


def test_weights_shares_and_whole_sources() -> None:
    assert plan("a=100", "b=300", tokens="100") == [("a", 25, 0.25), ("b", 75, 0.25)]
    assert plan("a=100", "b=300", tokens="100", weights=[3, 1]) == [("a", 75, 0.75), ("b", 25, 0.0833)]
    assert plan("a=100", "b=300", tokens_per_source=["50", "300"]) == [("a", 50, 0.5), ("b", 300, 1.0)]
    assert plan("a=100", "b=300", tokens="200", tokens_per_source=["50", "50"]) == [("a", 100, 1.0), ("b", 100, 0.3333)]
    assert plan("a=3", "b=7", "c=11", tokens="21")[0] == ("a", 3, 1.0)


def test_samples_decide_if_they_are_known() -> None:
    """As at the start of a run: 100 tokens give 12 samples of 8, because each needs the token after it."""
    assert plan("a=100", tokens="96", seq_length=8, global_batch_size=4) == [("a", 96, 0.96)]
    with pytest.raises(VerificationError, match=r"a \(1.0000 times\)"):
        plan("a=96", tokens="96", seq_length=8, global_batch_size=4)
    made = plan_blend(BlendSettings(input=["a=1000"], tokens="127", seq_length=8, global_batch_size=4))
    assert (made.train_iters, made.tokens, made.sources[0].samples) == (3, 96, 12)


def test_shards_are_measured_by_their_manifests(tmp_path: Path) -> None:
    a = legible_shard(tmp_path / "a", [legible_ids(0, 9)])
    legible_shard(tmp_path / "x-00000-of-00002", [legible_ids(1, 19)])
    with pytest.raises(DataError, match="missing: 1"):
        plan(str(tmp_path / "x-*"), tokens="5")
    legible_shard(tmp_path / "x-00001-of-00002", [legible_ids(2, 69)])
    found = plan(a, str(tmp_path / "x-*"), tokens="50")
    assert [(Path(name).name, drawn) for name, drawn, _ in found] == [
        ("a", 5),
        ("x-00000-of-00002", 10),
        ("x-00001-of-00002", 35),
    ]
    forward = legible_shard(tmp_path / "f", [legible_ids(3, 9)], legible_provenance(Direction.FORWARD))
    with pytest.raises(MismatchError, match=r"is forward, the shard .*a is reverse"):
        plan(a, forward, tokens="5")
    two_way = legible_shard(tmp_path / "marked", [legible_ids(3, 9)])
    path = Path(f"{two_way}.json")
    reading = {"direction": "forward", "reading": {"unit": "token", "marker_id": 5}, "format_version": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), **reading}))
    assert [drawn for _, drawn, _ in plan(a, two_way, tokens="4")] == [2, 2]
    made = plan_blend(BlendSettings(input=[a, two_way, "later=10"], tokens="4"))
    rows = [row.split()[1:3] for row in describe(made).splitlines()]
    assert rows[:3] == [["direction", "tokens"], ["reverse", "10"], ["forward", "10"]]
    assert rows[3:] == [["not", "known"], ["30", "100.00%"]]
    lines = yaml.safe_load(to_yaml(made))["data"]
    assert (lines["direction"], [entry[2:] for entry in lines["train_blend"]]) == ("both", [["reverse"], ["forward"], []])
    assert "direction" not in to_yaml(plan_blend(BlendSettings(input=[a], tokens="4")))
    odd = legible_shard(tmp_path / "lr=2", [legible_ids(3, 9)])
    assert plan(odd, tokens="5") == [(odd, 5, 0.5)]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("435.37B", 435_370_000_000), ("1e12", 10**12), ("435,373,905,853", 435_373_905_853), ("1.5t", 1_500_000_000_000)],
)
def test_budgets_are_read_exactly(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--tokens") == tokens


@pytest.mark.parametrize("text", ["", "B", "-3", "0", "1.5", "many", "nan", "inf", "3Q"])
def test_a_text_that_is_not_a_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a number of tokens; write 435.37B"):
        parse_tokens(text, "--tokens")


def test_the_lines_are_yaml_with_any_weight_and_prefix() -> None:
    settings = BlendSettings(input=["data/it's: new=100", "1e5=100"], tokens="10", weights=[1e-7, 1.5e-7])
    made = plan_blend(settings)
    assert yaml.safe_load(to_yaml(made))["data"]["train_blend"] == [[1e-7, "data/it's: new"], [1.5e-7, "1e5"]]
    assert "1e-07" in describe(made)


def test_wrong_usage_is_refused() -> None:
    done = run("--input", "a=100")
    assert done.returncode == 2
    assert "--tokens is missing" in done.stderr
    for words, settings in {
        "has 1 numbers for 2 sources": {"weights": [1.0]},
        "must all be above 0": {"weights": [1.0, 0.0]},
        "give both or neither": {"seq_length": 8},
        "less than one iteration": {"seq_length": 8, "global_batch_size": 4},
        "must be 1 or more": {"seq_length": 0, "global_batch_size": 4},
    }.items():
        with pytest.raises(UsageError, match=words):
            plan("a=100", "b=100", tokens="10", **settings)
    with pytest.raises(UsageError, match="a is named more than once"):
        plan("a=100", "a=200", tokens="10")
    with pytest.raises(UsageError, match="there is no shard nowhere"):
        plan("nowhere", tokens="10")
