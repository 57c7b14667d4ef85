"""A report first notes the weight of its files and the lambda it chose, with the accuracy of both."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tool_runs import run_tool


def question(number: int, forward_of_right: float) -> dict[str, Any]:
    """Return a line whose right answer the reverse model prefers; at weight 0.5 it is first unless the forward model prefers the other."""
    scores = [
        {"forward_logprob": f, "reverse_logprob": r, "forward_tokens": 5, "reverse_tokens": 5, "reward": (f + r) / 2}
        for f, r in ((forward_of_right, -1.0), (-2.0, -2.0))
    ]
    ranking = [0, 1] if scores[0]["reward"] > scores[1]["reward"] else [1, 0]
    texts = ["It is 7.", "It is 3."]
    record = {"prompt": f"Question {number}: ", "gold": "7", "candidates": texts, "scores": scores, "ranking": ranking}
    return {**record, "best": texts[ranking[0]]}


def printed_report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = [folder / "x.jsonl", "--output", folder / "report", "--gold-key", "gold"]
    assert run_tool(monkeypatch, "report_rerank", *arguments) == 0
    return capsys.readouterr().out


def test_the_weight_of_the_file_and_the_chosen_lambda_are_noted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At weight 0.5 the file's ranking is right for 5 of 20; from lambda 0.9 on it is right for all."""
    lines = [question(number, -2.0 if number < 5 else -10.0) for number in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = "Reverse Reward in this report uses the lambda chosen on held-out questions, 0.95 (100.0 % right)."
    assert "ranked at weight" not in printed_report(tmp_path, monkeypatch, capsys)  # the weight is not recorded
    for weight, own in ((0.5, "0.5 (25.0 % right)"), (0.33, "0.33 (25.0 % right at 0.35, the nearest that was tried)")):
        notes = {"made_by": {"settings": {"reward": {"weight": weight}}}}
        (tmp_path / "x.jsonl.spent.json").write_text(json.dumps(notes))
        note = f"Note: The files were ranked at weight {own}; {told}"
        assert note in printed_report(tmp_path, monkeypatch, capsys)
        assert note in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
        assert note in json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["notes"][0]
