"""Shards: their files, how stock megatron-core reads them, and every kind of damage."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.data.shards.index_file import HEADER
from megatron_ledom.data.shards.shard import (
    Counts,
    InputFile,
    ShardManifest,
    ShardReader,
    ShardWriter,
    check_shard,
    choose_dtype,
    load_manifest,
)
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.provenance import Provenance
from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_ids

PROVENANCE = Provenance(
    direction=Direction.REVERSE, tokenizer_name="legible", tokenizer_sha256="a" * 64, vocab_size=VOCAB_SIZE, eod_id=EOD_ID
)
COUNTS = Counts(text_bytes=123, skipped={"no_tokens": 2}, input_files=[InputFile(path="x.jsonl", num_bytes=9, sha256="b" * 64)])


def packed(documents: list[list[int]], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([number for document in documents for number in document], np.uint32)
    offsets = np.cumsum([0, *map(len, documents)])
    return concatenate_documents(ids, offsets, direction=Direction.REVERSE, eod_id=EOD_ID, vocab_size=VOCAB_SIZE, dtype=dtype)


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16", *, overwrite: bool = False) -> str:
    """A shard of several documents, appended in two pieces."""
    with ShardWriter(str(prefix), PROVENANCE, dtype, overwrite=overwrite) as writer:
        writer.append(*packed(documents[:2], dtype))
        writer.append(*packed(documents[2:], dtype))
        writer.finalize(COUNTS)
    return str(prefix)


def legible(num_documents: int) -> list[list[int]]:
    return [legible_ids(document, 3 + document) for document in range(num_documents)]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return write(tmp_path / "data", legible(5))


def test_literal_bytes_of_the_format(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data", [[100, 101], [300]])
    assert Path(f"{prefix}.bin").read_bytes() == np.array([101, 100, 1000, 300, 1000], "<u2").tobytes()
    assert Path(f"{prefix}.idx").read_bytes() == b"".join(
        [
            b"MMIDIDX\0\0" + b"\1\0\0\0\0\0\0\0" + b"\x08",
            np.array([2, 3], "<u8").tobytes(),
            np.array([3, 2], "<i4").tobytes(),
            np.array([0, 6], "<i8").tobytes(),
            np.array([0, 1, 2], "<i8").tobytes(),
        ]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_reads_every_document(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = legible(5)
    prefix = write(tmp_path / "data", documents, dtype)
    stock, ours = IndexedDataset(prefix), ShardReader(prefix)
    assert len(stock) == len(ours) == 5
    assert stock.document_indices.tolist() == ours.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert stock.sequence_lengths.tolist() == ours.lengths.tolist() == [4, 5, 6, 7, 8]
    assert stock.index.sequence_pointers.tolist() == ours.pointers.tolist()
    for index, document in enumerate(documents):
        assert stock[index].tolist() == ours.document(index).tolist() == [*document[::-1], EOD_ID]
        assert stock[index].dtype == dtype
        assert stock.get(index, offset=1, length=2).tolist() == document[-2:-4:-1]


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, EOD_ID - 1), max_size=9), max_size=9))
def test_any_documents_are_read_back_in_model_order(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    reader = ShardReader(write(tmp_path_factory.mktemp("shard") / "data", documents))
    kept = [document for document in documents if document]
    assert [reader.document(index).tolist() for index in range(len(reader))] == [[*ids[::-1], EOD_ID] for ids in kept]
    assert verify_shard(reader.prefix) == []


def test_the_manifest_describes_the_shard(shard: str) -> None:
    manifest = check_shard(shard)
    assert manifest.provenance == PROVENANCE
    assert Provenance.from_dict(json.loads(Path(f"{shard}.json").read_text()), "manifest") == PROVENANCE
    assert (manifest.num_documents, manifest.num_tokens, manifest.dtype) == (5, 30, "uint16")
    assert (manifest.text_bytes, manifest.skipped, manifest.input_files) == (123, COUNTS.skipped, COUNTS.input_files)
    assert ShardManifest.from_dict(json.loads(manifest.to_json()), "manifest") == manifest


def test_an_index_outside_the_shard_is_refused(shard: str) -> None:
    for index in (-1, 5):
        with pytest.raises(IndexError):
            ShardReader(shard).document(index)


def test_an_unfinished_writer_leaves_no_files(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "new/data"), PROVENANCE, "uint16") as writer:
        writer.append(*packed(legible(2), "uint16"))
        assert (tmp_path / "new/data.bin.part").exists()
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_do_not_fit_the_lengths_make_no_shard(tmp_path: Path) -> None:
    """Ids in .bin that no length counts shift every later document."""
    with ShardWriter(str(tmp_path / "data"), PROVENANCE, "uint16") as writer:
        writer.append(*packed(legible(2), "uint16"))
        writer._bin.write(np.array([EOD_ID], np.uint16).tobytes())
        with pytest.raises(DataError, match="has 20 bytes, its 2 documents need 18"):
            writer.finalize(COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_ids_of_another_type_or_number_are_refused(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "data"), PROVENANCE, "uint16") as writer:
        with pytest.raises(TypeError, match="int32"):
            writer.append(*packed(legible(2), "int32"))
        with pytest.raises(ValueError, match="7 ids for documents of 9"):
            writer.append(np.zeros(7, np.uint16), np.array([4, 5], np.int32))


def test_an_existing_shard_is_kept_unless_overwrite_finishes(tmp_path: Path, shard: str) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"data.bin exists already.*--overwrite"):
        ShardWriter(shard, PROVENANCE, "uint16")
    with pytest.raises(RuntimeError), ShardWriter(shard, PROVENANCE, "uint16", overwrite=True):
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(ShardReader(write(tmp_path / "data", legible(2), overwrite=True))) == 2


def test_the_type_of_ids_is_megatron_cores_choice() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (1001, 65_499, 65_500, 65_536, 151_936):
        assert choose_dtype("auto", vocab_size) == DType.optimal_dtype(vocab_size)
    assert choose_dtype("uint16", 65_536) == np.uint16
    with pytest.raises(UsageError, match=r"uint16 stores ids up to 65,535, the tokenizer has ids up to 65,536"):
        choose_dtype("uint16", 65_537)


def test_a_missing_shard_or_manifest_is_named(tmp_path: Path, shard: str) -> None:
    with pytest.raises(UsageError, match="there is no shard"):
        check_shard(str(tmp_path / "other"))
    with pytest.raises(UsageError, match="give the prefix"):
        check_shard(f"{shard}.bin")
    Path(f"{shard}.json").unlink()
    with pytest.raises(DataError, match="the shard was not finished"):
        check_shard(shard)


def test_a_damaged_manifest_is_named(shard: str) -> None:
    path = Path(f"{shard}.json")
    stored = json.loads(path.read_text())
    for content, words in [
        ("{", "is not JSON"),
        ("[]", "does not contain a JSON object"),
        (json.dumps({**stored, "format_version": 9}), "format version 9"),
        (json.dumps({key: value for key, value in stored.items() if key != "eod_id"}), "lacks eod_id"),
        (json.dumps({key: value for key, value in stored.items() if key != "num_tokens"}), "not a complete manifest"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            load_manifest(shard)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_or_missing_file_is_refused_before_use(shard: str, suffix: str) -> None:
    path = Path(shard + suffix)
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"data{suffix} is truncated: it has {len(content) - 2} bytes"):
        check_shard(shard)
    assert "truncated" in verify_shard(shard)[0]
    path.write_bytes(content + b"\0\0")
    with pytest.raises(DataError, match="too long"):
        ShardReader(shard)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        check_shard(shard)


def change(path: str, offset: int, values: np.ndarray) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(values.tobytes())


def rehash(shard: str) -> None:
    """Make the manifest fit the damaged files, so that the deeper checks are reached."""
    from megatron_ledom.storage.hashes import sha256_of

    stored = json.loads(Path(f"{shard}.json").read_text())
    stored |= {"bin_sha256": sha256_of(f"{shard}.bin"), "idx_sha256": sha256_of(f"{shard}.idx")}
    Path(f"{shard}.json").write_text(json.dumps(stored))


def test_another_header_is_refused(shard: str) -> None:
    change(f"{shard}.idx", 17, np.uint8([4]))
    with pytest.raises(DataError, match="has the header"):
        check_shard(shard)


@pytest.mark.parametrize(
    ("suffix", "offset", "values", "words"),
    [
        (".idx", HEADER.size, np.array([5, 4], "<i4"), "the pointers are not the running sum"),
        (".idx", HEADER.size, np.array([5], "<i4"), "the lengths add up to"),
        (".idx", HEADER.size, np.array([1, 8], "<i4"), "no token before its eod"),
        (".idx", HEADER.size + 5 * 12, np.array([1], "<i8"), "the document indices"),
        (".bin", 2 * 3, np.array([7], "<u2"), "document 0 does not end with eod 1000"),
        (".bin", 2 * 5, np.array([1001], "<u2"), "id 1001 at 5 is outside the 1,001 ids"),
    ],
)
def test_verify_names_each_problem(shard: str, suffix: str, offset: int, values: np.ndarray, words: str) -> None:
    change(shard + suffix, offset, values)
    assert "sha256" in verify_shard(shard)[0]
    rehash(shard)
    assert any(words in problem for problem in verify_shard(shard))
