"""The byte-level encoder gives the ids of the tokenizers library for every pattern, every class of characters and any text."""

import importlib.util
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer

from megatron_ledom._helpers import not_nfc
from megatron_ledom.errors import UsageError
from megatron_ledom.tokenizers.encoders import GPT2, PATTERNS, CachedByteEncoder, HubEncoder, first_difference, why_not_bytes
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS
from tests.support.paths import ROOT
from tests.support.source_texts import FILES, MULTILINGUAL

HELPERS = ROOT / "csrc" / "helpers"
CODES = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
NASTY = [
    " ",
    "  ",
    "\n",
    "\r",
    "\t",
    "\xa0",
    "\u3000",
    "\x85",
    "\x1c",
    "\0",
    "a",
    "B",
    "é",
    "ſ",
    "İ",
    "ǅ",
    "ʰ",
    "日",
    "漢字",
    "ا",
]
NASTY += ["\u0301", "\u0327", "\u093c", "\u094d", "\u1100", "\u1161", "\u11a8", "가", "\u212b", "e\u0301", "\u0344", "\ufb01"]
NASTY += [
    "1",
    "12345",
    "²",
    "Ⅷ",
    "'",
    "'s",
    "'S",
    "'ſ",
    "'re",
    "'LL",
    "'l",
    "!",
    "!!",
    "/",
    "//\n/",
    "_",
    "👍🏽",
    "\u200d",
    "camelCase",
]
NASTY += ["<think>", "</think>", "<|end|>", "<|e", "<", ">", "<thin\u212a>", "ABCdef", "The", "\u1e9b\u0323"]


def trained(pre_tokenizer: Any, normalizer: Any = None, *, ignore_merges: bool = False) -> dict[str, Any]:
    """Return the object of a byte-level tokenizer.json of 2,000 tokens, with one special and two other added tokens."""
    tokenizer = HubTokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*FILES[:12], *MULTILINGUAL, *["".join(NASTY)] * 5],
        trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return dict(orjson.loads(tokenizer.to_str()))


