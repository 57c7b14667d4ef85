"""Log-likelihoods of spans equal slow loops over the stock model, and the boundary rule equals a byte count."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM, scoring
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import Span, score_spans
from tests.support.tiny_models import TOKENIZERS, random_model_folder, random_text

NAMES = list(TOKENIZERS)
PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is Par", "is."),
    ("The cat sat ", "on the mat"),
    ("日本 🙂", "👩‍👩‍👧 漢字"),
    ("a\n", "\nb"),
    ("x", "y"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        (name, direction): random_model_folder(root / name / direction, name, direction)
        for name in NAMES
        for direction in ("reverse", "forward")
    }


def joint(name: str) -> JointTokenizer:
    return JointTokenizer(Tokenizer.from_str(TOKENIZERS[name]()))


def slow_sum(folder: Path, tokens: list[int], num_context: int) -> float:
    """Return log P of each token after the context, from the stock model's logits after all tokens before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    with torch.no_grad():
        for position in range(num_context, len(tokens)):
            logits = model(torch.tensor([tokens[:position]])).logits[0, -1]
            total += float(torch.log_softmax(logits.double(), -1)[tokens[position]])
    return total


@pytest.mark.parametrize("name", NAMES)
def test_reverse_log_likelihood_equals_a_slow_loop_of_the_stock_model(name: str, folders: dict[tuple[str, str], Path]) -> None:
    folder = folders[name, "reverse"]
    reverse = ReverseLM.from_pretrained(folder, device="cpu")
    for preceding, following in PAIRS[:4]:
        text_ids, num_preceding = reverse.tokenizer.split(preceding, following)
        expected = slow_sum(folder, text_ids[::-1], len(text_ids) - num_preceding)
        score = reverse.log_likelihood(preceding, following)
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == num_preceding
        assert score.text_ids == text_ids[:num_preceding]
        whole = slow_sum(folder, [*text_ids[::-1], *reverse.stop_ids], len(text_ids) - num_preceding)
        from_beginning = reverse.log_likelihood(preceding, following, include_beginning=True)
        assert from_beginning.logprob == pytest.approx(whole, abs=1e-4)
        assert from_beginning.num_tokens == num_preceding
        assert from_beginning.token_logprobs == pytest.approx(score.token_logprobs, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_forward_log_likelihood_equals_a_slow_loop_of_the_stock_model(name: str, folders: dict[tuple[str, str], Path]) -> None:
    folder = folders[name, "forward"]
    forward = ForwardLM.from_pretrained(folder, device="cpu")
    for preceding, following in PAIRS[:4]:
        text_ids, num_preceding = forward.tokenizer.split(preceding, following)
        score = forward.log_likelihood(preceding, following)
        assert score.logprob == pytest.approx(slow_sum(folder, text_ids, num_preceding), abs=1e-4)
        assert score.text_ids == text_ids[num_preceding:]
        with_end = forward.log_likelihood(preceding, following, include_end=True)
        assert with_end.logprob == pytest.approx(slow_sum(folder, [*text_ids, *forward.stop_ids], num_preceding), abs=1e-4)


def test_token_values_are_in_text_order(folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["byte_level", "reverse"], device="cpu")
    score = reverse.log_likelihood("The capital of", " France")
    tokens = reverse.tokenizer.encode("The capital of France")[::-1]
    with torch.no_grad():
        logprobs = torch.log_softmax(reverse.model(torch.tensor([tokens])).logits[0], -1)
    first_in_text = float(logprobs[-2, tokens[-1]])
    assert score.token_logprobs[0] == pytest.approx(first_in_text, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_boundary_rule_equals_a_count_of_bytes(name: str) -> None:
    """Reference: a token belongs to the preceding part if it ends within the bytes of that part."""
    tokenizer, rng = joint(name), random.Random(3)
    for _ in range(400):
        preceding, following = random_text(rng), random_text(rng)
        text_ids, num_preceding = tokenizer.split(preceding, following)
        spelled = tokenizer.spell(text_ids)
        text = (preceding + following).replace("▁", " " if name != "byte_level" else "▁")
        has_dummy = len(spelled) - len(text.encode())
        assert spelled == b" " * has_dummy + text.encode()
        boundary = has_dummy + len(preceding.replace("▁", " " if name != "byte_level" else "▁").encode())
        assert num_preceding == sum(len(tokenizer.spell(text_ids[: i + 1])) <= boundary for i in range(len(text_ids)))


def test_a_merge_over_the_boundary_belongs_to_the_following_text() -> None:
    tokenizer = joint("byte_level")
    text_ids, num_preceding = tokenizer.split("The capital of Par", "is")
    assert tokenizer.spell(text_ids[num_preceding:]) == b" Paris"
    assert tokenizer.spell(text_ids[:num_preceding]) == b"The capital of"
    assert tokenizer.split("", "Paris")[1] == 0
    assert tokenizer.split("Paris", "")[1] == len(tokenizer.encode("Paris"))


def test_joint_ids_differ_from_ids_encoded_apart() -> None:
    """The dummy prefix and merges across the boundary make the difference."""
    spaced = joint("sentencepiece")
    assert spaced.split("x", "y")[0] == spaced.encode("xy") != spaced.encode("x") + spaced.encode("y")
    plain = joint("byte_level")
    assert plain.split("Par", "is")[0] == plain.encode("Paris") != plain.encode("Par") + plain.encode("is")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_do_not_depend_on_the_batch(batch_size: int, folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["sentencepiece", "reverse"], device="cpu")
    before, after = [list(texts) for texts in zip(*PAIRS, ("", "The end."), strict=True)]
    together = reverse.log_likelihood(before, after, include_beginning=True, batch_size=batch_size)
    for one, preceding, following in zip(together, before, after, strict=True):
        alone = reverse.log_likelihood(preceding, following, include_beginning=True)
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert one.text_ids == alone.text_ids


def test_a_small_limit_on_logits_splits_batches_and_changes_nothing(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reverse = ReverseLM.from_pretrained(folders["sentencepiece", "reverse"], device="cpu")
    spans = [Span([5, 6, 7, 8], 1), Span([9, 10], 1), Span([5, 6], 2), Span([11, 12, 13], 2)]
    wide = score_spans(reverse.model, spans, 4)
    monkeypatch.setattr(scoring, "MAX_KEPT_LOGITS", 1)
    narrow = score_spans(reverse.model, spans, 4)
    assert [len(row) for row in wide] == [3, 1, 0, 1]
    for one, other in zip(wide, narrow, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_empty_parts(folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["sentencepiece", "reverse"], device="cpu")
    forward = ForwardLM.from_pretrained(folders["sentencepiece", "forward"], device="cpu")
    assert reverse.log_likelihood("", "The end.").logprob == 0.0
    assert reverse.log_likelihood("", "The end.").num_tokens == 0
    assert reverse.log_likelihood("", "The end.", include_beginning=True).logprob < 0
    assert forward.log_likelihood("The end.", "").logprob == 0.0
    assert reverse.log_likelihood([], []) == []
    with pytest.raises(UsageError, match="empty following text"):
        reverse.log_likelihood("The end.", "")
    with pytest.raises(UsageError, match="empty preceding text"):
        forward.log_likelihood("", "The end.")
    with pytest.raises(UsageError, match="2 preceding and 1 following"):
        reverse.log_likelihood(["a", "b"], ["c"])
    with pytest.raises(UsageError, match="batch_size=0"):
        reverse.log_likelihood("a", "b", batch_size=0)


def test_a_first_token_that_nothing_conditions_is_not_scored(folders: dict[tuple[str, str], Path]) -> None:
    """ "Paris" is one token, so "Par" has no token that could condition it."""
    forward = ForwardLM.from_pretrained(folders["byte_level", "forward"], device="cpu")
    assert len(forward.tokenizer.encode(" Paris")) == 1
    score = forward.log_likelihood(" Par", "is.")
    assert [forward.tokenizer.spell([id_]) for id_ in score.text_ids] == [b"."]


def test_a_text_longer_than_the_model_is_refused(folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["byte_level", "reverse"], device="cpu")
    with pytest.raises(DataError, match="exceeds the 512 positions"):
        reverse.log_likelihood("漢" * 600, "end")


def test_half_a_surrogate_pair_is_refused(folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["byte_level", "reverse"], device="cpu")
    with pytest.raises(DataError, match="surrogate"):
        reverse.log_likelihood("a\ud800", "b")


def test_special_tokens_spelled_out_are_text_as_in_the_shards(folders: dict[tuple[str, str], Path]) -> None:
    reverse = ReverseLM.from_pretrained(folders["sentencepiece", "reverse"], device="cpu")
    assert reverse.stop_ids[0] not in reverse.tokenizer.encode("a <EOD> b")
    assert reverse.tokenizer.heal_prompt("a <EOD> b", Direction.REVERSE).tokens
