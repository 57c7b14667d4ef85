"""Tokens declared outside the vocabulary file get the ids of stock transformers in every reader, and keep their rows."""

import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError
from megatron_ledom.evaluation.harness.model import LedomLM
from megatron_ledom.inference import ForwardLM
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import append_specials, convert
from tests.support.published_folder import sentencepiece_model
from tests.support.tiny_models import CORPUS, byte_level_json, random_text, tiny_config

SIZES = {"model": 425, "json": 400}
"""Number of ids of the vocabulary file alone."""
# No text begins with a space: stock transformers 5 drops SentencePiece's dummy prefix there, this package keeps it.
TEXTS = ["the <|a|> cat<|b|>x", "<|a|>the<|b|>", "x  <|b|>\n<|a|> ", "a</s> x", "the<p> cat", "漢<|a|>字", ""]


def entry(content: str, *, special: bool = True) -> dict[str, Any]:
    return {
        "content": content,
        "special": special,
        **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False),
    }


def folder_of(folder: Path, kind: str, rows: int, **files: dict[str, Any]) -> Path:
    """Return a stock model folder with a vocabulary file of `kind` and other files: name without .json -> content."""
    torch.manual_seed(7)
    LlamaForCausalLM(tiny_config(rows, eos_token_id=2)).save_pretrained(folder)
    if kind == "model":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    else:
        (folder / "tokenizer.json").write_text(byte_level_json())
    name = {"model": "LlamaTokenizer", "json": "PreTrainedTokenizerFast"}[kind]
    files["tokenizer_config"] = {"tokenizer_class": name, "eos_token": "</s>", **files.get("tokenizer_config", {})}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def added(first: int) -> dict[str, dict[str, Any]]:
    """Return layout -> files that declare <|a|> and <|b|> after `first` ids."""
    entries = {str(first): entry("<|b|>"), str(first + 1): entry("<|a|>", special=False)}
    return {
        "added_tokens.json": {"added_tokens": {"<|b|>": first + 1, "<|a|>": first}},
        "added_tokens.json, one of them the eos": {
            "added_tokens": {"<|a|>": first, "<|b|>": first + 1},
            "tokenizer_config": {"eos_token": "<|a|>"},
        },
        "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": entries}},
        "added_tokens_decoder goes before the other files": {
            "tokenizer_config": {"added_tokens_decoder": entries},
            "added_tokens": {"<p>": first + 2},
            "special_tokens_map": {"pad_token": "<p>"},
        },
        "special_tokens_map.json": {
            "special_tokens_map": {"bos_token": "<|a|>", "pad_token": {"content": "<|b|>", "lstrip": False}}
        },
        "named in tokenizer_config.json": {"tokenizer_config": {"pad_token": "<|a|>", "image_token": "<|b|>"}},
        "special by name, its id in the vocabulary": {"tokenizer_config": {"pad_token": "the"}},
    }


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("layout", added(0))
def test_tokens_outside_the_vocabulary_file_are_those_of_stock_transformers(tmp_path: Path, kind: str, layout: str) -> None:
    folder = folder_of(tmp_path / "stock", kind, SIZES[kind] + 10, **added(SIZES[kind])[layout])
    stock = AutoTokenizer.from_pretrained(folder)
    model = ForwardLM.from_pretrained(folder)
    for text in TEXTS:
        assert model.tokenizer.encode(text) == stock(text, add_special_tokens=False).input_ids, text
    assert max(model.tokenizer.vocab.values()) + 1 == len(stock)
    assert load_tokenizer(str(folder), "</s>").vocab_size == len(stock)


@pytest.mark.parametrize("kind", SIZES)
def test_trained_rows_of_added_tokens_survive_import_and_export(tmp_path: Path, kind: str) -> None:
    first = SIZES[kind]
    folder = folder_of(tmp_path / "stock", kind, first + 10, **added(first)["added_tokens.json"])
    import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD)
    export_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    rows = [load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (folder, tmp_path / "back")]
    assert rows[1].shape[0] == first + 2
    assert torch.equal(rows[0][: first + 2], rows[1])
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")(TEXTS[0], return_tensors="pt").input_ids
    assert {first, first + 1} < set(ids[0].tolist())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back")(ids).logits.isfinite().all()
    assert ForwardLM.from_pretrained(tmp_path / "back").tokenizer.vocab["<|a|>"] == first


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"added_tokens": {"<|a|>": 403}},
            r"added_tokens.json gives '<\|a\|>' the id 403, but stock transformers gives it 400",
        ),
        ({"added_tokens": {"</s>": 400}}, "'</s>' the id 400, but stock transformers gives it 2"),
        ({"added_tokens": {"<|a|>": "400"}}, "expected a whole number"),
        ({"tokenizer_config": {"added_tokens_decoder": {"402": entry("<|a|>")}}}, "the id 402"),
        ({"tokenizer_config": {"added_tokens_decoder": {"400": "<|a|>"}}}, "expected an id and an object"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<|a|>"]}}, "expected an object of id: token"),
    ],
)
def test_an_id_that_stock_transformers_would_not_give_is_refused(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    folder = folder_of(tmp_path / "stock", "json", 410, **files)
    with pytest.raises(DataError, match=words):
        ForwardLM.from_pretrained(folder)
    with pytest.raises(DataError, match=words):
        load_tokenizer(str(folder), "</s>")


def test_an_added_token_without_a_row_is_refused_and_a_mere_name_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MismatchError, match="use ids up to 401, the model has 400"):
        ForwardLM.from_pretrained(folder_of(tmp_path / "ids", "json", 400, added_tokens={"<|a|>": 400, "<|b|>": 401}))
    named = {"pad_token": "<|a|>", "extra_special_tokens": {"image_token": "<|b|>"}, "additional_special_tokens": ["<|c|>"]}
    folder = folder_of(tmp_path / "name", "json", 400, tokenizer_config=named)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(str(folder))
    assert "skipped pad_token '<|a|>': it is not a token of the tokenizer" in caplog.text
    tokenizer.save(tmp_path / "saved")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == tokenizer.vocab_size == 400


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_begins_with_bos_if_the_folder_requires_it(tmp_path: Path, adds_bos: bool) -> None:
    folder = folder_of(tmp_path / "stock", "model", 440, tokenizer_config={"add_bos_token": adds_bos})
    ids = AutoTokenizer.from_pretrained(folder)("the cat").input_ids
    model = ForwardLM.from_pretrained(folder)
    assert model.leading_ids == ([1] if adds_bos else [])
    assert [*model.leading_ids, *model.tokenizer.encode("the cat")] == ids
    assert LedomLM(folder)._start == 1  # the bos of the .model, as stock transformers names it


