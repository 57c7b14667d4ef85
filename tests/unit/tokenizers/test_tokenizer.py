"""tokenizer.json, folders and SentencePiece models give the same ids and one hash, and have an eod or are refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, processors

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import vocabulary_hash
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import ODD_TEXTS, convert, tokenizer_config, train
from tests.support.byte_level_bpe import byte_level_bpe
from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_documents, legible_ids, legible_tokenizer
from tests.support.source_texts import TEXT


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tokenizers: legible, sp (SentencePiece, both forms), bytes (GPT-2 style with a BOS template)."""
    root = tmp_path_factory.mktemp("tokenizers")
    legible_tokenizer(root / "legible")
    (root / "sp").mkdir()
    model = train([TEXT], 400)
    (root / "sp/tokenizer.model").write_bytes(model)
    (root / "sp/tokenizer.json").write_text(convert(model, "sp"))
    (root / "sp/tokenizer_config.json").write_text(tokenizer_config())
    byte_level = byte_level_bpe(400, [AddedToken(token, special=True) for token in ("<bos>", "<eos>")])
    byte_level.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 400)])
    (root / "bytes").mkdir()
    byte_level.save(str(root / "bytes/tokenizer.json"))
    config = {"eos_token": {"content": "<eos>", "special": True}, "auto_map": {"AutoTokenizer": ["x.X", None]}}
    (root / "bytes/tokenizer_config.json").write_text(json.dumps(config))
    return root


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids, offsets = tokenizer.encode_batch([text])
    assert offsets.tolist() == [0, len(ids)]
    return [int(number) for number in ids]


def test_legible_ids_come_flat_with_offsets(folders: Path) -> None:
    tokenizer = load_tokenizer(str(folders / "legible"))
    ids, offsets = tokenizer.encode_batch([*legible_documents(3, 4), ""])
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert ids.tolist() == [100 * document + position for document in range(3) for position in range(4)]
    assert offsets.tolist() == [0, 4, 8, 12, 12]
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.eod_token, tokenizer.name) == (
        VOCAB_SIZE,
        EOD_ID,
        "<eod>",
        "legible",
    )
    assert tokenizer.decode([*legible_ids(3, 2), EOD_ID]) == "300 301"


def test_no_texts_give_no_ids(folders: Path) -> None:
    for name in ("legible", "sp/tokenizer.model"):
        ids, offsets = load_tokenizer(str(folders / name)).encode_batch([])
        assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_no_specials_are_added_and_none_is_read_from_text(folders: Path) -> None:
    for name in ("bytes", "sp", "sp/tokenizer.model"):
        tokenizer = load_tokenizer(str(folders / name))
        ids = encoded(tokenizer, f"a {tokenizer.eod_token} <bos> <s>")
        assert tokenizer.eod_id not in ids
        assert ids[0] not in (1, 400)
        assert tokenizer.decode(ids) == f"a {tokenizer.eod_token} <bos> <s>"


def test_a_model_and_its_folder_give_the_same_ids_eod_and_hash(folders: Path) -> None:
    forms = [load_tokenizer(str(folders / "sp" / name)) for name in ("", "tokenizer.json", "tokenizer.model")]
    for text in (*ODD_TEXTS, TEXT):
        first, *others = [encoded(form, text) for form in forms]
        assert others == [first, first]
        assert forms[0].decode(first) == forms[2].decode(first)
    assert len({form.provenance(Direction.REVERSE) for form in forms}) == 1
    assert forms[0].eod_id == 402


def test_a_model_alone_ends_documents_with_its_own_eos(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "sp/tokenizer.model", tmp_path / "mine.model")
    alone = load_tokenizer(str(tmp_path / "mine.model"))
    assert (alone.name, alone.eod_token, alone.eod_id) == ("mine", "</s>", 2)
    assert load_tokenizer(str(tmp_path / "mine.model"), "<EOD>").eod_id == 402


def test_the_hash_depends_on_everything_that_decides_ids_and_on_nothing_else(folders: Path) -> None:
    stored = json.loads((folders / "bytes/tokenizer.json").read_text())
    before = vocabulary_hash(json.dumps(stored).encode())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    as_strings = {**stored, "model": {**stored["model"], "merges": merges}, "post_processor": None, "version": "9"}
    assert vocabulary_hash(json.dumps(as_strings, indent=3).encode()) == before
    stored["model"]["merges"][0], stored["model"]["merges"][1] = stored["model"]["merges"][1], stored["model"]["merges"][0]
    assert vocabulary_hash(json.dumps(stored).encode()) != before


