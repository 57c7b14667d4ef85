"""Part 6 of the study: the planted problems, the scores of twins against plain torch, and its report on known results."""

import json
from pathlib import Path

import pytest

from tests.study.handmade_contamination import write_contamination
from tests.study.programs import run_python
from tests.support.forked import run_forked
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

PLANTED = """
import json
from pathlib import Path
from lines import write_lines
from planting import choose, check_search, plant, read_plan
from problems import Level, parts
found = parts([Level(steps=1, largest=9)], {"test": 9, "train": 60}, 1)
for name, problems in found.items():
    write_lines(Path(f"{name}.jsonl"), [problem.as_fields() for problem in problems])
plan = choose(9, range(0, 60, 2), [1, 4], 0.5, 1)
plant(Path("train.jsonl"), Path("test.jsonl"), plan, Path("planted.jsonl"), Path("plan.json"))
assert read_plan(Path("plan.json")) == plan
"""


def test_planted_problems_replace_as_many_ordinary_ones(tmp_path: Path) -> None:
    plan = json.loads(run_python(f"{PLANTED}\nprint(Path('plan.json').read_text())", tmp_path))
    # half of the corpus is read, so twice as many copies as reads; nine problems are three groups of three
    assert [(group["reads"], group["copies"], len(group["problems"])) for group in plan["groups"]] == [
        (0, 0, 3),
        (1, 2, 3),
        (4, 8, 3),
    ]
    assert sorted(number for group in plan["groups"] for number in group["problems"]) == list(range(9))
    assert len(plan["replaced"]) == len(set(plan["replaced"])) == 30
    assert all(place % 2 == 0 for place in plan["replaced"])
    test, train, planted = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("test", "train", "planted"))
    assert len(planted) == len(train)
    assert [number for number, line in enumerate(planted) if line != train[number]] == sorted(plan["replaced"])
    for group in plan["groups"]:
        assert all(planted.count(test[number]) == group["copies"] for number in group["problems"])


def test_a_corpus_with_too_few_problems_is_refused(tmp_path: Path) -> None:
    code = """
from planting import choose
for num, places in ((2, 100), (9, 29)):
    try:
        choose(num, range(places), [1, 4], 0.5, 1)
    except ValueError as error:
        print(error)
"""
    few, many = run_python(code, tmp_path).splitlines()
    assert "needs 3 or more test problems of a level" in few
    assert "and 30 training problems of it; there are 9 and 29" in many


def test_a_search_is_checked_document_by_document(tmp_path: Path) -> None:
    code = """
lines = Path("planted.jsonl").read_text().splitlines(keepends=True)
rest = [line for number, line in enumerate(lines) if number not in plan.replaced]
never, often = plan.groups[0].problems[0], plan.groups[2].problems[0]
missed = Path("test.jsonl").read_text().splitlines(keepends=True)[often]
Path("report.json").write_text(json.dumps({"items": [{"item": never}, {"item": often}]}))
for kept in (rest, [*rest[1:], missed]):
    Path("kept.jsonl").write_text("".join(kept))
    files = [Path(name) for name in ("train.jsonl", "planted.jsonl", "kept.jsonl", "report.json")]
    print(json.dumps(check_search(*files[:2], plan, *files[2:])))
"""
    right, wrong = [json.loads(line) for line in run_python(PLANTED + code, tmp_path).splitlines()]
    counts = {"planted_problems": 6, "planted_documents": 30, "ordinary_documents": 30, "touched_never_planted": 1}
    none = {"missed_problems": 0, "missed_documents": 0, "wrongly_dropped": 0}
    assert right == {**counts, **none, "is_rest": True}
    assert wrong == {**counts, "missed_problems": 1, "missed_documents": 8, "wrongly_dropped": 1, "is_rest": False}


RANKED = [
    {"prompt": "Ann has 7 pens.\n", "answer": "7+5=12\n#### 12", "candidates": ["#### 12", "#### 13", "", "#### 1", "#### 13"]},
    {"prompt": "Ben has 2 cups. ", "answer": "2+2=4\n#### 4", "candidates": ["#### 4", "2+2=4\n#### 4"]},
]


