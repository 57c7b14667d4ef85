"""Multiple choice in both directions: the scores to compute, their sums, and the chosen answer."""

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.evaluation.multiple_choice import ScoreRequest, chosen, score_choices, score_requests
from megatron_ledom.evaluation.task_model import LanguageTaskModel
from megatron_ledom.evaluation.tasks.loading import task_named
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask
from megatron_ledom.inference import ForwardLM, ReverseLM
from tests.support.tiny_models import TOKENIZERS, random_model_folder

ARC = Item(values={"question": "What burns?", "answer": "fire"}, choices=("ice", "fire"), gold=1)
SHOT = {"question": "What is cold?", "answer": "ice"}
GAP = Item(values={"before": "The cup fits, for the ", "option": "cup", "after": " is small."}, choices=("cup", "box"), gold=0)
RUNNING = Item(values={"context": "Water freezes to", "ending": "ice"}, choices=("ice", "fire"), gold=0)


def of_first(task: str, direction: Direction, item: Item, *exemplars: dict[str, str]) -> dict[str, ScoreRequest]:
    return {way: requests[0] for way, requests in score_requests(task_named(task), direction, item, exemplars).items()}


def test_the_score_requests_of_a_forward_model() -> None:
    given = "Question: What is cold?\nAnswer: ice\n\nQuestion: What burns?\nAnswer:"
    prior = ("Question: What is cold?\nAnswer: ice\n\nAnswer:", " ice")
    assert of_first("arc_easy", Direction.FORWARD, ARC, SHOT) == {
        "choice_given_context": ScoreRequest((given, " ice")),
        "prior_removed": ScoreRequest((given, " ice"), prior),
    }
    assert of_first("openbookqa", Direction.FORWARD, RUNNING)["prior_removed"] == ScoreRequest(
        ("Water freezes to", " ice"), ("", "ice")
    )


def test_the_score_requests_of_a_reverse_model() -> None:
    exemplar = "Question: What is cold?\nAnswer: ice"
    query = "Question: What burns?\nAnswer:"
    assert of_first("arc_easy", Direction.REVERSE, ARC, SHOT) == {
        "joint": ScoreRequest((f"{query} ice\n\n", exemplar)),
        "context_given_choice": ScoreRequest((query, f" ice\n\n{exemplar}")),
        "prior_removed": ScoreRequest((f"{query} ice\n\n", exemplar), ("Answer: ice\n\n", exemplar)),
        "choice_given_context": ScoreRequest(
            ("Answer: ice\n", "Question: What burns?\n\nAnswer: ice\nQuestion: What is cold?")
        ),
    }
    assert "choice_given_context" not in of_first("openbookqa", Direction.REVERSE, RUNNING)


def test_a_gap_is_scored_by_the_text_that_the_model_reads_after_the_option() -> None:
    forward = of_first("winogrande", Direction.FORWARD, GAP)["choice_given_context"]
    assert forward.pair == ("The cup fits, for the cup", " is small.")
    reverse = of_first("winogrande", Direction.REVERSE, GAP)["context_given_choice"]
    assert reverse.pair == ("The cup fits, for the", " cup is small.")


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_scores_are_those_of_the_model_and_add_up(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """joint = P(c) P(q | c) and prior_removed = joint - prior, with the same ids on both sides of the equation."""
    reverse = ReverseLM.from_pretrained(random_model_folder(tmp_path_factory.mktemp("r") / "m", tokenizer, "reverse"))
    task = LoadedTask(task=task_named("arc_easy"), items=(ARC,))
    scores = score_choices(LanguageTaskModel(reverse, 3), task, [ARC])[0]["scores"]
    context, rest = "Question: What burns?\nAnswer:", " fire"
    text_ids, num_context = reverse.tokenizer.split(context, rest)
    whole = reverse.span_scores([(context + rest, "")], False, 1)[0]
    assert whole.text_ids == text_ids
    assert scores["joint"]["logprob"][1] == pytest.approx(sum(whole.token_logprobs), abs=1e-4)
    alone = reverse.log_likelihood(context, rest)
    assert alone.num_tokens == num_context == scores["context_given_choice"]["tokens"][1]
    assert scores["context_given_choice"]["logprob"][1] == pytest.approx(alone.logprob, abs=1e-4)
    prior = reverse.span_scores([("Answer: fire", "")], False, 1)[0].logprob
    assert scores["prior_removed"]["logprob"][1] == pytest.approx(whole.logprob - prior, abs=1e-4)
    assert scores["prior_removed"]["bytes"][1] == len("Question: What burns?\nAnswer: fire") - len("Answer: fire")


def test_a_forward_models_scores_are_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    forward = ForwardLM.from_pretrained(random_model_folder(tmp_path_factory.mktemp("f") / "m", "byte_level", "forward"))
    task = LoadedTask(task=task_named("arc_easy"), items=(ARC,))
    record = score_choices(LanguageTaskModel(forward, 2), task, [ARC])[0]
    expected = [forward.log_likelihood("Question: What burns?\nAnswer:", f" {choice}").logprob for choice in ARC.choices]
    assert record["scores"]["choice_given_context"]["logprob"] == pytest.approx(expected, abs=1e-4)
    assert record["scores"]["choice_given_context"]["bytes"] == [3, 4]
    assert record["gold"] == 1


def test_normalization_can_change_the_chosen_answer() -> None:
    scores = {"logprob": [-3.0, -4.0, -10.0], "tokens": [1, 2, 4], "bytes": [2, 4, 20]}
    assert [chosen(scores, normalization) for normalization in ("raw", "token", "byte")] == [0, 1, 2]
    assert chosen({"logprob": [-1.0, -1.0], "tokens": [1, 1], "bytes": [1, 1]}, "raw") == 0
