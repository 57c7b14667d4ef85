"""Inputs in an object store: s3:// against a server of the S3 protocol on this machine."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import read_texts
from megatron_ledom.data.readers.remote_stream import opened_remote
from megatron_ledom.errors import DataError, UsageError
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl

pytest.importorskip("s3fs", reason="the s3 extra is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed")

TEXTS = legible_documents(9, 60) * 40


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """An empty bucket. s3fs gets the address of the server from the environment, as for a user."""
    import s3fs

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("corpus")
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def shard(folder: Path, tokenizer: str, name: str, *inputs: str, **changes: Any) -> bytes:
    settings = {"input": list(inputs), "tokenizer": tokenizer, "output_prefix": f"{folder}/{name}", "workers": 2}
    preprocess(PreprocessSettings(**{**settings, **changes}))
    return Path(f"{folder}/{name}.bin").read_bytes()


def test_objects_give_the_bytes_of_the_same_files(tmp_path: Path, tokenizer: str, bucket: Any) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "c.parquet", row_group_size=50)
    for path in sorted(tmp_path.glob("?.*")):
        bucket.put(str(path), f"corpus/same/{path.name}")
    expected = shard(tmp_path, tokenizer, "local", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz", f"{tmp_path}/c.parquet")
    for number, pattern in enumerate(("s3://corpus/same/*", "s3://corpus/same")):
        assert shard(tmp_path, tokenizer, f"remote{number}", pattern, part_bytes=5000) == expected
    for task in range(3):
        preprocess(
            PreprocessSettings(
                input=["s3://corpus/same/*"],
                tokenizer=tokenizer,
                output_prefix=f"{tmp_path}/task",
                task_id=task,
                num_tasks=3,
                workers=1,
            )
        )
    assert b"".join((tmp_path / f"task-{task:05d}-of-00003.bin").read_bytes() for task in range(3)) == expected


def test_a_changed_object_has_another_version(bucket: Any) -> None:
    bucket.pipe("corpus/version/a.jsonl", b'{"text": "1"}\n')
    (before,) = expand_inputs(["s3://corpus/version/a.jsonl"])
    bucket.pipe("corpus/version/a.jsonl", b'{"text": "2"}\n')
    (after,) = expand_inputs(["s3://corpus/version/a.jsonl"])
    assert before.num_bytes == after.num_bytes
    assert before.version != after.version


def test_an_object_that_was_replaced_by_one_of_equal_size_is_refused(tmp_path: Path, tokenizer: str, bucket: Any) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    bucket.pipe({"corpus/replaced/a.jsonl": content, "corpus/replaced/b.jsonl": b"not a record"})
    with pytest.raises(DataError, match=r"b.jsonl"):
        shard(tmp_path, tokenizer, "resumed", "s3://corpus/replaced", part_bytes=5000, workers=1)
    assert list((tmp_path / "resumed.work").glob("part-*.json"))
    (source,) = expand_inputs(["s3://corpus/replaced/a.jsonl"])
    for stream in opened_remote(source, 1000, source.num_bytes):
        stream.read(10)
        bucket.pipe("corpus/replaced/a.jsonl", content.replace(b"1", b"2"))
        with pytest.raises(DataError, match=r"another version .* than when this run began"):
            stream.read(5000)
        break  # else the check at the end finds it, too
    with pytest.raises(DataError, match=r"another version .* than when this run began"):
        list(read_texts([source]))
    with pytest.raises(UsageError, match=r"a.jsonl has changed since \(same size, written again\)"):
        shard(tmp_path, tokenizer, "resumed", "s3://corpus/replaced", part_bytes=5000, workers=1)


@pytest.mark.parametrize("pattern", ["s3://corpus/absent.jsonl", "s3://corpus/absent/*.jsonl", "s3://nowhere/a.jsonl"])
def test_missing_objects_are_refused(bucket: Any, pattern: str) -> None:
    with pytest.raises(UsageError, match="does not exist or matches no file"):
        expand_inputs([pattern])
