"""The cached encoder gives the ids of the sentencepiece library for trained and random vocabularies and any text."""

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.tokenizers.encoders import CachedPieceEncoder, why_not_cached
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS, SPACE, parse_model, train
from tests.support.source_texts import FILES, MULTILINGUAL

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LINES = "def f(x):\n        return self.value  # été 日本語\n\n\tfor i in range(100): print(i, 'ß', \"==\" * 3)\n"


class Both:
    """The encoder of the library and the cached encoder for one model."""

    def __init__(self, model: bytes, **options: int) -> None:
        self.model = model
        self.library = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.encoder = CachedPieceEncoder(model, **options)


def check_equal_ids(both: "Both", texts: Sequence[str]) -> None:
    """Fail with the first text whose ids differ."""
    ids, offsets = both.encoder.encode(texts)
    assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(texts) + 1)
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    for index, expected in enumerate(both.library.encode(list(texts), num_threads=1)):
        found = ids[offsets[index] : offsets[index + 1]].tolist()
        assert found == expected, f"text {index}: {texts[index][:80]!r}"


@pytest.fixture(scope="module", params=[1000, 3000, 8000])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(train([*FILES, *MULTILINGUAL], request.param, max_sentences=20_000))


@pytest.fixture(scope="module")
def model() -> bytes:
    return train([*FILES[:10], *MULTILINGUAL], 1000)


def changed(model: bytes, change: Callable[[Any], None]) -> bytes:
    """Return the model with a changed ModelProto."""
    proto = parse_model(model, "the model")
    change(proto)
    return bytes(proto.SerializeToString())


def with_pieces(
    model: bytes, pieces: Iterable[tuple[str, float]], *, byte_fallback: bool = True, dummy_prefix: bool = True
) -> bytes:
    """Return a model of the same kind with these normal pieces and scores."""

    def change(proto: Any) -> None:
        kept = [piece for piece in proto.pieces if piece.type != NORMAL and (byte_fallback or piece.type != BYTE)]
        kept = [(piece.piece, piece.score, piece.type) for piece in kept]
        del proto.pieces[:]
        for piece, score, kind in [*kept, *((piece, score, NORMAL) for piece, score in pieces)]:
            proto.pieces.add(piece=piece, score=score, type=kind)
        proto.trainer_spec.byte_fallback = byte_fallback
        proto.normalizer_spec.add_dummy_prefix = dummy_prefix

    return changed(model, change)


def test_odd_texts_have_equal_ids(both: Both) -> None:
    check_equal_ids(both, ODD_TEXTS)
    check_equal_ids(both, [])
    check_equal_ids(both, [SPACE, f" {SPACE} ", f"a{SPACE}b a b", "\0", "a\0\0b\0", "<EOD>", "<s> </s> <unk>", "<0x41>"])
    check_equal_ids(both, [first + second for first in ODD_TEXTS for second in ODD_TEXTS])


def test_real_files_have_equal_ids(both: Both) -> None:
    lines = [line for text in FILES for line in text.splitlines(keepends=True)]
    assert len(lines) > 10_000
    check_equal_ids(both, FILES)
    check_equal_ids(both, lines[:10_000])
    statistics = both.encoder.statistics()
    assert statistics["misses"] < statistics["units"] / 10
    assert statistics["clears"] == 0


def test_every_code_point_has_equal_ids(both: Both) -> None:
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    check_equal_ids(both, ["".join(codes[begin : begin + 64]) for begin in range(0, len(codes), 64)])
    check_equal_ids(both, [f"{code}a {code}{code} 1{code}" for code in codes[:0x3000:7] + codes[0x3000::397]])
    check_equal_ids(both, codes[:0x500])