def test_no_dummy_prefix_follows_a_user_defined_piece(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>", "<t"],
        minloglevel=2,
    )
    model = append_specials(written.getvalue())
    pieces, converted = sentencepiece.SentencePieceProcessor(model_proto=model), Tokenizer.from_str(convert(model, "a model"))
    converted.encode_special_tokens = True
    rng = random.Random(0)
    for _ in range(1000):
        text = rng.choice(["<tool>", "<t", "<to", " "]).join(["", *(random_text(rng) for _ in range(rng.randint(1, 3)))])
        assert converted.encode(text, add_special_tokens=False).ids == pieces.encode(text), text
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    joint = JointTokenizer.from_pretrained(tmp_path, specials_are_text=True)
    for text in ("<tool>", "<t", "<tool><t", "a<tool>"):
        assert joint.encode(text) == joint.split("", text)[0] == pieces.encode(text)


def test_words_that_the_model_file_lacks_are_cut_out_by_preprocessing_too(tmp_path: Path) -> None:
    """The cached SentencePiece encoder is not used: the texts that compare encoders may lack a rare token."""
    folder = folder_of(tmp_path / "stock", "model", 440, added_tokens={"<|a|>": 425})
    saved = load_tokenizer(str(folder))
    saved.save(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.model").write_bytes(sentencepiece_model())
    for path in (folder, tmp_path / "saved"):
        tokenizer = load_tokenizer(str(path))
        chosen = tokenizer.use_fastest_encoder(["the cat"])
        ids, _ = tokenizer.encode_batch(["the <|a|> cat"])
        assert 425 in ids.tolist(), chosen
        assert ids.tolist() == JointTokenizer.from_pretrained(path).encode("the <|a|> cat")


def test_a_vocabulary_in_files_of_a_stock_class_has_the_ids_of_stock_transformers_in_every_reader(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "stock", "json", 420, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}
    )
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in stored["merges"]))
    stock, model = AutoTokenizer.from_pretrained(folder), ForwardLM.from_pretrained(folder)
    for text in TEXTS:
        ids = stock(text, add_special_tokens=False).input_ids
        assert model.tokenizer.encode(text) == ids
        assert "</s>" in text or load_tokenizer(str(folder)).encode_batch([text])[0].tolist() == ids


def test_an_ambiguous_tokenizer_is_refused_or_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "stock", "model", 440, tokenizer_config={"add_prefix_space": False})
    with pytest.raises(DataError, match="add_prefix_space=false"):
        load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(str(folder)).eod_id == 2
    assert "its eos '</s>' (id 2), but it also has <EOD> = 422" in caplog.text
    (folder / "tokenizer.json").symlink_to(tmp_path / "not fetched")
    with pytest.raises(DataError, match=r"tokenizer.json is a link to a file that does not exist"):
        ForwardLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*SIZES, "stock class"])
def test_a_secret_in_a_tokenizers_config_is_no_token_and_is_written_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    secret = "hf_notasecretatall"
    named = {"hf_token": secret, "image_token": "the", "eot_token": "</s>", "frobnicate_token": "<s>"}
    folder = folder_of(tmp_path / "stock", "model" if kind == "model" else "json", 500, tokenizer_config=named)
    if kind == "stock class":
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
        config = {**json.loads((folder / "tokenizer_config.json").read_text()), "tokenizer_class": "GPT2Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.DEBUG):
        tokenizer = load_tokenizer(str(folder), "</s>")
        vocab = ForwardLM.from_pretrained(folder, device="cpu").tokenizer.vocab
    assert "skipped hf_token: it is not a known role of a special token" in caplog.text
    assert "frobnicate" not in caplog.text
    assert secret not in caplog.text
    assert secret not in vocab
    tokenizer.save(tmp_path / "saved")
    assert [path for path in (tmp_path / "saved").rglob("*") if path.is_file() and secret in path.read_text("latin-1")] == []


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
@pytest.mark.parametrize("value", [5, "abc", True])
def test_special_tokens_that_are_no_list_are_refused_by_key(tmp_path: Path, key: str, value: Any) -> None:
    folder = folder_of(tmp_path / "stock", "json", 410, tokenizer_config={key: value})
    with pytest.raises(DataError, match=f"tokenizer_config.json: {key} is a {type(value).__name__}, expected a list"):
        load_tokenizer(str(folder), "</s>")