def test_the_hash_rule_does_not_change_between_versions() -> None:
    """Shards of older versions must stay valid."""
    stored = b'{"version": "1.0", "padding": {}, "model": {"type": "BPE", "vocab": {"b": 1, "a": 0}, "merges": ["a b"]}}'
    assert (
        vocabulary_hash(stored)
        == hashlib.sha256(b'{"model":{"merges":[["a","b"]],"type":"BPE","vocab":{"a":0,"b":1}}}').hexdigest()
    )


@pytest.mark.parametrize("name", ["legible", "bytes", "sp", "sp/tokenizer.model"])
def test_a_saved_folder_is_the_same_tokenizer_here_and_in_transformers(folders: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(folders / name))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "llama"}')  # as in an export
    again = load_tokenizer(str(tmp_path / "saved"))
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again.sha256 == tokenizer.sha256
    assert (stock.eos_token_id, len(stock)) == (tokenizer.eod_id, tokenizer.vocab_size)
    texts = ["307 5 12"] if name == "legible" else [text for text in ODD_TEXTS if "<s>" not in text]
    for text in texts:
        assert stock(text).input_ids == encoded(again, text) == encoded(tokenizer, text)
        assert stock.decode(stock(text).input_ids) == tokenizer.decode(encoded(tokenizer, text))
    assert (tmp_path / "saved/tokenizer.model").exists() == name.endswith(".model")


def test_a_saved_tokenizer_stops_where_training_did(folders: Path, tmp_path: Path) -> None:
    """The exported eos is the eod of the shards, even if the source has another eos."""
    load_tokenizer(str(folders / "bytes"), "<bos>").save(tmp_path)
    assert load_tokenizer(str(tmp_path)).eod_token == "<bos>"
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_saved_folder_has_no_paths_and_no_secrets_of_its_source(folders: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folders / "legible", tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    paths = dict.fromkeys(
        ("special_tokens_map_file", "tokenizer_file", "vocab_file", "name_or_path"), str(tmp_path / "alice.json")
    )
    secrets = {"token": "hf_notasecretatall", "use_auth_token": "hf_notasecretatall"}
    (source / "tokenizer_config.json").write_text(json.dumps({**config, **paths, **secrets}))
    load_tokenizer(str(source)).save(tmp_path / "saved")
    saved = (tmp_path / "saved/tokenizer_config.json").read_text()
    assert "alice" not in saved
    assert "notasecret" not in saved


def test_a_tokenizer_without_eod_is_refused(tmp_path: Path) -> None:
    folder = legible_tokenizer(tmp_path / "no_eos", eos=False)
    with pytest.raises(UsageError, match=r"names no eos token.*--eod-token"):
        load_tokenizer(str(folder))
    with pytest.raises(UsageError, match="has no token '<eod>'"):
        load_tokenizer(str(folder), "<eod>")
    assert load_tokenizer(str(folder / "tokenizer.json"), "999").eod_id == 999


def test_paths_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "odd.json").write_text('{"model": 3}')
    (tmp_path / "broken.model").write_text("text")
    for name, kind, words in [
        ("absent", UsageError, "does not exist"),
        ("", UsageError, "neither tokenizer.json nor tokenizer.model"),
        ("merges.txt", UsageError, "neither a folder"),
        ("broken.json", DataError, "is not JSON"),
        ("other.json", DataError, "has no model"),
        ("odd.json", DataError, "not a tokenizer.json"),
        ("broken.model", DataError, "not a SentencePiece model"),
    ]:
        with pytest.raises(kind, match=words):
            load_tokenizer(str(tmp_path / name), "x")


def test_several_processes_save_one_folder_at_once(folders: Path, tmp_path: Path) -> None:
    """Array tasks do so."""
    code = "import sys; from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer\n"
    code += "for _ in range(30): load_tokenizer(sys.argv[1]).save(sys.argv[2])"
    command = [sys.executable, "-c", code, str(folders / "legible"), str(tmp_path / "saved")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