def split_by(pattern: str) -> Any:
    """Return a pre-tokenizer that splits by a regular expression, then encodes bytes."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class Both:
    """The encoder of the library and ours for one tokenizer.json."""

    def __init__(self, stored: dict[str, Any], **options: int) -> None:
        self.library = HubEncoder(orjson.dumps(stored), "the tokenizer")
        self.encoder = CachedByteEncoder(stored, self.library, **options)


def check_equal_ids(both: "Both", texts: Sequence[str]) -> None:
    """Fail with the first text whose ids differ."""
    assert first_difference(both.encoder, both.library, texts) is None


@pytest.fixture(scope="module", params=[*PATTERNS, "byte level", "whole"])
def both(request: pytest.FixtureRequest) -> Both:
    """Return encoders with each pattern; every second one normalises."""
    if request.param == "byte level":
        return Both(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    if request.param == "whole":
        stored = trained(split_by(list(PATTERNS)[2]), ignore_merges=True)
        stored["model"]["merges"] = stored["model"]["merges"][:-200]  # no merge produces some tokens
        return Both(stored)
    return Both(trained(split_by(request.param), normalizers.NFC() if PATTERNS[request.param] != GPT2 else None))


def test_odd_and_real_texts_have_equal_ids(both: Both) -> None:
    check_equal_ids(both, [])
    check_equal_ids(both, [*ODD_TEXTS, *NASTY, *(first + second for first in NASTY for second in NASTY)])
    check_equal_ids(both, FILES)
    assert both.encoder.statistics()["misses"] < both.encoder.statistics()["units"] / 10


def test_the_classes_of_all_code_points_are_those_of_the_library() -> None:
    spec = importlib.util.spec_from_file_location("make_unicode_tables", HELPERS / "make_unicode_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert list(tables.runs(tables.class_of())) == stored_runs()


def stored_runs() -> list[int]:
    """Return the entries of unicode_classes.h: first code point << 8 | class."""
    return [int(entry, 16) for entry in re.findall(r"0x[0-9A-F]+(?=,)", (HELPERS / "unicode_classes.h").read_text())]


def test_code_points_of_every_class_have_equal_ids(both: Both) -> None:
    """Code points at every change of class, next to characters of other classes, where a wrong class changes the cut."""
    borders = {code + step for run in stored_runs() for code in (run >> 8,) for step in (-1, 0)} | set(range(0x500))
    codes = [chr(code) for code in sorted(borders) if code >= 0 and not 0xD800 <= code < 0xE000]
    for frame in ("a{0}b1{0}2", " {0}{0} '{0}s!{0}\n{0}", "A{0}B'l{0}"):
        check_equal_ids(
            both, ["|".join(frame.format(code) for code in codes[begin : begin + 64]) for begin in range(0, len(codes), 64)]
        )


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.text(max_size=40) | st.lists(st.sampled_from(NASTY), max_size=30).map("".join) | st.text(" \n\r\ta1'!", max_size=60),
        max_size=4,
    )
)
def test_any_text_has_equal_ids(both: Both, texts: list[str]) -> None:
    check_equal_ids(both, texts)


def test_runs_of_every_length_have_equal_ids(both: Both) -> None:
    """Lengths around the limits: 8 bytes read at once, 15 of a short key, 64 symbols, 255 cached bytes."""
    check_equal_ids(both, [unit * times for unit in ("a", "é", " ", "日", "1", "!", "aB", "\n ") for times in range(280)])


def test_not_nfc_finds_every_text_that_nfc_changes() -> None:
    """Every code point alone and after others, and random strings of combining characters."""
    normalize = normalizers.NFC().normalize_str
    framed = [f"{before}{code}{after}" for before, after in (("", ""), ("e", "\u0323")) for code in CODES]
    combining = [code for code in CODES if normalize(f"a\u0315{code}\u0301") != f"a\u0315{code}\u0301"]
    draw = random.Random(0)
    framed += ["".join(draw.choices([*combining, "a", "\u1100", "가"], k=4)) for _ in range(20_000)]
    found = set(not_nfc(framed))
    missed = [text for index, text in enumerate(framed) if index not in found and normalize(text) != text]
    assert missed == []
    assert not_nfc(["abc", "é", "日本語 텍스트 नमस्ते", "e\u0301"]) == [3]


def test_a_long_word_costs_no_more_per_byte_than_a_short_one() -> None:
    both = Both(trained(split_by(next(iter(PATTERNS)))))

    def steps(times: int) -> int:
        before = both.encoder.statistics()["steps"]
        check_equal_ids(both, ["the" * times])
        return both.encoder.statistics()["steps"] - before

    assert steps(40_000) < 10.1 * steps(4_000)


def test_a_tiny_cache_overflows_and_ids_stay_equal() -> None:
    both = Both(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), cache_bytes=4096)
    for _ in range(2):
        check_equal_ids(both, [*FILES[:10], *ODD_TEXTS])
    assert both.encoder.statistics()["clears"] > 50
    assert both.encoder.statistics()["cache_bytes"] <= 4096


def test_added_tokens_are_cut_out_and_special_ones_are_text() -> None:
    stored = trained(split_by(list(PATTERNS)[2]), normalizers.NFC())
    both = Both(stored)
    texts = [
        "a<think>b",
        "<think></think>",
        "<|end|>",
        "<think>\u0338x",
        "<thin\u212a>",
        "e\u0301<think>e\u0301",
        "<<think>>",
        "<think",
    ]
    check_equal_ids(both, texts)
    ids = {token["content"]: token["id"] for token in stored["added_tokens"]}
    found = [both.encoder.encode([text])[0].tolist() for text in texts]
    assert [ids["<think>"] in each for each in found] == [True, True, False, True, False, True, True, False]
    assert not any(ids["<|end|>"] in each for each in found)
    check_equal_ids(both, texts)  # all in one call, some of them by the reference


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return trained(split_by(list(PATTERNS)[2]), normalizers.NFC())


def changed(stored: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with one value, at a dotted path, replaced."""
    copy = orjson.loads(orjson.dumps(stored))
    *parents, last = path.split(".")
    place = copy
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    return dict(copy)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("new", 1, "has the unknown part new"),
        ("model.type", "Unigram", "is not a BPE model"),
        ("model.merges", None, "has no vocabulary or no merges"),
        ("model.dropout", 0.1, "has the model option dropout=0.1"),
        ("model.byte_fallback", True, "has the model option byte_fallback=True"),
        ("model.continuing_subword_prefix", "##", "has the model option continuing_subword_prefix=##"),
        ("model.end_of_word_suffix", "</w>", "has the model option end_of_word_suffix=</w>"),
        ("model.new", 1, "has the model option new=1"),
        ("normalizer.type", "NFKC", "has the normaliser {'type': 'NFKC'}"),
        ("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\s+", "has an unknown pre-tokenizer"),
        ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "has an unknown pre-tokenizer"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "has an unknown pre-tokenizer"),
        ("pre_tokenizer.pretokenizers.1.use_regex", True, "has an unknown pre-tokenizer"),
        ("pre_tokenizer", None, "has an unknown pre-tokenizer"),
        ("post_processor", {"type": "BertProcessing"}, "has the post-processor {'type': 'BertProcessing'}"),
        ("added_tokens.1.lstrip", True, "has the added token '<think>', found in some positions only"),
        ("added_tokens.1.normalized", True, "has added tokens of two kinds, found before and after normalising"),
    ],
)
def test_other_tokenizers_are_refused(stored: dict[str, Any], path: str, value: Any, reason: str) -> None:
    assert why_not_bytes(stored) is None
    other = changed(stored, path, value)
    assert why_not_bytes(other) == reason
    with pytest.raises(UsageError, match=r"^it (has|is) "):
        CachedByteEncoder(other, HubEncoder(orjson.dumps(stored), "the tokenizer"))