def test_losses_and_scores_are_those_of_plain_torch(tmp_path: Path) -> None:
    """The first question has two different wrong answers beside an empty and a repeated one, the second has none."""
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RANKED))
    for direction in ("forward", "reverse"):
        random_model_folder(tmp_path / direction, "byte_level", direction)
    words = ["--forward=forward", "--reverse=reverse", "--ranked=ranked.jsonl", "--output=found.json"]
    done = run_forked([ROOT / "examples/study/planted_scores.py", *words], folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())["questions"]
    for direction in ("forward", "reverse"):
        texts = [(one["prompt"], one["answer"]) for one in RANKED]
        assert found[f"loss_{direction}"] == pytest.approx([_loss(tmp_path / direction, *text) for text in texts], abs=1e-4)
        assert found[f"right_{direction}"] == pytest.approx([_score(tmp_path / direction, *text) for text in texts], abs=1e-4)
        wrong = [_score(tmp_path / direction, RANKED[0]["prompt"], text) for text in ("#### 13", "#### 1")]
        assert found[f"wrong_{direction}"] == [pytest.approx(sum(wrong) / 2, abs=1e-4), None]


def _logprobs(folder: Path, prompt: str, answer: str) -> tuple[list[float], int]:
    """Return in model order the log-probability of each token but the first, eod last, and the tokens of the answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = AutoTokenizer.from_pretrained(folder)(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"][::-1] if folder.name == "reverse" else found["input_ids"]
    tokens = torch.tensor([*ids, model.generation_config.eos_token_id])
    with torch.no_grad():
        values = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
    in_answer = sum(end > len(prompt) for _, end in found["offset_mapping"])
    return values.gather(1, tokens[1:, None])[:, 0].tolist(), in_answer


def _loss(folder: Path, prompt: str, answer: str) -> float:
    values, _ = _logprobs(folder, prompt, answer)
    return -sum(values) / len(values)


def _score(folder: Path, prompt: str, answer: str) -> float:
    """Return the log-likelihood of the answer for a forward model, of the prompt for a reverse one."""
    values, in_answer = _logprobs(folder, prompt, answer)
    return sum(values[in_answer - 1 : -1] if folder.name == "reverse" else values[-1 - in_answer : -1])


def test_the_report_shows_the_change_of_each_group(tmp_path: Path) -> None:
    write_contamination(tmp_path / "study")
    code = """
from pathlib import Path
from settings import load_settings
from study_report import write_part
print(write_part("contamination", Path("study"), "small", load_settings("small", ["contamination.seeds=[1,2]"]), {}))
"""
    run_python(code, tmp_path)
    measures = json.loads((tmp_path / "study/contamination.json").read_text())["measures"]
    for reads in (0, 1, 4, 16):
        rows = {name: found[str(reads)] for name, found in measures.items()}
        planted = float(reads > 0)
        # lambda is 0.5 or another inner value: the development part's reverse term always finds the right answer
        loss = -0.1 * reads if reads else 0.05
        expected = {"loss_forward": loss, "loss_reverse": loss, "right_reverse": reads, "wrong_reverse": reads / 2}
        expected |= {"margin_reverse": reads / 2, "only_scored": 0.75 * planted, "greedy": 0.0, "sampled": 0.0}
        for name, value in expected.items():
            assert rows[name]["difference"] == pytest.approx(value), (name, reads)
            assert rows[name]["by_seed"] == pytest.approx([value] * 2)
            low, high = rows[name]["interval"]
            assert low - 1e-9 <= value <= high + 1e-9
            assert rows[name]["is_significant"] == (value != 0), (name, reads)
            if reads:
                against = value - (0.05 if name.startswith("loss") else 0)
                assert rows[name]["against_never"]["difference"] == pytest.approx(against)
        assert rows["margin_reverse"]["num"] == (4 if reads == 16 else 5)  # question 3 has no wrong candidate
    text = (tmp_path / "study/contamination.md").read_text()
    assert (
        "| forward loss, nats per token | 16 times | 5 | 2.000 | 0.400 | -1.600 | -1.600 to -1.600 * | -1.600 -1.600 |" in text
    )
    assert "not planted: forward loss, nats per token -1.650 (-1.650 to -1.650) *; reverse loss" in text
    assert "| forward loss, nats per token | +0.050 (+0.050 to +0.050) * | -0.100 (-0.100 to -0.100) * | -0.400" in text
    assert "15 of 15 planted problems and 525 of 525 planted documents are found, and 300 of 3,000 ordinary" in text
    assert text.count("twins trained on it are the clean twins") == 1
