"""A reverse model as a teacher: the two tasks, their measures, and the section of known answers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.study.programs import run_python

SETUP = """
import json
from pathlib import Path
from losses import Twins
from settings import load_settings
from teacher import ARMS, MEASURES, Teacher
from teacher_report import teacher_section
changes = ["teacher.seeds=[1,2,3]", "teacher.tasks=[star,siblings]", "teacher.num.test=40", "teacher.star.nodes=12"]
teacher = Teacher(Twins(Path("study"), load_settings("tiny", changes)))
"""


@pytest.mark.parametrize(("degree", "length", "nodes"), [(2, 3, 5), (2, 5, 16), (4, 3, 9), (3, 4, 20)])
def test_a_star_has_arms_of_one_length_and_one_of_them_is_the_answer(
    tmp_path: Path, degree: int, length: int, nodes: int
) -> None:
    code = f"""
import json
from random import Random
from plan_tasks import Star, begins_an_arm
star, random_ = Star(degree={degree}, length={length}, nodes={nodes}), Random(1)
drawn = [star.draw(random_) for _ in range(60)]
wrong = [(p, " ".join([a.split()[0], *reversed(a.split()[1:])])) for p, a in drawn]
wrong += [(p, a.split(" ", 1)[1]) for p, a in drawn] + [(p, a.split()[0]) for p, a in drawn] + [(p, "") for p, a in drawn]
print(json.dumps([drawn, star.num_tokens, star.words, [begins_an_arm(*pair) for pair in drawn], [begins_an_arm(*pair) for pair in wrong]]))
"""
    drawn, num_tokens, words, right, wrong = json.loads(run_python(code, tmp_path))
    assert all(right)
    assert not any(wrong)
    places = set()
    for prompt, answer in drawn:
        text = f"{prompt} {answer}".split()
        assert len(text) + 1 == num_tokens
        assert set(text) <= set(words)
        graph, centre, goal = prompt.split(" / ")[0], *prompt.split(" / ")[1].split()[:2]
        edges = [tuple(edge.split()) for edge in graph.split(" | ")]
        after = {one: other for one, other in edges if one != centre}
        arms = []
        for _, first in (edge for edge in edges if edge[0] == centre):
            arm = [centre, first]
            while arm[-1] in after:
                arm.append(after[arm[-1]])
            arms.append(arm)
        assert [len(arm) for arm in arms] == [length] * degree
        assert len({node for arm in arms for node in arm}) == 1 + degree * (length - 1)
        assert [arm for arm in arms if arm[-1] == goal] == [answer.split()]
        places.add(edges.index((centre, answer.split()[1])))
    assert len(places) > degree  # the answer's edge is at no fixed place


def test_no_edges_of_a_star_of_the_test_part_are_trained_on(tmp_path: Path) -> None:
    """Of five names there are 60 stars of two arms with three nodes, so 400 draws meet those of the test part."""
    code = (
        SETUP
        + """
from plan_tasks import Siblings, Star, edges_of, write_tasks
from random import Random
star = Star(degree=2, length=3, nodes=5)
drawn = [star.draw(Random(seed))[0] for seed in range(400)]
found = write_tasks(teacher.folder, star, Siblings(parents=2, children=3), {"test": 8, "train": 400}, 1)["star"]
test, train = ({edges_of(record["prompt"]) for record in found[part]} for part in ("test", "train"))
print(len(set(map(edges_of, drawn))), bool(test), bool(train), len(test & train))
"""
    )
    assert run_python(code, tmp_path) == "60 True True 0\n"


def test_half_of_the_sibling_pairs_are_trained_on_and_only_new_right_answers_count(tmp_path: Path) -> None:
    code = """
import json
from plan_tasks import Siblings, is_coherent, new_answers
one = Siblings(parents=3, children=4)
families, (trained, others) = one.families(7), one.answers(7)
stranger = next(child for child in families if families[child] != others[0].split()[2])
first, second, parent = others[0].split()
written = [others[0], others[0], trained[0], others[1], f"{first} {stranger} {parent}", f"{first} {first} {parent}", first, "", "= | 3"]
print(json.dumps([families, trained, others, list(new_answers(written, families, set(trained))), one.answers(8)[0]]))
"""
    families, trained, others, new, of_another_seed = json.loads(run_python(code, tmp_path))
    assert new == [True, False, False, True, False, False, False, False, False]
    assert trained != of_another_seed
    every = trained + others
    assert len(trained) == len(others) == 3 * 4 * 3 // 2
    assert len(set(every)) == len(every)
    for answer in every:
        one, other, parent = answer.split()
        assert one != other
        assert families[one] == families[other] == parent
    assert sorted(families, key=int) == list(map(str, range(12)))
    assert {family: list(families.values()).count(family) for family in ("P0", "P1", "P2")} == dict.fromkeys(
        ("P0", "P1", "P2"), 4
    )
    by_number = [families[str(child)] for child in range(12)]
    assert sum(one != other for one, other in pairwise(by_number)) > 2  # a child's number does not tell its parent


def test_a_word_is_a_token_and_no_star_of_the_test_part_is_trained_on(tmp_path: Path) -> None:
    code = (
        SETUP
        + """
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
step = teacher._texts()
step.work()
assert all(path.exists() for path in step.outputs)
for task in ("star", "siblings"):
    records = [json.loads(line) for line in teacher._file(task, "train").open()]
    tokenizer = load_tokenizer(str(teacher.folder / task / "tokenizer"))
    for record in records[:50]:
        ids = tokenizer.encode_batch([record["text"]])[0].tolist()
        assert len(ids) == len(record["text"].split()) == teacher.sizes[task].num_tokens - 1
        assert not {1} & set(ids)  # the id of an unknown word
        assert record["text"] == f"{record['prompt']} {record['answer']}"
    test = {json.loads(line)["prompt"] for line in teacher._file(task, "test").open()}
    print(task, len(test), len(test & {record["prompt"] for record in records}))