WHITESPACE = st.text(alphabet=f" \n\t\r\u00a0\u3000{SPACE}ab1", max_size=80)
REPEATED = st.lists(st.tuples(st.text(max_size=3), st.integers(0, 90)), max_size=6).map(
    lambda runs: "".join(run * times for run, times in runs)
)
CODE = st.text(alphabet="aeinst_ .=()\n\t\"'0123456789#-é日本", max_size=200)
CUT = st.builds(
    lambda a, b, more: LINES[a:b] + more, st.integers(0, len(LINES)), st.integers(0, len(LINES)), st.text(max_size=5)
)


@settings(max_examples=250, deadline=None)
@given(texts=st.lists(st.text(max_size=60) | WHITESPACE | REPEATED | CODE | CUT, max_size=4))
def test_any_text_has_equal_ids(both: Both, texts: list[str]) -> None:
    check_equal_ids(both, texts)


@pytest.mark.parametrize("seed", range(60))
def test_random_vocabularies_have_equal_ids(model: bytes, seed: int) -> None:
    """Many equal scores, characters that occur in longer pieces only, pieces across spaces; all four settings of the flags."""
    draw = random.Random(seed)
    alphabet = "aab 1\u00e9日𝔘"[: draw.choice([3, 5, 8])]
    pieces = {"".join(draw.choices(alphabet, k=draw.choice([1, 2, 2, 3, 4, 6]))) for _ in range(draw.choice([5, 40, 200]))}
    marked = sorted(piece.replace(" ", SPACE) for piece in pieces)
    scored = [(piece, float(-draw.randrange(draw.choice([3, 1000])))) for piece in marked]
    both = Both(with_pieces(model, scored, byte_fallback=seed % 2 == 0, dummy_prefix=seed % 4 < 2), cache_bytes=8192)
    texts = ["".join(draw.choices(alphabet + "x日", k=draw.choice([1, 3, 9, 40, 130, 400]))) for _ in range(60)]
    check_equal_ids(both, [*texts, *ODD_TEXTS])


def test_runs_of_every_length_have_equal_ids(model: bytes) -> None:
    """Lengths around the limits of the encoder: 8 and 15 bytes of a short key, 64 characters, 255 bytes."""
    runs = [("aa", -1.0), ("aaaa", -2.0), ("éé", -3.0), ("ab", -4.0), ("abab", -4.0), ("a", -9.0), (f"{SPACE}a", -5.0)]
    both = Both(with_pieces(model, [*runs, (SPACE * 2, -6.0), (SPACE, -10.0)]))
    texts = [unit * times for unit in ("a", "ab", "é", " ", "日") for times in range(300)]
    check_equal_ids(both, texts)
    check_equal_ids(both, [f"{text}a" for text in texts])


@pytest.mark.parametrize("unit", ["a", "ab", " "])
def test_a_long_run_costs_no_more_per_character_than_a_short_one(model: bytes, unit: str) -> None:
    runs = [("aa", -1.0), ("aaaa", -2.0), ("ab", -4.0), ("bab", -5.0), (SPACE * 2, -6.0), (SPACE * 4, -7.0)]
    both = Both(with_pieces(model, runs))

    def steps(times: int) -> int:
        before = both.encoder.statistics()["steps"]
        check_equal_ids(both, [unit * times])
        return both.encoder.statistics()["steps"] - before

    assert steps(100_000) < 10.1 * steps(10_000)


def test_a_piece_across_two_words_is_found(model: bytes) -> None:
    joined = changed(model, lambda proto: proto.pieces.add(piece=f"a{SPACE}b", score=1.0, type=NORMAL))
    both = Both(joined)
    index = both.library.piece_to_id(f"a{SPACE}b")
    texts = ["=a b", "=a b=a b=", f"=a{SPACE}b=", "=a  b", "=a\nb", "=ab"]
    check_equal_ids(both, [*texts, *FILES[:3]])
    counts = [int(np.sum(both.encoder.encode([text])[0] == index)) for text in texts]
    assert counts == [1, 2, 1, 0, 0, 0]


