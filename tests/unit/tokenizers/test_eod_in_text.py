"""No document ends in its middle: the spelling of the eod is encoded as text, or its record is bad, with every tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HubTokenizer

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.inspection import InspectSettings, inspect_shards
from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards
from megatron_ledom.data.shards.shard import ShardReader, load_manifest
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.direction import to_text_order
from megatron_ledom.errors import DataError, UsageError, VerificationError
from megatron_ledom.finetune.pairs import PairSettings, prepare_pairs
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import _converted, parse_model, train
from tests.support.byte_level_bpe import write_byte_level_bpe
from tests.support.legible import EOD_ID, legible_shard, legible_tokenizer, write_jsonl
from tests.support.source_texts import TEXT

EOD = "<|endoftext|>"
SPELLED = [f"before {EOD} after", EOD, f"{EOD}{EOD}\n", f"a{EOD}b", "none here"]


def byte_level(folder: Path, normalizer: normalizers.Normalizer | None = None) -> str:
    """Return byte-level BPE whose eod is an added token that is not special."""
    added = [AddedToken(EOD, normalized=False), AddedToken("<tool>", normalized=False)]
    return write_byte_level_bpe(folder, 400, added, normalizer)


def replacing(folder: Path) -> str:
    """Return the same with a normaliser that csrc does not implement: fastokens or the tokenizers library encodes."""
    return byte_level(folder, normalizers.Replace("z", "y"))


def user_defined_model() -> bytes:
    """Return a SentencePiece model whose eod is a user-defined symbol."""
    proto = parse_model(train([TEXT], 400), "made here")
    proto.pieces.add(piece=EOD, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    return bytes(proto.SerializeToString())


def piece_model(folder: Path) -> str:
    """Return the .model alone."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(user_defined_model())
    return str(folder / "tokenizer.model")


def plain_model(folder: Path) -> str:
    """Return a model without user-defined pieces."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train([TEXT], 400))
    return str(folder / "tokenizer.model")


def both_forms(folder: Path) -> str:
    """Return a folder with both forms."""
    path = Path(piece_model(folder))
    (folder / "tokenizer.json").write_text(_converted(parse_model(path.read_bytes(), "made here")))
    return str(folder)


def stored_texts(prefix: str, tokenizer: str) -> list[str]:
    reader, loaded = ShardReader(prefix), load_tokenizer(tokenizer, EOD)
    return [
        loaded.decode(to_text_order(reader.document(index)[:-1], reader.manifest.direction)) for index in range(len(reader))
    ]


@pytest.mark.parametrize("make", [byte_level, replacing, piece_model, both_forms])
def test_a_spelled_eod_is_stored_as_text(tmp_path: Path, make: Callable[[Path], str]) -> None:
    tokenizer = make(tmp_path / "tokenizer")
    source, prefix = write_jsonl(tmp_path / "a.jsonl", SPELLED), str(tmp_path / "shard")
    preprocess(PreprocessSettings(input=[str(source)], tokenizer=tokenizer, output_prefix=prefix, workers=1, eod_token=EOD))
    assert verify_shard(prefix) == []
    assert stored_texts(prefix, tokenizer) == SPELLED
    assert load_manifest(prefix).skipped == {}


@pytest.mark.parametrize("make", [byte_level, piece_model, both_forms])
def test_hash_and_saved_folder_are_those_of_the_unchanged_tokenizer(tmp_path: Path, make: Callable[[Path], str]) -> None:
    tokenizer = make(tmp_path / "tokenizer")
    loaded = load_tokenizer(tokenizer, EOD)
    if make is not piece_model:  # its hash is that of its conversion
        assert loaded.is_eod_forced_to_text
        assert loaded.sha256 == load_tokenizer(tokenizer, "<tool>" if make is byte_level else "<s>").sha256
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).sha256 == loaded.sha256
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.encode_batch(SPELLED)[0].tolist() == loaded.encode_batch(SPELLED)[0].tolist()


@pytest.mark.parametrize("make", [byte_level, piece_model, both_forms])
def test_the_scorer_and_its_training_pairs_read_a_spelled_eod_as_text(tmp_path: Path, make: Callable[[Path], str]) -> None:
    tokenizer, lines = make(tmp_path / "tokenizer"), [{"question": text, "answer": text} for text in 20 * SPELLED]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"tokenizer": tokenizer, "eod_token": EOD, "output_prefix": str(tmp_path / "shard"), "seq_length": 200}
    manifest = prepare_pairs(PairSettings(input=[str(tmp_path / "pairs.jsonl")], **names))
    assert manifest.pairs["num_pairs"] == 20 * len(SPELLED)
    loaded = load_tokenizer(tokenizer, EOD)
    loaded.save(tmp_path / "saved")
    joint = JointTokenizer.from_pretrained(tmp_path / "saved")
    for text in SPELLED:
        assert joint.encode(text) == loaded.encode_batch([text])[0].tolist()
        assert loaded.eod_id not in joint.encode(text)


def unigram(folder: Path) -> str:
    """Return a tokenizer like T5's: </s> is special and also a piece of the model, so texts encode to it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -1.0) for character in "▁abcdefghijklmnopqrstuvwxyz</>")]
    tokenizer = HubTokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return str(folder)


