"""The reward equals slow references: loops over stock models, and a joint distribution that is fully enumerated."""

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM, scoring
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    rank,
    reward_of,
    score_questions,
)
from tests.support.exact_models import LETTERS, letters_lm, random_joint
from tests.support.tiny_models import TOKENIZERS, random_model_folder, random_text

NAMES = list(TOKENIZERS)


@dataclass
class Twin:
    """A model as the package loads it, and as transformers alone does, with the plain tokenizer file."""

    folder: Path
    direction: str

    def __post_init__(self) -> None:
        loader = ReverseLM if self.direction == "reverse" else ForwardLM
        self.ours = loader.from_pretrained(self.folder, device="cpu")
        self.stock = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.eod = json.loads((self.folder / "config.json").read_text())["eod_id"]

    @torch.no_grad()
    def slow(self, prompt: str, answer: str, include_end: bool) -> list[float]:
        """Return log P of each scored token in text order (eod last), with one forward pass per token, no batch, no padding."""
        encoding = self.tokenizer.encode(prompt + answer, add_special_tokens=False)
        of_prompt = [end <= len(prompt) for _, end in encoding.offsets]
        num_prompt = of_prompt.index(False) if False in of_prompt else len(of_prompt)
        prompt_ids, answer_ids = encoding.ids[:num_prompt], encoding.ids[num_prompt:]
        if self.direction == "reverse":
            given, scored = answer_ids[::-1], prompt_ids[::-1]
        else:
            given, scored = prompt_ids, answer_ids
        if not given:
            given, scored = scored[:1], scored[1:]
        values = []
        for token in [*scored, *([self.eod] if include_end else [])]:
            logits = self.stock(torch.tensor([given])).logits[0, -1].double()
            values.append(float(torch.log_softmax(logits, -1)[token]))
            given = [*given, token]
        text_values = values[: len(scored)]
        return (text_values[::-1] if self.direction == "reverse" else text_values) + values[len(scored) :]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Twin]:
    root = tmp_path_factory.mktemp("models")
    return {
        (name, direction): Twin(random_model_folder(root / name / direction, name, direction), direction)
        for name in NAMES
        for direction in ("forward", "reverse")
    }


def cut_at_random(rng: random.Random) -> tuple[str, str]:
    """Return two parts of a text, not empty, cut anywhere, also inside a word or a merge."""
    text = random_text(rng, 6) + rng.choice(["x", "Paris", "漢"])
    while len(text) < 2:
        text += "a"
    cut = rng.randint(1, len(text) - 1)
    return text[:cut], text[cut:]


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_slow_loops_whatever_the_boundary_lengths_batch_and_tokenizers(
    seed: int, twins: dict[tuple[str, str], Twin]
) -> None:
    rng = random.Random(seed)
    forward, reverse = (twins[rng.choice(NAMES), direction] for direction in ("forward", "reverse"))
    pairs = [cut_at_random(rng) for _ in range(6)]
    include_ends = bool(seed % 2)
    settings = RewardSettings(
        weight=rng.random(),
        forward_normalization=rng.choice(["none", "token", "byte"]),
        reverse_normalization=rng.choice(["none", "token", "byte"]),
        temperature=rng.choice([1.0, 0.7]),
        include_ends=include_ends,
    )
    engines = [TransformersEngine(twin.ours, batch_size=rng.choice([1, 2, 5, 16])) for twin in (forward, reverse)]
    questions = [(prompt, [Candidate(answer), Candidate(answer)]) for prompt, answer in pairs]
    for (prompt, answer), (score, again) in zip(pairs, score_questions(*engines, questions, settings), strict=True):
        slow_forward, slow_reverse = (twin.slow(prompt, answer, include_ends) for twin in (forward, reverse))
        assert score == again
        assert all_values(score.forward_score) == pytest.approx(slow_forward, abs=2e-4)
        assert all_values(score.reverse_score) == pytest.approx(slow_reverse, abs=2e-4)
        assert (score.forward_tokens, score.reverse_tokens) == (
            len(slow_forward) - include_ends,
            len(slow_reverse) - include_ends,
        )
        lengths = {"none": (1, 1), "token": (score.forward_tokens, score.reverse_tokens)}
        lengths["byte"] = (len(answer.encode()), len(prompt.encode()))
        expected = (1 - settings.weight) * sum(slow_forward) / max(1, lengths[settings.forward_normalization][0])
        expected += settings.weight * sum(slow_reverse) / max(1, lengths[settings.reverse_normalization][1])
        assert score.reward == pytest.approx(expected / settings.temperature, abs=1e-3)


def all_values(score: scoring.SpanScore | None) -> list[float]:
    assert score is not None
    return [*score.token_logprobs, *([] if score.eod_logprob is None else [score.eod_logprob])]


