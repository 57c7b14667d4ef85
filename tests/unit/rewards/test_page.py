"""The Python of docs/how_to/rewards_for_trainers.md runs, and its functions agree."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.reward_server import RewardServer

PAGE = (ROOT / "docs/how_to/rewards_for_trainers.md").read_text(encoding="utf-8")


def test_the_examples_run(
    folders: tuple[Path, Path],
    server: RewardServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "models").mkdir()
    for name, folder in zip(("forward", "reverse"), folders, strict=True):
        (tmp_path / "models" / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example.replace("http://localhost:8000", server.url), "rewards_for_trainers.md", "exec"), names)
    assert server.requests[0]["forward_normalization"] == "token"
    prompt, answer = "What is 6 times 7?\n", "It is 42."
    expected = names["function"]([prompt], [answer])
    by_verl = names["compute_score"]("x", answer, "42", {"question": "What is 6 times 7?"})
    by_openrlhf = names["reward_func"]([prompt + answer + "</s>"], [prompt], ["42"])["rewards"].tolist()
    by_trl = names["reward"](prompts=[prompt], completions=[answer])
    assert [by_verl] == pytest.approx(expected, abs=1e-5)
    assert by_openrlhf == pytest.approx(expected, abs=1e-5)
    assert by_trl == pytest.approx(expected, abs=1e-5)
    first, _, last = capsys.readouterr().out.partition("\n")
    assert float(first.strip("[]")) == pytest.approx(expected[0], abs=1e-5)
    assert last.count("[") >= 4
