"""If one rank cannot start, every rank ends at once, with the same error and exit code."""

import os
import time
from functools import partial
from pathlib import Path

from tests.support.tiny_runs import Hook, TinyData, run_on_ranks, start_ranks

SHORT = ("train.train_iters=2", "optimizer.lr_warmup_iters=1", "checkpoint.save_interval=1")


def end_of(data: TinyData, run_dir: Path, *overrides: str, hook: Hook | None = None) -> tuple[list[int], str]:
    """Run two ranks and return their exit codes and output."""
    ranks = start_ranks(data.config, run_dir, *SHORT, *overrides, num_ranks=2, hook=hook)
    return ranks.wait(60), ranks.output()


def in_a_short_job() -> None:
    """Simulate a job that ends in 300 s; without squeue its end is read from SLURM_JOB_END_TIME."""
    os.environ.update(SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(int(time.time()) + 300), PATH="")


def test_a_margin_longer_than_the_job_is_refused_by_every_rank(data: TinyData, tmp_path: Path) -> None:
    codes, output = end_of(data, tmp_path / "run", "train.exit_before_limit_seconds=600", hook=in_a_short_job)
    assert codes == [2, 2], output
    assert output.count("error: train.exit_before_limit_seconds=600, but SLURM ends this job in") == 2
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_rank_0_cannot_write_ends_every_rank(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "run/config.yaml").mkdir(parents=True)
    codes, output = end_of(data, tmp_path / "run")
    assert codes == [2, 2], output
    assert output.count("name a folder you may write to") == 2


def without_patience() -> None:
    from megatron_ledom.training import run_folder

    run_folder.PATIENCE_SECONDS = 0.5


def test_a_second_launch_of_a_run_is_refused_on_every_rank(data: TinyData, tmp_path: Path) -> None:
    from megatron_ledom.training.run_folder import lock_run

    with lock_run(str(tmp_path / "run")):
        codes, output = end_of(data, tmp_path / "run", hook=without_patience)
    assert codes == [2, 2], output
    assert output.count(f"is being written by process {os.getpid()} on ") >= 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def save_while_others_wait() -> None:
    """Let the previous launch save its first checkpoint and end after this one has looked for a checkpoint."""
    from contextlib import nullcontext

    from megatron_ledom.training import run_folder

    def lock_run(run_dir: str) -> nullcontext[None]:
        os.makedirs(f"{run_dir}/checkpoints/iter_0000002")
        with open(f"{run_dir}/checkpoints/latest", "w") as file:
            file.write("iter_0000002")
        return nullcontext()

    run_folder.lock_run = lock_run


def test_a_launch_that_waited_while_another_saved_ends_with_the_code_for_a_new_start(data: TinyData, tmp_path: Path) -> None:
    codes, output = end_of(data, tmp_path / "run", hook=save_while_others_wait)
    assert codes == [3, 3], output
    checkpoint = tmp_path / "run/checkpoints/iter_0000002"
    assert f"error: run_dir={tmp_path}/run: this launch found no checkpoint to resume from, but another launch saved" in output
    assert f"{checkpoint} while it waited; start it again" in output
    assert "Traceback" not in output


def see_no_checkpoint_on_rank_1() -> None:
    """Show rank 1 an old state of the folder, as a file system with a cache does."""
    if os.environ["RANK"] == "1":
        from megatron_ledom import pretrain

        pretrain.latest_checkpoint = lambda folder: None


def test_ranks_that_see_different_checkpoints_do_not_start(data: TinyData, tmp_path: Path) -> None:
    run_on_ranks(data.config, tmp_path / "run", *SHORT, "train.exit_interval=1", num_ranks=2)
    codes, output = end_of(data, tmp_path / "run", hook=see_no_checkpoint_on_rank_1)
    assert codes == [3, 3], output
    assert "the checkpoint to resume from is " in output
    assert "iter_0000001 on rank 0, but None on rank 1" in output


def ask_for_the_latest(config_file: str, folder: str) -> None:
    """Ask for the latest checkpoint, as one rank; rank 1 sees an old state of the folder."""
    from megatron_ledom.checkpoint import store
    from megatron_ledom.config.load import load_config
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform

    config = load_config(config_file)
    start_distributed(prepare_platform(1), config.parallel)
    seen = {"0": f"{folder}/iter_0000002", "1": f"{folder}/iter_0000001"}[os.environ["RANK"]]
    store.latest_checkpoint = lambda folder: seen
    assert store.CheckpointStore(folder, {"dp_cp_group": None}, config.checkpoint).latest() == f"{folder}/iter_0000002"
    stop_distributed()


def test_all_ranks_return_to_the_checkpoint_that_rank_0_sees(data: TinyData, tmp_path: Path) -> None:
    instead = partial(ask_for_the_latest, str(data.config), str(tmp_path))
    ranks = start_ranks(data.config, tmp_path / "run", num_ranks=2, instead=instead)
    assert ranks.wait(60) == [0, 0], ranks.output()
