"""Prompts: the paper's template in both directions, white space at the edges, and reading written fields."""

import random

import pytest
from tokenizers import Tokenizer

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.tasks.prompts import Field, Template
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from tests.support.tiny_models import byte_level_json

MATHS = Template(
    fields=(
        Field("question", "Question: "),
        Field("chain", "Reasoning: ", " So much for the steps."),
        Field("answer", "Answer: "),
    ),
    num_targets=2,
)
ONE, TWO, THREE = ({"question": f"{n} + {n}?", "chain": f"{n} and {n} make {2 * n}.", "answer": str(2 * n)} for n in (1, 2, 3))


def test_a_forward_prompt() -> None:
    prompt = MATHS.render(Direction.FORWARD, THREE, [ONE, TWO])
    assert prompt.given == (
        "Question: 1 + 1?\nReasoning: 1 and 1 make 2. So much for the steps.\nAnswer: 2\n\n"
        "Question: 2 + 2?\nReasoning: 2 and 2 make 4. So much for the steps.\nAnswer: 4\n\n"
        "Question: 3 + 3?\nReasoning:"
    )
    assert prompt.target == " 3 and 3 make 6. So much for the steps.\nAnswer: 6"
    assert prompt.parts() == (prompt.given, prompt.target)


def test_a_reverse_prompt_has_the_target_first_and_the_few_shot_examples_after_the_query() -> None:
    prompt = MATHS.render(Direction.REVERSE, THREE, [ONE, TWO])
    assert prompt.given == (
        "So much for the steps.\nQuestion: 3 + 3?\n\n"
        "Answer: 4\nReasoning: 2 and 2 make 4. So much for the steps.\nQuestion: 2 + 2?\n\n"
        "Answer: 2\nReasoning: 1 and 1 make 2. So much for the steps.\nQuestion: 1 + 1?"
    )
    assert prompt.target == "Answer: 6\nReasoning: 3 and 3 make 6. "
    assert prompt.parts() == (prompt.target, prompt.given)
    assert prompt.in_text_order().startswith("⟦Answer: 6\nReasoning: 3 and 3 make 6. ⟧So much")


def test_both_models_read_the_same_parts_in_the_same_order() -> None:
    """Single letters mark the blocks and fields. In model order they are equal, and the target comes last."""
    template = Template(fields=(Field("q", "Q"), Field("a", "A")), field_separator=" ", block_separator="/")
    values = [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}, {"q": "5", "a": "6"}]
    forward = template.render(Direction.FORWARD, values[2], values[:2])
    reverse = template.render(Direction.REVERSE, values[2], values[:2])
    assert "".join(forward.parts()) == "Q1 A2/Q3 A4/Q5 A6"
    assert "".join(reverse.parts()) == "A6 Q5/A4 Q3/A2 Q1"
    assert reverse.in_model_order(JointTokenizer(Tokenizer.from_str(byte_level_json()))) == "1|Q| |2|A|/|3|Q| |4|A|/|5|Q| |6|A"


@pytest.mark.parametrize("direction", list(Direction))
def test_white_space_at_the_edge_belongs_to_the_models_text(direction: Direction) -> None:
    prompt = MATHS.render(direction, THREE, [ONE])
    assert prompt.given == prompt.given.strip()
    unknown = MATHS.render(direction, {"question": "3 + 3?"}, [ONE])
    assert (unknown.given, unknown.target) == (prompt.given, "")


@pytest.mark.parametrize("direction", list(Direction))
def test_rendered_fields_are_read_back(direction: Direction) -> None:
    rng = random.Random(2)
    for _ in range(50):
        values = {name: " ".join(rng.choices(["cat", "42", "é", "漢字", "a\nb"], k=rng.randint(1, 4))) for name in THREE}
        written = MATHS.render(direction, values, [ONE]).target
        assert MATHS.read(direction, written) == {"chain": values["chain"], "answer": values["answer"]}
        beyond = "Answer: 9\nReasoning: other.\n\n" + written if direction is Direction.REVERSE else written + "\n\nQuestion: x"
        assert MATHS.read(direction, beyond) == {"chain": values["chain"], "answer": values["answer"]}
    assert MATHS.read(direction, "no label") == {
        "chain": None if direction is Direction.REVERSE else "no label",
        "answer": None,
    }


def test_templates_and_values_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="the fields a, a must have different names"):
        Template(fields=(Field("a"), Field("a", "A")))
    with pytest.raises(UsageError, match="num_targets=2 must be 1 to 1"):
        Template(fields=(Field("a", "A"), Field("b", "B")), num_targets=2)
    with pytest.raises(UsageError, match="'b' has no label"):
        Template(fields=(Field("a"), Field("b", " ")))
    with pytest.raises(UsageError, match="the field 'question' has no value, found answer"):
        MATHS.render(Direction.REVERSE, {"answer": "6"})
