"""Step-level beam search: equal to best-of-N without pruning, token usage that adds up, the ends of steps."""

import itertools
from pathlib import Path

import pytest
import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.engine import PartialAnswer, StepDelimiter, empty_answer
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings, SearchResult, beam_search
from megatron_ledom.inference.reverse_reward.reward import Candidate, RewardSettings, rank, score_questions
from tests.support.tiny_models import random_model_folder

PROMPT = "The capital of France is Paris."
DELIMITER = StepDelimiter("[ae]")  # letters that an untrained model writes often
SAMPLING = Sampling(num_return_sequences=6, temperature=1.0, max_new_tokens=24, seed=3)
REWARD = RewardSettings(weight=0.4)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ForwardLM, ReverseLM]:
    folder = tmp_path_factory.mktemp("models")
    forward = random_model_folder(folder / "forward", request.param, "forward")
    reverse = random_model_folder(folder / "reverse", "byte_level", "reverse")
    return ForwardLM.from_pretrained(forward, device="cpu"), ReverseLM.from_pretrained(reverse, device="cpu")


def engines(models: tuple[ForwardLM, ReverseLM], batch_size: int = 4) -> tuple[TransformersEngine, TransformersEngine]:
    return TransformersEngine(models[0], batch_size), TransformersEngine(models[1], batch_size)


def search(models: tuple[ForwardLM, ReverseLM], num_beams: int, num_expansions: int, batch_size: int = 4) -> SearchResult:
    beam = BeamSettings(num_beams=num_beams, num_expansions=num_expansions, delimiter=DELIMITER)
    return beam_search(*engines(models, batch_size), empty_answer(PROMPT, SAMPLING), beam, SAMPLING, REWARD)


def test_beams_without_pruning_equal_best_of_n(models: tuple[ForwardLM, ReverseLM]) -> None:
    forward, reverse = engines(models)
    (answers,) = forward.sample([empty_answer(PROMPT, SAMPLING)], SAMPLING)
    (scores,) = score_questions(forward, reverse, [(PROMPT, [Candidate(answer.text) for answer in answers])], REWARD)
    found = search(models, num_beams=6, num_expansions=1)
    assert len(found.rounds) > 4  # several rounds, not all in one
    assert sorted(answer.text for answer in found.answers) == sorted(answer.text for answer in answers)
    ours = [(found.answers[i].text, pytest.approx(found.scores[i].reward, abs=1e-4)) for i in found.ranking]
    assert [(answers[i].text, scores[i].reward) for i in rank([score.reward for score in scores])] == ours


def test_rounds_and_token_usage_add_up(models: tuple[ForwardLM, ReverseLM]) -> None:
    forward, reverse = engines(models)
    beam = BeamSettings(num_beams=3, num_expansions=2, delimiter=DELIMITER)
    found = beam_search(forward, reverse, empty_answer(PROMPT, SAMPLING), beam, SAMPLING, REWARD)
    assert sum(step.forward_tokens for step in found.rounds) == forward.usage.tokens
    assert sum(step.reverse_tokens for step in found.rounds) == reverse.usage.tokens
    assert found.rounds[0].num_paths == 6
    num_finished = 0
    for step, after in itertools.pairwise(found.rounds):
        num_unfinished = step.num_paths - (step.num_finished - num_finished)
        num_finished = step.num_finished
        assert step.num_kept == max(0, min(num_unfinished, 3 - num_finished))
        assert after.num_paths == (2 * step.num_kept or len(found.answers))
    assert len(found.answers) == found.rounds[-1].num_finished >= 3
    assert found.as_fields()["search"]["forward_tokens"] == forward.usage.tokens


def test_pruning_keeps_the_answers_of_the_best_reward(models: tuple[ForwardLM, ReverseLM]) -> None:
    forward, reverse = engines(models)
    sampling = Sampling(num_return_sequences=1, temperature=1.0, max_new_tokens=40, seed=3)
    (first,) = forward.expand([empty_answer(PROMPT, sampling)], 6, DELIMITER, sampling)
    unfinished = [answer for answer in first if not answer.finished]
    width = 2 - (len(first) - len(unfinished))
    candidates = [Candidate(answer.text, answer.forward_logprob, answer.num_tokens) for answer in unfinished]
    (scores,) = score_questions(forward, reverse, [(PROMPT, candidates)], REWARD)
    best = rank([score.reward for score in scores])[:width]
    beam = BeamSettings(num_beams=2, num_expansions=3, delimiter=DELIMITER)
    found = beam_search(*engines(models), empty_answer(PROMPT, sampling), beam, sampling, REWARD)
    begins = [unfinished[index].text for index in best] + [answer.text for answer in first if answer.finished]
    assert width > 0
    assert all(answer.text.startswith(tuple(begins)) for answer in found.answers)


def test_an_answer_written_in_steps_reads_its_prompt_once(models: tuple[ForwardLM, ReverseLM]) -> None:
    """The model reads the prompt once and each token once, although every step is a separate call."""
    sampling = Sampling(temperature=1.0, max_new_tokens=16, seed=8)
    whole, stepwise = engines(models)[0], engines(models)[0]
    ((answer,),) = whole.sample([empty_answer(PROMPT, sampling)], sampling)
    answers = [empty_answer(PROMPT, sampling)]
    num_steps = 0
    while not answers[0].finished:
        (answers,) = stepwise.expand(answers, 1, DELIMITER, sampling)
        num_steps += 1
    assert num_steps > 1
    assert answers[0].text == answer.text
    assert stepwise.usage.tokens == whole.usage.tokens
    assert answers[0].forward_logprob == pytest.approx(answer.forward_logprob, abs=1e-3)


