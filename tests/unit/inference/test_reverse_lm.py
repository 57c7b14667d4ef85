"""Writing the text that precedes (or follows) a text: order, stop, token healing at the given text, refusals."""

import json
import random
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.joint_tokenizer import JointTokenizer, TokenHealer
from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_tokenizer
from tests.support.tiny_models import (
    TOKENIZERS,
    chain_model,
    random_model_folder,
    random_text,
    save_model_folder,
    sentencepiece_like_json,
)

NAMES = list(TOKENIZERS)


@pytest.fixture(scope="module")
def reverse_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReverseLM]:
    root = tmp_path_factory.mktemp("reverse")
    return {name: ReverseLM.from_pretrained(random_model_folder(root / name, name, "reverse"), device="cpu") for name in NAMES}


@pytest.fixture(scope="module")
def forward_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ForwardLM]:
    root = tmp_path_factory.mktemp("forward")
    return {name: ForwardLM.from_pretrained(random_model_folder(root / name, name, "forward"), device="cpu") for name in NAMES}


def legible_folder(folder: Path, next_of: dict[int, int], direction: str) -> Path:
    tokenizer_json = (legible_tokenizer(folder / "tokenizer") / "tokenizer.json").read_text()
    return save_model_folder(folder / "model", chain_model(VOCAB_SIZE, next_of), tokenizer_json, direction, EOD_ID)


def piece_chain_folder(folder: Path, pieces: list[str], direction: str) -> Path:
    """Return a model of the SentencePiece-like tokenizer that writes `pieces` one after the other, in model order."""
    ids = ids_of(pieces)
    assert None not in ids
    vocab_size = Tokenizer.from_str(sentencepiece_like_json()).get_vocab_size()
    model = chain_model(vocab_size, dict(pairwise(ids)))
    return save_model_folder(folder, model, sentencepiece_like_json(), direction)


def ids_of(pieces: list[str]) -> list[int]:
    tokenizer = Tokenizer.from_str(sentencepiece_like_json())
    return [tokenizer.token_to_id(piece) for piece in pieces]


def test_a_reverse_model_writes_the_preceding_words_in_reading_order(tmp_path: Path) -> None:
    chain = {305: 304, 304: 303, 303: EOD_ID}
    reverse = ReverseLM.from_pretrained(legible_folder(tmp_path, chain, "reverse"), device="cpu")
    result = reverse.generate_preceding("305 306 307", max_new_tokens=9)[0]
    assert result.text_ids == [303, 304]
    assert result.preceding == "303 304 "
    assert result.text == "303 304 305 306 307"
    assert result.stopped


def test_a_forward_model_writes_the_following_words(tmp_path: Path) -> None:
    chain = {307: 308, 308: 309, 309: EOD_ID}
    forward = ForwardLM.from_pretrained(legible_folder(tmp_path, chain, "forward"), device="cpu")
    result = forward.generate_following("305 306 307", max_new_tokens=9)[0]
    assert (result.text, result.stopped) == ("305 306 307 308 309", True)
    cut = forward.generate_following("305 306 307", max_new_tokens=1)[0]
    assert (cut.text, cut.stopped) == ("305 306 307 308", False)


def test_generation_stops_at_the_trained_eod_and_not_at_the_tokenizers_eos(tmp_path: Path) -> None:
    """The tokenizer's eos </s> does not end the text; <EOD>, the end token of training, does."""
    folder = piece_chain_folder(tmp_path, ["▁of", "▁capital", "▁cat", "</s>", "▁the", "<EOD>"], "reverse")
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    result = ReverseLM.from_pretrained(folder, device="cpu").generate_preceding("capital of", max_new_tokens=20)[0]
    assert result.text_ids == ids_of(["▁the", "</s>", "▁cat", "▁capital"])
    assert (result.text, result.stopped) == ("the cat capital of", True)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_ends_with_the_given_text_and_characters_are_whole(name: str, reverse_models: dict[str, ReverseLM]) -> None:
    reverse, rng = reverse_models[name], random.Random(11)
    texts = [random_text(rng) for _ in range(60)]
    results = reverse.generate_preceding(texts, max_new_tokens=12, temperature=1.5, seed=5, batch_size=30)
    for text, result in zip(texts, results, strict=True):
        assert result.following == text
        assert result.text == result.preceding + text
        healed = reverse.tokenizer.heal_prompt(text, Direction.REVERSE)
        written = reverse.tokenizer.spell([i for i in result.text_ids if i not in reverse.tokenizer.special_ids])
        assert written.endswith(healed.trimmed)
        own = written[: len(written) - len(healed.trimmed)] + healed.bridge
        if not result.stopped:
            own = own.lstrip(bytes(range(0x80, 0xC0)))
        elif reverse.tokenizer.has_dummy_prefix:
            own = own.removeprefix(b" ")
        assert result.preceding == own.decode("utf-8", "replace")


