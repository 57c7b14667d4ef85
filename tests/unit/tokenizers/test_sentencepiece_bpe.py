"""A real SentencePiece BPE, trained on the standard library's sources, and its exact conversion."""

import json
import statistics
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_ledom.errors import DataError, UsageError, VerificationError
from megatron_ledom.tokenizers import sentencepiece_bpe
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS, check_conversion, convert, train
from tests.support.legible import write_jsonl
from tests.support.source_texts import TEXTS
from tests.support.tool_runs import train_by_command


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(TEXTS, 600)


@pytest.fixture(scope="module")
def pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def converted(model: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_str(convert(model, "the model"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_the_specials_follow_the_pieces(
    model: bytes, pieces: sentencepiece.SentencePieceProcessor, converted: Tokenizer
) -> None:
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "<CLS>": 600, "<SEP>": 601, "<EOD>": 602, "<MASK>": 603, "<PAD>": 604}
    assert pieces.vocab_size() == 605
    assert {piece: pieces.piece_to_id(piece) for piece in expected} == expected
    assert {piece: converted.token_to_id(piece) for piece in expected} == expected
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)


def test_training_is_deterministic(model: bytes) -> None:
    assert train(TEXTS, 600) == model
    assert train(TEXTS, 400, max_sentences=900) == train(TEXTS, 400, max_sentences=900)


def test_every_digit_is_a_piece_of_its_own(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.encode("2024", out_type=str) == ["▁", "2", "0", "2", "4"]
    assert not [piece for piece in map(pieces.id_to_piece, range(259, 600)) if any(map(str.isdigit, piece)) and len(piece) > 1]


def test_dummy_prefix_makes_joint_encoding_differ_from_joined_encodings(pieces: sentencepiece.SentencePieceProcessor) -> None:
    """Spans must be scored on the ids of the whole text: encoded on its own, a span has other ids."""
    assert pieces.encode("def") + pieces.encode("ault") != pieces.encode("default")
    assert pieces.decode(pieces.encode("def") + pieces.encode("ault")) == "def ault"


def test_text_comes_back_exactly(pieces: sentencepiece.SentencePieceProcessor, converted: Tokenizer) -> None:
    texts = [text for text in ODD_TEXTS if "\u2581" not in text] + TEXTS  # SentencePiece itself turns that one into a space
    for text in texts:
        assert pieces.decode(pieces.encode(text)) == text
        assert converted.decode(converted.encode(text).ids) == text


def test_newlines_fall_back_to_bytes_and_long_lines_are_learned_from() -> None:
    model = train(["abcdefgh " * 3000 + "\n\n"], 275)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert pieces.encode("\n\t", out_type=str) == ["▁", "<0x0A>", "<0x09>"]
    assert len(pieces.encode("abcdefgh")) < 5


def test_ids_are_equal_after_conversion_on_the_corpus(model: bytes, converted: Tokenizer) -> None:
    lines = [line for text in TEXTS for line in text.split("\n")]
    assert len(lines) > 1000
    check_conversion(model, converted.to_str(), [*TEXTS, *lines[:2000]], "the model")


@settings(max_examples=400, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="aeinst_ .=()\n\t\"'0123456789", max_size=200))
def test_ids_are_equal_after_conversion_on_any_string(
    pieces: sentencepiece.SentencePieceProcessor, converted: Tokenizer, text: str
) -> None:
    assert converted.encode(text, add_special_tokens=False).ids == pieces.encode(text)


def test_every_kind_of_code_point_has_equal_ids(pieces: sentencepiece.SentencePieceProcessor, converted: Tokenizer) -> None:
    samples = [chr(code) for code in range(0, 0x110000, 97) if not 0xD800 <= code < 0xE000]
    assert [encoding.ids for encoding in converted.encode_batch(samples)] == pieces.encode(samples)


def test_a_conversion_that_differs_names_the_text(model: bytes, converted: Tokenizer) -> None:
    stored = json.loads(converted.to_str())
    stored["model"]["merges"] = stored["model"]["merges"][:100]
    with pytest.raises(VerificationError, match=r"cannot be converted exactly: 'the default value' gets the ids"):
        check_conversion(model, json.dumps(stored), ["a", "the default value"], "the model")


def test_models_of_another_kind_are_refused() -> None:
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")), model_writer=written, vocab_size=200, model_type="unigram", minloglevel=2
    )
    with pytest.raises(DataError, match=r"is not a BPE model, normalises text \(nmt_nfkc\), removes extra whitespace"):
        convert(written.getvalue(), "this.model")
    with pytest.raises(DataError, match=r"this.model is not a SentencePiece model"):
        convert(b"{}", "this.model")


def test_a_model_that_its_library_cannot_load_is_refused(model: bytes) -> None:
    proto = sentencepiece_bpe.parse_model(model, "the model")
    proto.trainer_spec.byte_fallback = False  # but it has byte pieces
    with pytest.raises(DataError, match=r"spm\.model is not a SentencePiece model that the library can load \(.*byte"):
        convert(proto.SerializeToString(), "spm.model")


def test_more_pieces_than_the_text_has_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot learn 90,000 pieces"):
        train(["too little text"], 90_000)


def test_the_sample_of_sentences_is_uniform_and_limited() -> None:
    drawn = sentencepiece_bpe._drawn((str(number) for number in range(10_000)), 500)
    assert len(drawn) == 500
    assert drawn == sorted(drawn, key=int)
    assert abs(statistics.mean(map(int, drawn)) - 5000) < 500


def test_the_command_writes_a_folder_that_both_libraries_read_alike(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    done = train_by_command(tmp_path, "--input", "corpus.jsonl", "--vocab-size", 500, "--output", "made/tokenizer")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "made/tokenizer"
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<EOD>"
    check_conversion((folder / "tokenizer.model").read_bytes(), (folder / "tokenizer.json").read_text(), TEXTS, "it")

    again = train_by_command(tmp_path, "--input", "corpus.jsonl", "--vocab-size", 500, "--output", "made/tokenizer")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_failed_training_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n{"text": \n')
    done = train_by_command(tmp_path, "--input", "corpus.jsonl", "--vocab-size", 500, "--output", "made")
    assert done.returncode == 1
    assert "corpus.jsonl:2: malformed JSON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