def test_a_merge_over_the_boundary_is_scored_forward_and_given_in_reverse(twins: dict[tuple[str, str], Twin]) -> None:
    """In "... of Par" + "is" the piece " Paris" belongs to the answer, so only the forward model scores it."""
    engines = [TransformersEngine(twins["byte_level", direction].ours) for direction in ("forward", "reverse")]
    ((score,),) = score_questions(*engines, [("The capital of Par", [Candidate("is")])], RewardSettings())
    tokenizer = twins["byte_level", "forward"].ours.tokenizer
    assert tokenizer.spell(score.forward_score.text_ids) == b" Paris"
    assert tokenizer.spell(score.reverse_score.text_ids) == b"The capital of"


def test_a_stock_models_bos_is_given_to_the_forward_model_and_never_scored(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "stock", "byte_level", None)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    template |= {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": template}))
    forward = ForwardLM.from_pretrained(folder, device="cpu")
    assert forward.leading_ids == [1]
    (score,) = TransformersEngine(forward).score([("The capital", " of Paris")])
    ids, num_prompt = forward.tokenizer.split("The capital", " of Paris")
    with torch.no_grad():
        logprobs = torch.log_softmax(forward.model(torch.tensor([[1, *ids]])).logits[0], -1)
    expected = [float(logprobs[position, ids[position]]) for position in range(num_prompt, len(ids))]
    assert score.token_logprobs == pytest.approx(expected, abs=1e-5)


def test_equal_spans_are_computed_once(twins: dict[tuple[str, str], Twin], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    plain = scoring._score_batch
    monkeypatch.setattr(
        scoring, "_score_batch", lambda model, spans, measure: rows.append(len(spans)) or plain(model, spans, measure)
    )
    engine = TransformersEngine(twins["byte_level", "reverse"].ours, batch_size=2)
    scores = engine.score([("The cat", " sat"), ("The dog", " ran after"), ("The cat", " sat"), ("The cat", " sat")])
    assert sum(rows) == 2
    assert scores[0] == scores[2] == scores[3] != scores[1]
    lengths = [len(twins["byte_level", "reverse"].ours.tokenizer.encode(text)) for text in ("The cat sat", "The dog ran after")]
    assert engine.usage.tokens == sum(lengths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 1.5}, r"weight=1.5 is outside \[0, 1\]"),
        ({"forward_normalization": "word"}, "none, token, byte"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"language_model_weight": math.inf}, "language_model_weight=inf"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RewardSettings(**values)


def test_a_reward_that_needs_missing_scores_is_refused() -> None:
    score = CandidateScore(-1.0, -2.0, None, 3, None)
    with pytest.raises(DataError, match="forward_tokens"):
        reward_of(score, "x", "y", RewardSettings(forward_normalization="token"))
    with pytest.raises(DataError, match="language_model_logprob"):
        reward_of(score, "x", "y", RewardSettings(language_model_weight=-0.5))
    assert reward_of(score, "x", "éé", RewardSettings(forward_normalization="byte")) == 0.5 * -1 / 4 + 0.5 * -2


def test_ranking_by_true_models_equals_the_closed_form_for_every_lambda() -> None:
    """Questions and answers have two letters. Both conditionals, and P(y), are sums over the 81 texts."""
    joint = random_joint(seed=5)
    forward = TransformersEngine(letters_lm(ForwardLM, joint))
    reverse = TransformersEngine(letters_lm(ReverseLM, joint), batch_size=64)
    pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    p_question = {x: sum(p for text, p in joint.items() if text[:2] == x) for x in pairs}
    p_answer = {y: sum(p for text, p in joint.items() if text[2:] == y) for y in pairs}
    questions = [(x, [Candidate(y) for y in pairs]) for x in pairs]
    scored = score_questions(forward, reverse, questions, RewardSettings(language_model_weight=1.0))
    for x, scores in zip(pairs, scored, strict=True):
        for y, score in zip(pairs, scores, strict=True):
            assert score.forward_logprob == pytest.approx(math.log(joint[x + y] / p_question[x]), abs=1e-5)
            assert score.reverse_logprob == pytest.approx(math.log(joint[x + y] / p_answer[y]), abs=1e-5)
            assert score.language_model_logprob == pytest.approx(math.log(p_answer[y]), abs=1e-5)
        for weight in (step / 20 for step in range(21)):
            closed = [(joint[x + y] / p_question[x]) ** (1 - weight) * (joint[x + y] / p_answer[y]) ** weight for y in pairs]
            rewards = [reward_of(s, x, y, RewardSettings(weight=weight)) for y, s in zip(pairs, scores, strict=True)]
            assert rank(rewards) == sorted(range(len(pairs)), key=lambda i, closed=closed: -closed[i])
            penalised = RewardSettings(weight=0.0, language_model_weight=-weight)  # log P(y|x) - lambda log P(y)
            assert rank([reward_of(s, x, y, penalised) for y, s in zip(pairs, scores, strict=True)]) == rank(rewards)
