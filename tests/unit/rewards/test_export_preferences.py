"""`ledom export-preferences`: which answers are pairs, both file formats, resuming, and refused input."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from pyarrow import parquet

from megatron_ledom.rewards.preferences import PreferenceSettings, export_preferences
from tests.support.tool_runs import run_tool


def ranked_line(prompt: str, rewards: dict[str, float | None], **fields: Any) -> dict[str, Any]:
    """Return a line of a ranked file; a reward of -inf is written as the ranking writes it, None is that of an empty answer."""
    names = ("forward_logprob", "reverse_logprob", "forward_tokens", "reverse_tokens")
    scores = []
    for reward in rewards.values():
        is_infinite = reward == -float("inf")
        infinite = {"minus_infinity": ["reward"]} if is_infinite else {}
        scores.append({**dict.fromkeys(names, 1), "reward": None if is_infinite else reward, **infinite})
    order = sorted(range(len(rewards)), key=lambda i: -(list(rewards.values())[i] or -99))
    return {"prompt": prompt, "candidates": list(rewards), "scores": scores, "ranking": order, "best": None, **fields}


LINES = [
    ranked_line("Six times seven?\n", {"40": -3.0, "42": -1.0, "": None, "41": -2.5, "no": -float("inf")}),
    ranked_line("Café or 漢字?\n", {"café\u2028": -1.0, "漢字": -1.5}),
    ranked_line("One answer?\n", {"yes": -1.0, "": None}),
    ranked_line("Equal?\n", {"a": -2.0, "b": -2.0}),
    {"prompt": "Too long\n", "candidates": [], "scores": [], "ranking": [], "best": None, "skipped": "of too many tokens"},
]
CASES = {
    "best-worst": ([], [("42", "no"), ("café\u2028", "漢字")]),
    "best-others": (["--pairs", "best-others"], [("42", "41"), ("42", "40"), ("42", "no"), ("café\u2028", "漢字")]),
    "all": (
        ["--pairs", "all"],
        [("42", "41"), ("42", "40"), ("42", "no"), ("41", "40"), ("41", "no"), ("40", "no"), ("café\u2028", "漢字")],
    ),
    "margin": (
        ["--pairs", "all", "--min-margin", "1.5"],
        [("42", "41"), ("42", "40"), ("42", "no"), ("41", "no"), ("40", "no")],
    ),
    "largest": (["--pairs", "best-others", "--max-pairs", "2"], [("42", "40"), ("42", "no"), ("café\u2028", "漢字")]),
}


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES), encoding="utf-8")
    return path


def rows_of(prefix: Path) -> list[dict[str, Any]]:
    """Return the rows of the JSON lines, after checking that datasets reads the same from both files."""
    rows = [json.loads(line) for line in Path(f"{prefix}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    cache = str(prefix.parent / "cache")
    for kind, ending in (("json", "jsonl"), ("parquet", "parquet")):
        assert load_dataset(kind, data_files=f"{prefix}.{ending}", split="train", cache_dir=cache).to_list() == rows
    assert parquet.read_table(f"{prefix}.parquet").to_pylist() == rows
    return rows


@pytest.mark.parametrize("case", CASES)
def test_pairs(case: str, ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = CASES[case]
    assert run_tool(monkeypatch, "export_preferences", ranked, "--output", tmp_path / "out/pairs", *options) == 0
    rows = rows_of(tmp_path / "out/pairs")
    assert [(row["chosen"], row["rejected"]) for row in rows] == expected
    assert list(rows[0]) == ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"]
    assert {row["prompt"] for row in rows} <= {line["prompt"] for line in LINES}
    rewards = {(row["chosen"], row["rejected"]): (row["chosen_reward"], row["rejected_reward"]) for row in rows}
    assert rewards[("42", "no")] == (-1.0, None)


def test_counts_and_notes(ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = export_preferences([ranked], tmp_path / "pairs", PreferenceSettings())
    assert counts == {"num_prompts": 5, "num_pairs": 2, "num_prompts_without_pairs": 3, "num_unscored": 2}
    assert "2 pairs of 5 prompts; prompts without a pair: 3, answers without a reward: 2" in capsys.readouterr().err
    notes = json.loads((tmp_path / "pairs.json").read_text())
    assert notes["counts"] == counts
    assert notes["made_by"]["settings"]["pairs"] == "best-worst"
    assert not [*tmp_path.glob("*.part"), *tmp_path.glob("*.lock")]


def test_messages(ranked: Path, tmp_path: Path) -> None:
    export_preferences([ranked], tmp_path / "pairs", PreferenceSettings(conversational=True))
    row = rows_of(tmp_path / "pairs")[0]
    assert row["prompt"] == [{"role": "user", "content": "Six times seven?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "42"}]
    assert row["rejected"] == [{"role": "assistant", "content": "no"}]


def test_an_output_of_a_ranking_command_is_accepted(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["--forward", made["forward"], "--reverse", made["reverse"], "--input", made["candidates"]]
    assert run_tool(monkeypatch, "rerank", *models, "--output", tmp_path / "ranked.jsonl") == 0
    assert run_tool(monkeypatch, "export_preferences", tmp_path / "ranked.jsonl", "--output", tmp_path / "pairs") == 0
    ranked = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    for row, line in zip(rows_of(tmp_path / "pairs"), ranked, strict=True):
        assert row["chosen"] == line["best"]
        assert row["chosen_reward"] == max(score["reward"] for score in line["scores"])


def test_the_same_command_again_does_nothing_and_another_is_refused(
    ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [ranked, "--output", tmp_path / "pairs"]
    assert run_tool(monkeypatch, "export_preferences", *command) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("pairs.*")}
    assert len(before) == 3
    assert run_tool(monkeypatch, "export_preferences", *command) == 0
    assert "are complete; nothing to do" in capsys.readouterr().err
    assert run_tool(monkeypatch, "export_preferences", *command, "--pairs", "all") == 2
    assert "settings.pairs was 'best-worst' and is 'all'" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("pairs.*")} == before
    assert run_tool(monkeypatch, "export_preferences", *command, "--pairs", "all", "--overwrite") == 0
    assert len(rows_of(tmp_path / "pairs")) == 7
    with ranked.open("a") as file:
        file.write(json.dumps(LINES[0]) + "\n")
    assert run_tool(monkeypatch, "export_preferences", *command, "--pairs", "all") == 2
    assert "the input" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text("changed\n")
    assert run_tool(monkeypatch, "export_preferences", *command, "--pairs", "all", "--overwrite") == 0


@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_killed_command_starts_again(
    published: int, ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill after so many of the two files got their names; the unfinished notes contain the request."""
    export_preferences([ranked], tmp_path / "pairs", PreferenceSettings())
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")}
    os.rename(tmp_path / "pairs.json", tmp_path / "pairs.json.part")
    for ending in ("parquet", "jsonl")[: 2 - published]:
        (tmp_path / f"pairs.{ending}").unlink()
    export_preferences([ranked], tmp_path / "pairs", PreferenceSettings())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")} == expected
    assert "nothing to do" not in capsys.readouterr().err