@pytest.mark.parametrize("name", NAMES)
def test_the_text_begins_with_the_given_text(name: str, forward_models: dict[str, ForwardLM]) -> None:
    rng = random.Random(12)
    texts = [random_text(rng) for _ in range(40)]
    results = forward_models[name].generate_following(texts, max_new_tokens=12, temperature=1.5, seed=5, batch_size=40)
    assert [result.preceding for result in results] == texts
    assert all(result.text.startswith(text) for text, result in zip(texts, results, strict=True))


@cache
def joint(name: str) -> JointTokenizer:
    return JointTokenizer(Tokenizer.from_str(TOKENIZERS[name]()))


def kept_and_trimmed(name: str, text: str, direction: Direction) -> tuple[bytes, bytes, bytes]:
    tokenizer = joint(name)
    healed = tokenizer.heal_prompt(text, direction)
    order = healed.tokens[::-1] if direction is Direction.REVERSE else healed.tokens
    return tokenizer.spell(order), healed.trimmed, healed.bridge


@pytest.mark.parametrize("name", NAMES)
def test_kept_and_trimmed_bytes_make_up_the_given_text(name: str) -> None:
    rng = random.Random(4)
    for _ in range(300):
        text = random_text(rng)
        shown = text if name == "byte_level" else text.replace("▁", " ")
        fixed, trimmed, bridge = kept_and_trimmed(name, text, Direction.REVERSE)
        assert trimmed + fixed == bridge + shown.encode()
        fixed, trimmed, _ = kept_and_trimmed(name, text, Direction.FORWARD)
        assert fixed + trimmed in (shown.encode(), b" " + shown.encode())


@pytest.mark.parametrize("name", NAMES)
def test_no_dummy_space_is_forced_before_the_following_text(name: str) -> None:
    for text in (", said the cat", "\n\nThe end.", "🙂 of", "is the capital", " of Paris"):
        fixed, trimmed, bridge = kept_and_trimmed(name, text, Direction.REVERSE)
        assert (trimmed + fixed, bridge) == (text.encode(), b"")
    assert kept_and_trimmed(name, "the", Direction.REVERSE)[2] == b" "


def test_the_first_word_may_become_the_end_of_a_longer_piece(tmp_path: Path) -> None:
    """Token healing: given "capital of", the model may write the piece " capital" for "capital"; the space counts as its own."""
    tokenizer = JointTokenizer(Tokenizer.from_str(sentencepiece_like_json()))
    healed = tokenizer.heal_prompt("capital of", Direction.REVERSE)
    healer = TokenHealer(tokenizer, Direction.REVERSE, [])
    assert healed.trimmed.startswith(b"capital")
    allowed = {tokenizer.spell([id_]) for id_ in healer.allowed(b"capital")}
    assert {b" capital", b"l"} <= allowed
    assert b"the" not in allowed
    folder = piece_chain_folder(tmp_path, ["▁of", "▁capital", "▁The", "<EOD>"], "reverse")
    result = ReverseLM.from_pretrained(folder, device="cpu").generate_preceding("capital of", max_new_tokens=5)[0]
    assert (result.text, result.preceding, result.stopped) == ("The capital of", "The ", True)