"""
    )
    assert run_python(code, tmp_path) == "star 40 0\nsiblings 1 1\n"


def _told(folder: Path, shares: dict[str, list[int]]) -> tuple[dict[str, Any], str, str]:
    """Return results, paragraphs and tables if an arm answers that many of 40 stars rightly, by seed; no sibling answer is right."""
    code = (
        SETUP
        + f"""
shares = {shares!r}
teacher._texts().work()
"""
        + """
test = [json.loads(line) for line in teacher._file("star", "test").open()]
for task in ("star", "siblings"):
    for place, seed in enumerate((1, 2, 3)):
        path = teacher.answers(task, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for arm in ARMS:
                run = teacher.run_of(task, arm, seed)
                run.mkdir(parents=True)
                (run / "metrics.jsonl").write_text(json.dumps({"tokens_per_second": 5000.0, "mfu": 0.5}) + "\\n")
                for number, record in enumerate(test):
                    answer = record["answer"] if task == "star" and number < shares[arm][place] else record["prompt"].split()[0]
                    prompt = record["prompt"] if task == "star" else "siblings"
                    file.write(json.dumps({"model": arm, "prompt": prompt, "answer": answer}) + "\\n")
found = teacher.results()
section = teacher_section(found)
print(json.dumps([found, " ".join(section.paragraphs), json.dumps(section.tables)]))
"""
    )
    found, paragraphs, tables = json.loads(run_python(code, folder))
    return found, paragraphs, tables


def test_the_section_agrees_with_known_answers(tmp_path: Path) -> None:
    shares = {
        "plain": [20, 21, 20],
        "multi-token": [20, 20, 20],
        "reverse teacher": [40, 39, 40],
        "random teacher": [20, 20, 21],
    }
    found, paragraphs, tables = _told(tmp_path, shares)
    row = found["comparisons"]["star|reverse teacher - plain"]
    assert row["by_seed"] == pytest.approx([0.5, 0.45, 0.5])
    assert row["is_significant"]
    assert found["comparisons"]["siblings|reverse teacher - plain"]["mean"] == 0
    assert "Path-star, right path: 50.8 % plain, 99.2 % with the reverse teacher" in paragraphs
    assert "The teacher helps, and more than one of random weights; against multi-token prediction it helps more." in paragraphs
    assert "Sibling discovery, new and right: 0.0 % plain" in paragraphs
    assert "No effect of the teacher is shown" in paragraphs
    budget = found["budget"]
    assert (
        budget["star|plain"]["teacher"]
        == 0
        < budget["star|random teacher"]["teacher"]
        < budget["star|reverse teacher"]["teacher"]
    )
    assert budget["star|plain"]["own"] < budget["star|reverse teacher"]["own"] < budget["star|multi-token"]["own"]
    assert '"path-star", "reverse teacher - plain", "+48.3"' in tables


@pytest.mark.parametrize(
    ("taught", "random", "sentence"),
    [
        ([40, 39, 40], [40, 39, 40], "no more than one of random weights is shown to"),
        ([2, 3, 2], [20, 20, 20], "The teacher harms here."),
        ([20, 30, 21], [20, 20, 20], "No effect of the teacher is shown"),
    ],
)
def test_a_teacher_that_does_not_help_or_helps_for_another_reason_is_reported(
    tmp_path: Path, taught: list[int], random: list[int], sentence: str
) -> None:
    shares = {"plain": [20, 21, 20], "multi-token": [20, 20, 20], "reverse teacher": taught, "random teacher": random}
    assert sentence in _told(tmp_path, shares)[1]


def test_a_missing_answer_means_that_the_part_was_not_run(tmp_path: Path) -> None:
    assert "Not run" in run_python(SETUP + "print(*teacher_section(teacher.results()).paragraphs)", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.tasks=[maze]", "teacher.tasks is ['maze']; it must name some of star, siblings"),
        ("teacher.star.nodes=4", "it needs at least 2 arms of 3 nodes, and 5 names for these arms"),
        ("teacher.siblings.children=2", "at least 2 parents and 3 children of each"),
        ("teacher.num.test=1", "with at least 2 texts each"),
    ],
)
def test_bad_sizes_are_refused(tmp_path: Path, change: str, message: str) -> None:
    code = f"""
from settings import load_settings
from megatron_ledom.errors import UsageError
try:
    load_settings("tiny", [{change!r}])
except UsageError as error:
    print(error)
"""
    assert message in run_python(code, tmp_path)