def test_unfinished_work_of_another_request_is_refused(
    ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_preferences([ranked], tmp_path / "pairs", PreferenceSettings())
    os.rename(tmp_path / "pairs.json", tmp_path / "pairs.json.part")
    assert run_tool(monkeypatch, "export_preferences", ranked, "--output", tmp_path / "pairs", "--pairs", "all") == 2
    assert "different settings" in capsys.readouterr().err
    (tmp_path / "pairs.json.part").unlink()
    assert run_tool(monkeypatch, "export_preferences", ranked, "--output", tmp_path / "pairs") == 2
    assert "but no pairs.json records how it was made; pass --overwrite" in capsys.readouterr().err


def test_a_failed_replacement_leaves_the_old_output_complete(
    ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [ranked, "--output", tmp_path / "pairs"]
    assert run_tool(monkeypatch, "export_preferences", *command) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("pairs.*")}
    (tmp_path / "bad.jsonl").write_text(json.dumps(LINES[0]) + "\n{}\n")
    bad = [tmp_path / "bad.jsonl", "--output", tmp_path / "pairs", "--overwrite"]
    assert run_tool(monkeypatch, "export_preferences", *bad) == 1
    assert {path: path.read_bytes() for path in tmp_path.glob("pairs.*")} == before
    assert run_tool(monkeypatch, "export_preferences", *command) == 0
    assert "are complete; nothing to do" in capsys.readouterr().err


def test_an_output_whose_replacement_was_interrupted_is_written_again(
    ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("pairs", "best-worst"), ("other", "all")):
        export_preferences([ranked], tmp_path / name, PreferenceSettings(pairs=kind))
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")}
    (tmp_path / "pairs.parquet").write_bytes((tmp_path / "other.parquet").read_bytes())
    assert run_tool(monkeypatch, "export_preferences", ranked, "--output", tmp_path / "pairs") == 0
    assert "nothing to do" not in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")} == expected


BAD: dict[str, tuple[list[dict[str, Any]], list[str], int, str]] = {
    "no pair": (LINES[2:], [], 1, "no two answers of a prompt differ"),
    "too large a margin": (LINES[1:2], ["--min-margin", "9"], 1, "by a margin of 9 or more"),
    "not ranked": ([{"prompt": "p", "candidates": ["a"]}], [], 1, "bad.jsonl:1: has no scores"),
    "a wrong reward": (
        [{**LINES[1], "scores": [{"reward": "high"}, {"reward": 1}]}],
        [],
        1,
        'bad.jsonl:1: scores[0].reward is "high"',
    ),
    "half of a surrogate pair": (
        [ranked_line("p\n", {"\ud800": -1.0, "b": -2.0})],
        [],
        1,
        "bad.jsonl:1: a text contains half of a surrogate",
    ),
    "a negative margin": (LINES, ["--min-margin", "-1"], 2, "must be a number of at least 0"),
    "a margin that is no number": (LINES, ["--min-margin", "nan"], 2, "must be a number of at least 0"),
    "no pairs at most": (LINES, ["--max-pairs", "0"], 2, "it must be at least 1"),
    "an unknown kind": (LINES, ["--pairs", "some"], 2, "invalid choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, options, code, message = BAD[case]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_tool(monkeypatch, "export_preferences", bad, "--output", tmp_path / "pairs", *options) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_wrong_paths_are_refused(
    ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "export_preferences", tmp_path / "missing", "--output", tmp_path / "pairs") == 2
    assert "is not a file" in capsys.readouterr().err
    assert run_tool(monkeypatch, "export_preferences", ranked, "--output", tmp_path / "ranked") == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert run_tool(monkeypatch, "export_preferences", ranked, ranked, "--output", tmp_path / "pairs") == 2
    assert "name each file once" in capsys.readouterr().err
