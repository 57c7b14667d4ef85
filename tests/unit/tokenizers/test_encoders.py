"""The fastest encoder whose ids equal those of the reference is chosen; one with a single other id is not."""

import base64
import inspect
import json
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.tokenizers import encoders
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.tokenizers.encoders import FlatIds, HubEncoder, flat
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS, convert, tokenizer_config, train
from tests.support.byte_level_bpe import write_byte_level_bpe

TEXT = inspect.getsource(textwrap)
SAMPLES = [TEXT, *TEXT.splitlines()[:50]]


def byte_level(path: Path, normalizer: normalizers.Normalizer | None = None) -> str:
    """Write a byte-level BPE tokenizer.json of 500 tokens with an <eos>."""
    return write_byte_level_bpe(path, 500, [AddedToken("<eos>", special=True)], normalizer)


def same_ids(tokenizer: Tokenizer, reference: Tokenizer) -> bool:
    texts = [*ODD_TEXTS, "<eos> a<eos>", *SAMPLES]
    return all(np.array_equal(a, b) for a, b in zip(tokenizer.encode_batch(texts), reference.encode_batch(texts), strict=True))


def test_a_byte_level_vocabulary_is_encoded_by_units(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "bytes")
    tokenizer = load_tokenizer(path, "<eos>")
    assert tokenizer.use_fastest_encoder(SAMPLES).startswith("cached bytes (csrc), equal to tokenizers")
    assert same_ids(tokenizer, load_tokenizer(path, "<eos>"))


def test_an_unsupported_vocabulary_is_encoded_by_fastokens(tmp_path: Path) -> None:
    pytest.importorskip("fastokens", reason="the fast extra is not installed")
    path = byte_level(tmp_path / "bytes", normalizers.Replace("a", "b"))
    tokenizer = load_tokenizer(path, "<eos>")
    said = tokenizer.use_fastest_encoder(SAMPLES)
    assert said.startswith("fastokens ")
    assert "cached bytes cannot be used (it has the normaliser " in said
    assert same_ids(tokenizer, load_tokenizer(path, "<eos>"))


@pytest.mark.parametrize("form", ["", "tokenizer.model"])
def test_a_sentencepiece_vocabulary_is_encoded_by_units(tmp_path: Path, form: str) -> None:
    model = train([TEXT], 400)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer.json").write_text(convert(model, "sp"))
    (tmp_path / "tokenizer_config.json").write_text(tokenizer_config())
    tokenizer = load_tokenizer(str(tmp_path / form))
    assert tokenizer.use_fastest_encoder(SAMPLES).startswith("cached pieces (csrc), equal to ")
    assert same_ids(tokenizer, load_tokenizer(str(tmp_path / "tokenizer.json")))


def test_a_model_with_other_ids_than_the_tokenizer_json_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train([TEXT], 450))
    (tmp_path / "tokenizer.json").write_text(convert(train([TEXT], 400), "sp"))
    (tmp_path / "tokenizer_config.json").write_text(tokenizer_config())
    tokenizer = load_tokenizer(str(tmp_path))
    said = tokenizer.use_fastest_encoder(SAMPLES)
    assert "cached pieces gives other ids on" in said
    assert same_ids(tokenizer, load_tokenizer(str(tmp_path / "tokenizer.json")))


class WrongOnce:
    """An encoder with one wrong id in one sample."""

    name = "wrong once"

    def __init__(self, path: str) -> None:
        self.right = HubEncoder(Path(path).read_bytes(), path)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        ids, offsets = self.right.encode(texts)
        if SAMPLES[1] in texts:
            ids[offsets[list(texts).index(SAMPLES[1])]] ^= 1
        return ids, offsets


def test_an_encoder_with_one_wrong_id_is_not_used_and_the_reason_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = byte_level(tmp_path / "bytes")
    monkeypatch.setattr(
        "megatron_ledom.tokenizers.corpus_tokenizer.fast_encoders", lambda *_: [("wrong once", lambda: WrongOnce(path))]
    )
    assert SAMPLES[1].strip()
    tokenizer = load_tokenizer(path, "<eos>")
    said = tokenizer.use_fastest_encoder(SAMPLES)
    assert said == f"{HubEncoder(Path(path).read_bytes(), path).name}; wrong once gives other ids on {SAMPLES[1][:40]!r}"
    assert same_ids(tokenizer, load_tokenizer(path, "<eos>"))


def test_an_encoder_that_is_missing_or_cannot_load_the_tokenizer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> encoders.Encoder:
        raise ImportError("no module")

    def unable() -> encoders.Encoder:
        raise ValueError("unsupported normalizer\nmore")

    path = byte_level(tmp_path / "bytes")
    monkeypatch.setattr("megatron_ledom.tokenizers.corpus_tokenizer.fast_encoders", lambda *_: [("a", absent), ("b", unable)])
    said = load_tokenizer(path, "<eos>").use_fastest_encoder(SAMPLES)
    assert said.endswith("; a is not installed; b cannot be used (unsupported normalizer)")


def test_normalisation_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "bytes", normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    tokenizer = load_tokenizer(path, "<eos>")
    tokenizer.use_fastest_encoder(SAMPLES)
    assert same_ids(tokenizer, load_tokenizer(path, "<eos>"))
    assert tokenizer.encode_batch(["ＡＢＣ"])[0].tolist() == tokenizer.encode_batch(["abc"])[0].tolist()


def ranks_file(path: Path) -> dict[bytes, int]:
    """Return tiktoken ranks: the 256 bytes and the merges learnt from TEXT, in their order."""
    ranks = {bytes([value]): value for value in range(256)}
    pieces = [[bytes([value]) for value in word.encode()] for word in TEXT.replace("\n", " \n").split(" ")]
    while len(ranks) < 400:
        pairs: dict[bytes, int] = {}
        for word in pieces:
            for left, right in pairwise(word):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        pieces = [_merged(word, best) for word in pieces]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return ranks


def _merged(word: list[bytes], pair: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for piece in word:
        if merged and merged[-1] + piece == pair:
            merged[-1] = pair
        else:
            merged.append(piece)
    return merged


def test_tiktoken_ranks_give_the_ids_of_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="the tiktoken extra is not installed")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = ranks_file(tmp_path / "mine.tiktoken")
    with pytest.raises(UsageError, match="without their splitting pattern"):
        load_tokenizer(str(tmp_path / "mine.tiktoken"))
    config = {"pattern": pattern, "special_tokens": {"<|end|>": 400}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path / "mine.tiktoken"))
    tokenizer.use_fastest_encoder(SAMPLES)
    assert (tokenizer.eod_token, tokenizer.eod_id, tokenizer.vocab_size) == ("<|end|>", 400, 401)
    theirs = tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=config["special_tokens"])
    texts = [*ODD_TEXTS, "a<|end|>", *SAMPLES]
    found, expected = tokenizer.encode_batch(texts), flat([theirs.encode(text, disallowed_special=()) for text in texts])
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "special_tokens": {"<|end|>": 500}}))
    with pytest.raises(DataError, match="would get id 400 instead of 500"):
        load_tokenizer(str(tmp_path / "mine.tiktoken"))
