"""A checkpoint that one rank cannot read ends every rank with the same exit code, although a load has no collectives from 0.18 on."""

import errno
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ledom.checkpoint.folder import COMMON_STATE
from megatron_ledom.checkpoint.manifest import load_manifest, save_manifest
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.platform.core_versions import needs_common_file
from tests.support.tiny_runs import TinyData, curve, read_metrics, run_on_ranks, start_ranks

COMMAND = (
    "train.train_iters=4",
    "optimizer.lr_warmup_iters=1",
    "parallel.tensor_model_parallel_size=2",
    "train.exit_interval=2",
)
UNCHECKED = "checkpoint.verify_on_load=false"


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("damaged") / "run"
    run_on_ranks(data.config, run_dir, *COMMAND, num_ranks=2)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_shard_of_one_rank_is_an_error_on_every_rank_with_the_name_of_the_file(
    data: TinyData, run_dir: Path, rank: int
) -> None:
    shard = min((run_dir / "checkpoints/iter_0000002").glob(f"__{rank}_*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    ranks = start_ranks(data.config, run_dir, *COMMAND, UNCHECKED, num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    assert ranks.output().count(f"is damaged: {shard} has sha256") == 2
    assert "Traceback" not in ranks.output()


def fail_reading(rank: int) -> None:
    """Let this rank's reads of shards fail, as a lost disk would."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    original = FileSystem.create_stream

    def create_stream(self: Any, path: Any, mode: str) -> Any:
        if os.environ["RANK"] == str(rank) and str(path).endswith(".distcp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(self, path, mode)

    FileSystem.create_stream = create_stream  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_one_rank_ends_every_rank_with_the_code_for_another_try(
    data: TinyData, run_dir: Path, rank: int
) -> None:
    ranks = start_ranks(data.config, run_dir, *COMMAND, UNCHECKED, num_ranks=2, hook=partial(fail_reading, rank))
    assert ranks.wait() == [3, 3], ranks.output()
    assert "Input/output error" in ranks.output()
    assert "check the disk, then start again" in ranks.output()
    run_on_ranks(data.config, run_dir, *COMMAND, UNCHECKED, num_ranks=2)


def agree() -> None:
    """Check, as one of two ranks, that both raise the error of the first rank that failed."""
    from megatron_ledom.config.schema import ParallelConfig
    from megatron_ledom.parallel.collectives import on_every_rank
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform

    start_distributed(prepare_platform(1), ParallelConfig())
    rank = dist.get_rank()

    def fail(errors: list[Exception | None]) -> int:
        error = errors[rank]
        if error is not None:
            raise error
        return rank

    assert on_every_rank(lambda: fail([None, None])) == rank
    gone = OSError(errno.ENOENT, "gone", "shard")
    for errors, kind, own, copy in (
        ([MismatchError("one"), None], MismatchError, "one", "rank 0: one"),
        ([None, UsageError("two")], UsageError, "two", "rank 1: two"),
        ([MismatchError("one"), UsageError("two")], MismatchError, "one", "rank 0: one"),
        ([None, KeyError("three")], (KeyError, RuntimeError), "'three'", "rank 1: KeyError: 'three'"),
        ([gone, None], FileNotFoundError, str(gone), "[Errno 2] gone (rank 0): 'shard'"),
        ([None, OSError("no number")], OSError, "no number", "rank 1: no number"),
    ):
        failed = next(index for index, error in enumerate(errors) if error is not None)
        with pytest.raises(kind) as caught:
            on_every_rank(lambda errors=errors: fail(errors))
        assert str(caught.value) == (own if rank == failed else copy)
    stop_distributed()


def test_all_ranks_raise_the_error_of_the_first_that_failed(data: TinyData, tmp_path: Path) -> None:
    ranks = start_ranks(data.config, tmp_path / "agree", num_ranks=2, instead=agree)
    assert ranks.wait() == [0, 0], ranks.output()


def keep_common_state_among_tensors() -> None:
    """Save as megatron-core 0.19 does without this package: no common.pt."""
    from megatron_ledom.checkpoint import folder, writing

    writing.take_common_state = lambda state: None  # type: ignore[assignment]
    writing.COMMON_FILES = tuple(name for name in folder.COMMON_FILES if name != COMMON_STATE)


def test_a_checkpoint_without_the_file_of_the_common_state_is_read_or_refused_with_advice(
    data: TinyData, trained: Path, tmp_path: Path, run_dir: Path
) -> None:
    """From 0.19 on megatron-core also finds that state among the tensors."""
    checkpoint = run_dir / "checkpoints/iter_0000002"
    if needs_common_file():
        (checkpoint / COMMON_STATE).unlink()
        manifest = load_manifest(str(checkpoint))
        files = {name: sums for name, sums in manifest.files.items() if name != COMMON_STATE}
        save_manifest(replace(manifest, files=files), str(checkpoint))
        ranks = start_ranks(data.config, run_dir, *COMMAND, num_ranks=2)
        assert ranks.wait() == [1, 1], ranks.output()
        assert "has no common.pt: megatron-core 0.19 or newer wrote it without this package" in ranks.output()
        return
    shutil.rmtree(run_dir)
    run_on_ranks(data.config, run_dir, *COMMAND, num_ranks=2, hook=keep_common_state_among_tensors)
    assert not (checkpoint / COMMON_STATE).exists()
    found = run_on_ranks(data.config, run_dir, *COMMAND, num_ranks=2)
    assert curve(found) == curve(run_on_ranks(data.config, trained, *COMMAND, num_ranks=2))


def save_extra_state(key: str) -> None:
    """Save one more object with the model, as releases up to 0.2.0 did for each of Transformer Engine's norms."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_ledom.checkpoint import store

    stock = store.sharded_weights

    def sharded_weights(model: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
        state = stock(model, metadata)
        next(iter(state.values()))[key] = ShardedObject(key, b"", (1,), (0,), replica_id=dist.get_rank())
        return state

    store.sharded_weights = sharded_weights


@pytest.mark.parametrize(("part", "is_read"), [("final_layernorm", True), ("layers.0.unknown", False)])
def test_the_extra_state_of_norms_in_older_checkpoints_is_not_read_and_other_keys_are_refused(
    data: TinyData, trained: Path, tmp_path: Path, part: str, is_read: bool
) -> None:
    run_dir, key = tmp_path / "run", f"decoder.{part}._extra_state"
    run_on_ranks(data.config, run_dir, *COMMAND, num_ranks=2, hook=partial(save_extra_state, key))
    ranks = start_ranks(data.config, run_dir, *COMMAND, num_ranks=2)
    if not is_read:
        assert ranks.wait() == [1, 1], ranks.output()
        assert key in ranks.output()
        return
    assert ranks.wait() == [0, 0], ranks.output()
    whole = Path(shutil.copytree(trained, tmp_path / "whole"))
    assert curve(read_metrics(run_dir)) == curve(run_on_ranks(data.config, whole, *COMMAND, num_ranks=2))