def test_vocabularies_that_do_not_fit_together_are_refused(stored: dict[str, Any]) -> None:
    vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
    cases = [
        (
            "model.vocab",
            {token: index for token, index in vocab.items() if token != "a"},
            "merge .* has parts that are no tokens",
        ),
        ("model.vocab", {token: index for token, index in vocab.items() if token != "ÿ"}, "no token for the byte 255"),
        ("model.vocab", {**vocab, "ÿÿÿÿ": 0}, "two tokens have the id 0"),
        ("model.vocab", {**vocab, "ÿÿÿÿ": -1}, "an id is below 0 or too high"),
        ("model.merges", [*merges, merges[0]], "a merge is there twice"),
        ("model.merges", [*merges, ["a"]], "a merge is not of two tokens of bytes"),
    ]
    for path, value, reason in cases:
        with pytest.raises(ValueError, match=reason):
            CachedByteEncoder(changed(stored, path, value), HubEncoder(orjson.dumps(stored), "the tokenizer"))


def test_merges_may_be_pairs_or_strings(stored: dict[str, Any]) -> None:
    pairs = stored["model"]["merges"]
    assert isinstance(pairs[0], list)
    strings = changed(stored, "model.merges", [" ".join(pair) for pair in pairs])
    assert np.array_equal(Both(strings).encoder.encode(FILES)[0], Both(stored).encoder.encode(FILES)[0])


def test_texts_that_are_no_text_are_refused(stored: dict[str, Any]) -> None:
    encoder = Both(stored).encoder
    with pytest.raises(UnicodeEncodeError):
        encoder.encode(["a", "\ud800"])
    with pytest.raises(TypeError, match="text 1 is not a str"):
        encoder.encode(["a", b"a"])  # type: ignore[list-item]