def test_pieces_with_a_real_space_never_match(model: bytes) -> None:
    check_equal_ids(
        Both(with_pieces(model, [("a b", 1.0), (" b", 2.0), ("ab", -1.0), ("b", -2.0)])), ["a b", "ab b", f"a{SPACE}b"]
    )


def test_a_tiny_cache_overflows_and_ids_stay_equal() -> None:
    model = train(FILES, 2000, max_sentences=10_000)
    both = Both(model, cache_bytes=4096)
    for _ in range(2):
        check_equal_ids(both, [*FILES[:10], *ODD_TEXTS])
    statistics = both.encoder.statistics()
    assert statistics["clears"] > 50
    assert statistics["cache_bytes"] <= 4096


def test_the_cache_is_bounded() -> None:
    model = train(FILES, 500, max_sentences=5_000)
    encoder = CachedPieceEncoder(model, cache_bytes=100_000)
    encoder.encode([" ".join(str(number) + "abcdefghij" * (number % 4) for number in range(30_000))])
    assert encoder.statistics()["cache_bytes"] <= 100_000
    with pytest.raises(ValueError, match="a cache must have 4096 bytes to 4 GB"):
        CachedPieceEncoder(model, cache_bytes=4095)


def test_texts_that_are_no_text_are_refused(model: bytes) -> None:
    encoder = CachedPieceEncoder(model)
    with pytest.raises(UnicodeEncodeError):
        encoder.encode(["a", "\ud800"])
    with pytest.raises(TypeError, match="text 1 is not a str"):
        encoder.encode(["a", b"a"])  # type: ignore[list-item]
    assert len(encoder.encode(("a", "b"))[1]) == 3


def test_threads_can_share_an_encoder() -> None:
    both = Both(train(FILES, 1000, max_sentences=5_000), cache_bytes=65536)
    expected = both.encoder.encode(FILES)[0]
    with ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(both.encoder.encode, [FILES] * 12):
            assert np.array_equal(ids, expected)


def set_trainer(key: str, value: Any) -> Callable[[Any], None]:
    return lambda proto: setattr(proto.trainer_spec, key, value)


def set_normalizer(key: str, value: Any) -> Callable[[Any], None]:
    return lambda proto: setattr(proto.normalizer_spec, key, value)


def add_piece(piece: str, kind: int) -> Callable[[Any], None]:
    return lambda proto: proto.pieces.add(piece=piece, score=0.0, type=kind)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_trainer("model_type", 1), "is not a BPE model"),
        (set_normalizer("precompiled_charsmap", b"\0\0\0\0"), "normalises text (identity)"),
        (set_normalizer("remove_extra_whitespaces", True), "removes extra whitespace"),
        (set_normalizer("escape_whitespaces", False), "does not write spaces as ▁"),
        (set_trainer("treat_whitespace_as_suffix", True), "puts the space at the end of a word"),
        (add_piece("<sep>", USER_DEFINED), "has user-defined pieces, which are matched before merging"),
        (add_piece("xy", UNUSED), "has unused pieces, which are split in a way that depends on the whole text"),
        (set_trainer("byte_fallback", False), "has 256 byte pieces"),
        (add_piece("<unk2>", UNKNOWN), "has 2 unknown pieces"),
        (add_piece("日", CONTROL), "has the reserved piece '日', which a text can become"),
        (add_piece("re", CONTROL), "has the reserved piece 're', which a text can become"),
    ],
)
def test_other_models_are_refused(model: bytes, change: Callable[[Any], None], reason: str) -> None:
    assert why_not_cached(model) is None
    assert why_not_cached(changed(model, change)) == reason
    with pytest.raises(UsageError, match="encode with the sentencepiece library"):
        CachedPieceEncoder(changed(model, change))


def test_too_many_pieces_and_no_model_are_refused(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ledom.tokenizers.encoders.MAX_PIECES", 1000)
    assert why_not_cached(model) == "has more than 1,000 pieces"
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        why_not_cached(b"{}")