@pytest.mark.parametrize(("deduplicate", "min_tokens"), [(False, 1), (True, 3)])
def test_a_record_is_bad_if_the_eod_cannot_be_text(tmp_path: Path, deduplicate: bool, min_tokens: int) -> None:
    tokenizer = unigram(tmp_path / "tokenizer")
    (tmp_path / "b.txt").write_text("x</s>")
    texts = ["one two", "one two", "a", "bad </s> one", "three"]
    sources = [str(write_jsonl(tmp_path / "a.jsonl", texts)), str(tmp_path / "b.txt")]
    settings = PreprocessSettings(
        input=sources,
        tokenizer=tokenizer,
        output_prefix=str(tmp_path / "shard"),
        workers=1,
        deduplicate=deduplicate,
        min_tokens=min_tokens,
    )
    with pytest.raises(DataError, match=r"a\.jsonl:4: the text contains the eod '</s>' = 1, .*--on-error skip"):
        preprocess(settings)
    settings.on_error = "skip"
    preprocess(settings)
    assert verify_shard(settings.output_prefix) == []
    assert load_manifest(settings.output_prefix).skipped["eod_in_text"] == 2
    kept = ["one two", "three"] if deduplicate else ["one two", "one two", "a", "three"]
    reader, loaded = ShardReader(settings.output_prefix), load_tokenizer(tokenizer)
    assert [loaded.decode(reader.document(index)[-2::-1]) for index in range(len(reader))] == kept


@pytest.mark.parametrize("eod", ["Ġthe", "e", "Ã"])
def test_a_piece_of_bytes_is_refused_as_eod(tmp_path: Path, eod: str) -> None:
    with pytest.raises(UsageError, match=r"ordinary piece.*--eod-token"):
        load_tokenizer(byte_level(tmp_path / "tokenizer"), eod)


@pytest.mark.parametrize("eod", ["▁the", "e", "<0x0A>"])
@pytest.mark.parametrize("make", [plain_model, both_forms])
def test_a_piece_of_a_sentencepiece_model_is_refused_as_eod(tmp_path: Path, make: Callable[[Path], str], eod: str) -> None:
    with pytest.raises(UsageError, match="ordinary piece"):
        load_tokenizer(make(tmp_path / "tokenizer"), eod)


def test_a_word_as_eod_is_refused_if_a_record_contains_it(tmp_path: Path) -> None:
    tokenizer = str(legible_tokenizer(tmp_path / "legible"))
    source = str(write_jsonl(tmp_path / "a.jsonl", ["1 2", "306 307 308"]))
    settings = PreprocessSettings(
        input=[source], tokenizer=tokenizer, output_prefix=str(tmp_path / "shard"), workers=1, eod_id=307
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: the text contains the eod '307' = 307"):
        preprocess(settings)


def test_a_shard_of_an_earlier_version_with_eod_inside_is_not_merged_and_the_advice_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = legible_shard(tmp_path / "shard", [[1, 2], [3, 4, 5]])
    content = bytearray(Path(f"{shard}.bin").read_bytes())
    content[2:4] = EOD_ID.to_bytes(2, "little")  # as earlier versions wrote it
    Path(f"{shard}.bin").write_bytes(content)
    manifest = json.loads(Path(f"{shard}.json").read_bytes())
    Path(f"{shard}.json").write_text(json.dumps({**manifest, "bin_sha256": sha256_of(f"{shard}.bin")}))
    with pytest.raises(DataError, match=r"shard\.bin has eod 1000 not only at the end"):
        merge_shards(MergeSettings(input=[shard], output_prefix=str(tmp_path / "merged")))
    assert not (tmp_path / "merged.bin").exists()
    with pytest.raises(VerificationError, match=r"ledom preprocess-data --overwrite; the eod came from a text that spells it"):
        inspect_shards(InspectSettings(prefixes=[shard], verify=True))
    assert "document 0 has eod 1000 inside" in capsys.readouterr().err
