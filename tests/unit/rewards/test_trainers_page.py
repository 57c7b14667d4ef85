"""The Python and the commands of docs/how_to/rewards_for_trainers.md run, and its functions agree."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli.main import run
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


def test_the_command_runs(made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("answers.jsonl", "answers_seed1.jsonl")):
        line = json.loads(Path(made["ranked"]).read_text(encoding="utf-8").splitlines()[0])
        line["scores"][1]["reward"] = -5.0 - number
        Path(name).write_text(json.dumps(line) + "\n", encoding="utf-8")
    [command] = [line for line in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if line.startswith("ledom export")]
    assert not run(shlex.split(command)[1:])
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in rows] == [(-1.0, -5.0), (-1.0, -6.0)]