def test_the_dummy_prefix_of_a_finished_text_is_not_part_of_it(tmp_path: Path) -> None:
    folder = piece_chain_folder(tmp_path, ["▁of", "▁capital", "<EOD>"], "reverse")
    reverse = ReverseLM.from_pretrained(folder, device="cpu")
    result = reverse.generate_preceding("capital of", max_new_tokens=5)[0]
    assert (result.preceding, result.text, result.stopped) == ("", "capital of", True)
    cut = reverse.generate_preceding("capital of", max_new_tokens=1)[0]
    assert (cut.preceding, cut.stopped) == (" ", False)


@pytest.mark.parametrize(("limit", "preceding"), [(4, " "), (5, "🙂 "), (6, " cat🙂 ")])
def test_a_preceding_character_cut_by_the_token_limit_is_omitted(tmp_path: Path, limit: int, preceding: str) -> None:
    pieces = ["▁of", "▁capital", "<0x82>", "<0x99>", "<0x9F>", "<0xF0>", "▁cat"]
    reverse = ReverseLM.from_pretrained(piece_chain_folder(tmp_path, pieces, "reverse"), device="cpu")
    result = reverse.generate_preceding("capital of", max_new_tokens=limit)[0]
    assert (result.preceding, result.following) == (preceding, "capital of")


@pytest.mark.parametrize(("limit", "following"), [(3, ""), (4, "🙂"), (5, "🙂 cat")])
def test_a_following_character_cut_by_the_token_limit_is_omitted(tmp_path: Path, limit: int, following: str) -> None:
    pieces = ["▁capital", "▁of", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁cat"]
    forward = ForwardLM.from_pretrained(piece_chain_folder(tmp_path, pieces, "forward"), device="cpu")
    result = forward.generate_following("The capital of", max_new_tokens=limit)[0]
    assert (result.preceding, result.following) == ("The capital of", following)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_results_do_not_depend_on_the_batch(name: str, reverse_models: dict[str, ReverseLM]) -> None:
    texts = ["The end.", "x", "\n\nreturn width * height\n", "漢字 of Paris, of course, and the mat"]
    together = reverse_models[name].generate_preceding(texts, max_new_tokens=10)
    alone = [reverse_models[name].generate_preceding(text, max_new_tokens=10)[0] for text in texts]
    assert together == alone


def test_a_seed_makes_samples_repeatable_and_leaves_the_global_generator_alone(reverse_models: dict[str, ReverseLM]) -> None:
    reverse = reverse_models["sentencepiece"]
    torch.manual_seed(1)
    expected_after = torch.rand(3)
    torch.manual_seed(1)
    options = {"max_new_tokens": 8, "temperature": 1.0, "num_return_sequences": 3}
    first = reverse.generate_preceding("The end.", seed=2, **options)
    assert torch.equal(torch.rand(3), expected_after)
    assert first == reverse.generate_preceding("The end.", seed=2, **options)
    assert first != reverse.generate_preceding("The end.", seed=3, **options)
    assert len({result.text for result in first}) > 1


def test_top_k_1_and_a_tiny_top_p_are_greedy(reverse_models: dict[str, ReverseLM]) -> None:
    reverse = reverse_models["byte_level"]
    greedy = reverse.generate_preceding("The end.", max_new_tokens=8)
    assert reverse.generate_preceding("The end.", max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert reverse.generate_preceding("The end.", max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_rows_beyond_the_tokenizer_are_never_written(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path, "byte_level", "reverse", num_extra_rows=3000)
    reverse = ReverseLM.from_pretrained(folder, device="cpu")
    known = set(reverse.tokenizer.vocab.values())
    results = reverse.generate_preceding(["The end."] * 8, max_new_tokens=20, temperature=2.0, seed=1)
    assert all(set(result.text_ids) <= known for result in results)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"num_return_sequences": 2},
        {"num_return_sequences": 0},
        {"batch_size": 0},
        {"max_new_tokens": 600},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], reverse_models: dict[str, ReverseLM]) -> None:
    with pytest.raises(UsageError):
        reverse_models["byte_level"].generate_preceding("The end.", **options)


