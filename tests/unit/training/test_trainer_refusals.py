"""Runs that training refuses: the message says what to do, the exit code is 1 or 2, and no files remain."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.direction import Direction
from tests.support.legible import legible_ids, legible_tokenizer
from tests.support.tiny_runs import TinyData, run_command, run_on_ranks, start_ranks, write_shard, write_tiny_data

Prepare = Callable[[TinyData], list[str]]


def refused(data: TinyData, run_dir: Path, *overrides: str, num_ranks: int = 1) -> tuple[int, str]:
    """Return exit code and error message of a run that does not start, and check that it prints no traceback."""
    ranks = start_ranks(data.config, run_dir, *overrides, num_ranks=num_ranks)
    codes = set(ranks.wait())
    output = ranks.output()
    assert len(codes) == 1, output
    assert "Traceback" not in output
    return codes.pop(), output[output.index("error: ") :]


@pytest.fixture
def own(tmp_path: Path) -> TinyData:
    """Shards that a test may damage."""
    return write_tiny_data(tmp_path / "own")


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def missing_shard(data: TinyData) -> list[str]:
    return ["data.train_blend=[[1.0,nowhere/shard]]"]


def missing_bin(data: TinyData) -> list[str]:
    Path(data.shard("reverse_train") + ".bin").unlink()
    return []


def truncated_bin(data: TinyData) -> list[str]:
    path = Path(data.shard("reverse_train") + ".bin")
    path.write_bytes(path.read_bytes()[:-2])
    return []


def forward_shard(data: TinyData) -> list[str]:
    return [f"data.train_blend=[[1.0,{data.shard('forward_train')}]]"]


def forward_validation(data: TinyData) -> list[str]:
    return [f"data.valid_blend=[[1.0,{data.shard('forward_valid')}]]"]


def other_tokenizer(data: TinyData) -> list[str]:
    """Add a second shard whose tokenizer has one word less."""
    folder = legible_tokenizer(data.folder / "other")
    content = (folder / "tokenizer.json").read_text().replace('"999": 999', '"nine hundred ninety-nine": 999')
    (folder / "tokenizer.json").write_text(content)
    shard = write_shard(data.folder / "other_train", [legible_ids(0, 50)] * 100, Direction.REVERSE, folder)
    return [f"data.train_blend=[[1.0,{data.shard('reverse_train')}],[1.0,{shard}]]"]


def tokenizer_of_another_run(data: TinyData) -> list[str]:
    other_tokenizer(data)
    return [f"data.tokenizer={data.folder / 'other'}"]


def edited_manifest(data: TinyData, name: str, **fields: int) -> str:
    path = Path(data.shard(name) + ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return data.shard(name)


def validation_without_bytes(data: TinyData) -> list[str]:
    return [f"data.valid_blend=[[1.0,{edited_manifest(data, 'reverse_valid', text_bytes=0)}]]"]


def empty_shard(data: TinyData) -> list[str]:
    """Add an empty shard, as an array task without documents writes it."""
    shard = write_shard(data.folder / "empty", [], Direction.REVERSE, data.folder / "legible")
    return [f"data.train_blend=[[1.0,{data.shard('reverse_train')}],[1.0,{shard}]]"]


CASES: dict[str, tuple[Prepare, int, list[str]]] = {
    "missing shard": (missing_shard, 2, ["there is no shard nowhere/shard", "give the prefix"]),
    "missing .bin": (missing_bin, 1, ["reverse_train.bin is missing", "make it again"]),
    "truncated .bin": (truncated_bin, 1, ["reverse_train.bin is truncated", "copy the shard again"]),
    "forward shard": (forward_shard, 1, ["is forward, the run has data.direction=reverse", "set data.direction=forward"]),
    "forward validation": (forward_validation, 1, ["forward_valid is forward", "preprocess with --direction reverse"]),
    "validation without bytes": (validation_without_bytes, 2, ["lacks the number of text bytes", "--text-bytes"]),
    "empty shard": (empty_shard, 2, ["empty has no documents", "remove it from the blend"]),
    "two tokenizers": (other_tokenizer, 1, ["was made with tokenizer other", "use the same tokenizer for both"]),
    "another tokenizer": (tokenizer_of_another_run, 1, ["use the same tokenizer for both"]),
    "missing tokenizer": (lambda data: ["data.tokenizer=nowhere"], 2, ["tokenizer nowhere does not exist"]),
    "no shards": (lambda data: ["data.train_blend=[]"], 2, ["data.train_blend is empty", "ledom preprocess-data"]),
    "another vocabulary": (lambda data: ["model.vocab_size=999"], 1, ["has a vocabulary of 1001", "omit model.vocab_size"]),
    "repeats": (lambda data: ["train.train_iters=9999"], 2, ["it would be read", "set data.allow_repeats=true"]),
    "small validation set": (
        lambda data: [
            f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]",
            "train.global_batch_size=512",
            "data.allow_repeats=true",
        ],
        2,
        ["fewer than train.global_batch_size=512", "lower the batch"],
    ),
    "heads": (lambda data: ["parallel.tensor_model_parallel_size=3"], 2, ["does not divide", "it can be one of [1, 2, 4]"]),
    "ranks": (lambda data: ["parallel.tensor_model_parallel_size=2"], 2, ["1 ranks are not a multiple of the 2", "launch 2"]),
    "batch": (
        lambda data: ["train.micro_batch_size=3"],
        2,
        ["global_batch_size=8 is not a multiple", "the next multiple is 9"],
    ),
    "Transformer Engine": (
        lambda data: ["model.transformer_impl=transformer_engine"],
        2,
        ["cannot run here", "model.transformer_impl=torch or auto"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_leaves_no_files(own: TinyData, tmp_path: Path, name: str) -> None:
    prepare, expected, words = CASES[name]
    code, message = refused(own, tmp_path / "run", *prepare(own))
    assert code == expected
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_refused_by_the_command_with_the_nearest_name(data: TinyData, tmp_path: Path) -> None:
    done = run_command("--config", str(data.config), f"run_dir={tmp_path / 'run'}", "train.train_iter=5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "train.train_iter" in done.stderr
    assert "train.train_iters" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, message = refused(data, tmp_path / "file/run")
    assert code == 2
    assert "name a folder you may write to" in message
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three steps."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_on_ranks(data.config, run_dir, "train.train_iters=3")
    return run_dir


def test_a_checkpoint_of_another_run_is_refused_and_not_changed(data: TinyData, trained: Path) -> None:
    before = content_of(trained)
    forward = ["data.direction=forward", f"data.train_blend=[[1.0,{data.shard('forward_train')}]]"]
    for overrides, words in [
        (["model.ffn_hidden_size=128"], "model.ffn_hidden_size=128 but the checkpoint has 64"),
        (["model.num_layers=4", "model.kv_channels=16"], "model.num_layers=4 but the checkpoint has 2; model.kv_channels=16"),
        (["model.params_dtype=bf16"], "model.params_dtype=bf16 but the checkpoint has fp32"),
        (forward, "is reverse, this run's data is forward"),
        (["train.seed=7"], "train.seed was 42 and is 7; samples would be repeated or skipped silently"),
        (["train.seed=7"], "or allow the change with data.allow_changed_data=true"),
        (["data.seq_length=16"], "data.seq_length was 32 and is 16"),
        (
            [f"data.train_blend=[[99,{data.shard('reverse_train')}],[1,{data.shard('reverse_valid')}]]"],
            "data.train_blend had 1 shards, has 2",
        ),
        (
            [f"data.train_blend=[[1,{data.shard('reverse_valid')}]]", "train.train_iters=4"],
            "reverse_train: content (sha256 of .bin) was",
        ),
        (["data.split=[9,1,0]", "train.eval_iters=1"], "last document was 400 and is 360"),
        (["parallel.use_distributed_optimizer=true"], "set parallel.use_distributed_optimizer=false"),
    ]:
        code, message = refused(data, trained, *overrides)
        assert code == 1
        assert words in message
        assert content_of(trained) == before


def test_a_run_that_would_end_before_its_checkpoint_is_refused(data: TinyData, trained: Path) -> None:
    code, message = refused(data, trained, "train.train_iters=2", "optimizer.lr_warmup_iters=1")
    assert code == 2
    assert "is at iteration 3, after the end train.train_iters=2; set it to at least 3" in message


def test_a_replaced_idx_is_refused_by_every_rank_before_any_group_is_made(own: TinyData, tmp_path: Path) -> None:
    path = Path(own.shard("reverse_train") + ".idx")
    content = path.read_bytes()
    path.write_bytes(content[:34] + content[38:42] + content[34:38] + content[42:])  # exchange two lengths
    ranks = start_ranks(own.config, tmp_path / "run", num_ranks=1)
    assert ranks.wait() == [1]
    assert "reverse_train.idx does not have the sha256 of its manifest: it was replaced or damaged" in ranks.output()


def test_a_run_resumes_with_other_data_only_if_allowed_and_records_it(own: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(own.config, run_dir, "train.train_iters=3")
    other = [f"data.train_blend=[[1,{own.shard('reverse_train')}],[1,{own.shard('reverse_valid')}]]", "train.train_iters=4"]
    code, message = refused(own, run_dir, *other)
    assert code == 1
    assert "data.train_blend had 1 shards, has 2" in message
    assert not (run_dir / "data_changes.jsonl").exists()
    ranks = start_ranks(own.config, run_dir, *other, "data.allow_changed_data=true")
    assert ranks.wait() == [0], ranks.output()
    assert "OTHER TRAINING DATA than in" in ranks.output()
    note = json.loads((run_dir / "data_changes.jsonl").read_text())
    assert note["changed"] == ["data.train_blend had 1 shards, has 2"]
    assert load_manifest(str(run_dir / "checkpoints/iter_0000004")).config["data"]["allow_changed_data"] is True
    run_on_ranks(own.config, run_dir, *other)  # from now on these are its data


def test_a_default_spelled_out_is_the_same_architecture(data: TinyData, trained: Path) -> None:
    records = run_on_ranks(data.config, trained, "model.kv_channels=8", "model.num_query_groups=2", "train.train_iters=3")
    assert [record["iteration"] for record in records] == [1, 2, 3]


def test_a_damaged_checkpoint_is_named(data: TinyData, trained: Path) -> None:
    checkpoint = trained / "checkpoints/iter_0000003"
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    try:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for content, problem in [(whole[:middle], f"has {middle:,} bytes"), (b"", "has 0 bytes"), (flipped, "has sha256")]:
            largest.write_bytes(content)
            code, message = refused(data, trained, "train.train_iters=5")
            assert code == 1
            assert f"{checkpoint} is damaged: {largest} {problem}" in message
            assert "write its name into the file `latest` in the same folder" in message
    finally:
        largest.write_bytes(whole)
    (trained / "checkpoints/latest").write_text("iter_0000009\n")
    try:
        code, message = refused(data, trained)
    finally:
        (trained / "checkpoints/latest").write_text("iter_0000003\n")
    assert code == 1
    assert "names 'iter_0000009', which does not exist" in message


def test_an_exploding_run_stops_before_it_saves(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ["optimizer.lr=1e30", "optimizer.min_lr=1e30", "optimizer.lr_warmup_iters=0", "optimizer.clip_grad=0"]
    code, message = refused(data, run_dir, *overrides)
    assert code == 1
    assert "lower optimizer.lr" in message
    assert not (run_dir / "checkpoints").exists()