def test_the_sampled_logprob_is_the_models(models: tuple[ForwardLM, ReverseLM]) -> None:
    """Equals one pass over the written ids; temperature and top-k change the chosen tokens, but not the reported values."""
    forward = models[0]
    sampling = Sampling(num_return_sequences=3, temperature=1.7, top_k=50, max_new_tokens=12, seed=1)
    (answers,) = TransformersEngine(forward).sample([empty_answer(PROMPT, sampling)], sampling)
    for answer in answers:
        given = answer.state.healed.tokens
        tokens = [*given, *answer.state.written]
        tokens += [] if answer.num_tokens == sampling.max_new_tokens else forward.stop_ids
        with torch.no_grad():
            logprobs = torch.log_softmax(forward.model(torch.tensor([tokens])).logits[0], -1)
        spelled = len(answer.state.written) - answer.num_tokens
        values = [float(logprobs[i - 1, tokens[i]]) for i in range(len(given) + spelled, len(tokens))]
        assert answer.forward_logprob == pytest.approx(sum(values), abs=1e-3)


def test_answers_do_not_depend_on_the_batch_or_on_the_other_prompts(models: tuple[ForwardLM, ReverseLM]) -> None:
    roots = [empty_answer("The cat", SAMPLING, 1), empty_answer(PROMPT, SAMPLING, 0)]
    (_, together) = TransformersEngine(models[0], 16).sample(roots, SAMPLING)
    (alone,) = TransformersEngine(models[0], 1).sample(roots[1:], SAMPLING)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 1


def test_greedy_answers_are_those_of_generate(models: tuple[ForwardLM, ReverseLM]) -> None:
    """Also with token healing, where the end of the prompt may become part of a longer piece."""
    greedy = Sampling(max_new_tokens=12)
    prompts = [PROMPT, "The capital of Fra", "The cat sat on the m", "def area(wid"]
    rows = TransformersEngine(models[0]).sample([empty_answer(prompt, greedy) for prompt in prompts], greedy)
    expected = models[0].generate_following(prompts, max_new_tokens=12)
    assert [answer.text for (answer,) in rows] == [result.following for result in expected]
    assert any(answer.state.healed.trimmed for (answer,) in rows)


def test_the_end_of_a_step() -> None:
    assert StepDelimiter("\n").end_of_step("\n\n 2 + 2\nso") == 9
    assert StepDelimiter("\n").end_of_step("\n\n ") is None
    assert StepDelimiter(r"\n\n|\. ").end_of_step("One. Two") == 5
    assert StepDelimiter.parse("newline") == StepDelimiter()
    assert StepDelimiter.parse("regex:a:b").pattern == "a:b"
    assert StepDelimiter.parse("ids:13,198") == StepDelimiter(None, frozenset({13, 198}))
    for bad in ("lines", "regex:", "ids:", "ids:1,x"):
        with pytest.raises(UsageError, match="step delimiter"):
            StepDelimiter.parse(bad)
    for bad in ("(", "a*"):
        with pytest.raises(UsageError, match="step delimiter"):
            StepDelimiter(bad)
    with pytest.raises(UsageError, match="needs a pattern"):
        StepDelimiter(None)


def test_token_ids_end_a_step(models: tuple[ForwardLM, ReverseLM]) -> None:
    forward = models[0]
    ids = frozenset(forward.tokenizer.vocab[letter] for letter in "aeiost")
    sampling = Sampling(temperature=1.0, max_new_tokens=200, seed=2)
    (answers,) = TransformersEngine(forward).expand([empty_answer(PROMPT, sampling)], 6, StepDelimiter(None, ids), sampling)
    unfinished = [answer for answer in answers if not answer.finished]
    assert unfinished
    for answer in unfinished:
        new_ids = answer.state.written[-answer.num_tokens :]
        assert new_ids[-1] in ids


def test_impossible_searches_are_refused(models: tuple[ForwardLM, ReverseLM]) -> None:
    with pytest.raises(UsageError, match="engines accept no stop_strings"):
        TransformersEngine(models[0]).sample([], Sampling(stop_strings=["the"]))
    with pytest.raises(UsageError, match="writes nothing"):
        BeamSettings(num_beams=0)
    with pytest.raises(UsageError, match="temperature 0"):
        beam_search(*engines(models), empty_answer(PROMPT, Sampling()), BeamSettings(), Sampling(), REWARD)
    with pytest.raises(UsageError, match="sample from the forward model"):
        engines(models)[1].sample([empty_answer(PROMPT, SAMPLING)], SAMPLING)


def test_a_finished_answer_stays_unchanged(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    done = PartialAnswer(PROMPT, "0/0", " Paris", finished=True, num_tokens=1)
    assert engines(models)[0].expand([done], 3, DELIMITER, SAMPLING)[0][0].text == " Paris"