def test_an_empty_text_is_refused(reverse_models: dict[str, ReverseLM], forward_models: dict[str, ForwardLM]) -> None:
    with pytest.raises(UsageError, match="empty following text"):
        reverse_models["byte_level"].generate_preceding("")
    with pytest.raises(UsageError, match="empty preceding text"):
        forward_models["byte_level"].generate_following(["a", ""])


def test_a_folder_of_the_other_direction_is_refused(tmp_path: Path) -> None:
    forward = random_model_folder(tmp_path / "forward", "byte_level", "forward")
    reverse = random_model_folder(tmp_path / "reverse", "byte_level", "reverse")
    stock = random_model_folder(tmp_path / "stock", "byte_level", None)
    with pytest.raises(
        MismatchError, match="records the direction forward, ReverseLM needs a reverse model; load it with ForwardLM"
    ):
        ReverseLM.from_pretrained(forward)
    with pytest.raises(MismatchError, match="records the direction reverse, ForwardLM needs a forward model"):
        ForwardLM.from_pretrained(reverse)
    with pytest.raises(MismatchError, match="records no direction"):
        ReverseLM.from_pretrained(stock)
    with pytest.raises(UsageError, match="use ForwardLM"):
        ReverseLM.from_pretrained(forward, direction="forward")
    with pytest.raises(MismatchError):
        ReverseLM.from_pretrained(forward, direction="reverse")
    assert ReverseLM.from_pretrained(stock, direction="reverse").stop_ids == [3]
    assert ForwardLM.from_pretrained(stock).stop_ids == [3]


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a model folder"):
        ReverseLM.from_pretrained(tmp_path / "missing")
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    (folder / "tokenizer.json").write_text(sentencepiece_like_json())
    with pytest.raises(MismatchError, match="was trained with"):
        ReverseLM.from_pretrained(folder)
    stock = random_model_folder(tmp_path / "stock", "byte_level", None)
    (stock / "tokenizer.json").write_text(sentencepiece_like_json())
    with pytest.raises(MismatchError, match="export again with the tokenizer of the shards"):
        ForwardLM.from_pretrained(stock)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text(TOKENIZERS["byte_level"]())
    with pytest.raises(DataError, match="safetensors"):
        ReverseLM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        ReverseLM.from_pretrained(folder)


def test_a_stock_model_keeps_the_bos_of_its_tokenizer_and_an_export_adds_none(tmp_path: Path) -> None:
    for direction, expected in ((None, [1]), ("forward", [])):
        folder = random_model_folder(tmp_path / str(direction), "sentencepiece", direction)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        forward = ForwardLM.from_pretrained(folder, device="cpu")
        assert forward.leading_ids == expected
    stock = ForwardLM.from_pretrained(tmp_path / "None", device="cpu")
    score = stock.log_likelihood("", "The end.")
    assert score.num_tokens == len(stock.tokenizer.encode("The end."))
    assert stock.generate_following("", max_new_tokens=3)[0].preceding == ""


def test_a_folder_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    stored = json.loads((folder / "tokenizer.json").read_text())
    first, second = list(stored["model"]["vocab"])[-2:]
    vocab = stored["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(MismatchError, match="was trained with"):
        ReverseLM.from_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_grows_at_its_front_and_ends_with_the_generated_text(name: str, reverse_models: dict[str, ReverseLM]) -> None:
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    for text in ("the end of the text", "é中", "x"):
        shown = list(reverse_models[name].stream_preceding(text, **options))
        assert shown[-1] == reverse_models[name].generate_preceding(text, **options)[0]
        assert len(shown) > 2
        assert all(after.text.endswith(before.text) for before, after in pairwise(shown[:-1]))
        assert all(part.text.endswith(text) for part in shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_grows_at_its_end_for_a_forward_model(name: str, forward_models: dict[str, ForwardLM]) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    shown = list(forward_models[name].stream_following("the begin", **options))
    assert shown[-1] == forward_models[name].generate_following("the begin", **options)[0]
    assert all(after.text.startswith(before.text) for before, after in pairwise(shown[:-1]))


def test_a_closed_stream_ends_the_model_and_its_errors_reach_the_caller(reverse_models: dict[str, ReverseLM]) -> None:
    model = reverse_models["byte_level"]
    threads = threading.active_count()
    stream = model.stream_preceding("some text", max_new_tokens=400, temperature=1.0, seed=1)
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    with pytest.raises(UsageError, match="exceed the 512 positions"):
        list(model.stream_preceding("some text", max_new_tokens=600))
    with pytest.raises(UsageError, match="temperature=-1"):  # at once, not at the first token
        model.stream_preceding("some text", temperature=-1.0)
    with pytest.raises(UsageError, match="a stream shows one text, but 2 were requested"):
        model.stream_preceding("some text", temperature=1.0, num_return_sequences=2)
    with pytest.raises(UsageError, match="so each letter would stop"):
        model.stream_preceding("some text", stop_strings="the")


def test_a_stop_string_is_matched_in_text_order_and_omitted(tmp_path: Path) -> None:
    chain = {305: 304, 304: 303, 303: 302, 302: EOD_ID}
    reverse = ReverseLM.from_pretrained(legible_folder(tmp_path, chain, "reverse"), device="cpu")
    result = reverse.generate_preceding("305 306", max_new_tokens=9, stop_strings=["303 30", "nothing"])[0]
    assert (result.preceding, result.stop_string, result.stopped) == (
        "4 ",
        "303 30",
        False,
    )  # 303 was written last, 304 before it
    assert result.text == "4 305 306"
    untouched = reverse.generate_preceding("305 306", max_new_tokens=9, stop_strings=["304 303", "305 306"])[0]
    assert (untouched.preceding, untouched.stop_string, untouched.stopped) == ("302 303 304 ", None, True)
    batch = reverse.generate_preceding(["305 306", "304 306"], max_new_tokens=9, stop_strings=["304 "])
    assert [(one.preceding, one.stop_string, one.stopped) for one in batch] == [("", "304 ", False), ("302 303 ", None, True)]
    assert list(reverse.stream_preceding("305 306", max_new_tokens=9, stop_strings=["303 "]))[-1].preceding == "304 "


def test_a_stop_string_ends_a_forward_text(tmp_path: Path) -> None:
    chain = {307: 308, 308: 309, 309: 310, 310: EOD_ID}
    forward = ForwardLM.from_pretrained(legible_folder(tmp_path, chain, "forward"), device="cpu")
    result = forward.generate_following("306 307", max_new_tokens=9, stop_strings=[" 310", "309"])[0]
    assert (result.following, result.stop_string, result.stopped) == (" 308 ", "309", False)
    with pytest.raises(UsageError, match="empty stop string"):
        forward.generate_following("306 307", stop_strings=[""])


def test_a_public_reverse_checkpoint_needs_its_direction_and_its_eod(tmp_path: Path) -> None:
    """Like the published LEDOM 7B: dummy prefix, a template with BOS, no direction, eos 2 in every file, but another end token in training."""
    folder = piece_chain_folder(tmp_path, ["▁of", "▁capital", "▁cat", "</s>", "▁the", "<EOD>"], "reverse")
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    stored.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("direction", "eod_id", "tokenizer_sha256"):
        del config[name]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    with pytest.raises(MismatchError, match="records no direction"):
        ReverseLM.from_pretrained(folder, device="cpu")
    eod_id = stored.token_to_id("<EOD>")
    with pytest.raises(MismatchError, match=rf"records the eos \[2\], but its tokenizer also has <EOD> = {eod_id}"):
        ReverseLM.from_pretrained(folder, device="cpu", direction="reverse")
    model = ReverseLM.from_pretrained(folder, device="cpu", direction="reverse", eod_id=eod_id)
    result = model.generate_preceding("capital of", max_new_tokens=20)[0]
    assert (result.text, result.stopped) == ("the cat capital of", True)
    assert model.leading_ids == []
    with pytest.raises(UsageError, match="records its own eod"):
        ReverseLM.from_pretrained(random_model_folder(tmp_path / "ours", "byte_level", "reverse"), eod_id=3)
