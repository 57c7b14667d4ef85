"""Run folders that are damaged or incomplete: nothing in them is deleted or trained again without notice."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.folder import (
    LATEST,
    NEXT,
    find_checkpoint,
    finished_checkpoints,
    latest_checkpoint,
    saved_iteration,
    settle_latest,
)
from megatron_ledom.checkpoint.inspection import inspect_checkpoint
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import load_config
from megatron_ledom.errors import DataError
from megatron_ledom.pretrain import check_start
from tests.support.tiny_runs import TinyData, read_metrics, run_on_ranks, start_ranks

COMMAND = ("train.train_iters=6", "checkpoint.save_interval=2")
RESUME = ("train.train_iters=8",)


@pytest.fixture(scope="module")
def finished(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of iterations 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run_on_ranks(data.config, run_dir, *COMMAND, "logging.tensorboard=true")
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, which a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage_newest(checkpoints: Path) -> None:
    file = next((checkpoints / "iter_0000006").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def without_manifest(checkpoints: Path) -> None:
    (checkpoints / "iter_0000006/manifest.json").unlink()


def a_folder(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    (checkpoints / LATEST).mkdir()


def name(text: str | bytes) -> Callable[[Path], object]:
    return lambda checkpoints: (checkpoints / LATEST).write_bytes(text if isinstance(text, bytes) else text.encode())


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda checkpoints: (checkpoints / LATEST).unlink(), "is missing, but there are checkpoints", "iter_0000006"),
    "empty": (name(""), "latest is empty", "iter_0000006"),
    "gone": (name("iter_0000009\n"), "names 'iter_0000009', which does not exist", "iter_0000006"),
    "unfinished": (name("iter_0000006.part"), "which is not the name of a checkpoint", "iter_0000006"),
    "the folder itself": (name("."), "which is not the name of a checkpoint", "iter_0000006"),
    "a folder": (a_folder, "latest is a folder, not a file with the name of a checkpoint: move it away", "iter_0000006"),
    "garbage": (name(b"\xff\x00\xfe"), "which is not the name of a checkpoint", "iter_0000006"),
    "damaged": (damage_newest, "iter_0000006 is damaged", "iter_0000004"),
    "without a manifest": (without_manifest, "it is not a finished checkpoint", "iter_0000004"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_latest_that_cannot_be_followed_is_refused_with_the_newest_whole_checkpoint(
    data: TinyData, run_dir: Path, damage: str
) -> None:
    """The refusal changes nothing, and its advice works."""
    apply, says, newest = DAMAGES[damage]
    apply(run_dir / "checkpoints")
    before = content_of(run_dir)
    advice = f"is {newest}: to resume from it, run: echo {newest} > {run_dir}/checkpoints/{LATEST}"
    config = load_config(str(data.config), [f"run_dir={run_dir}", *RESUME])
    questions: list[Callable[[], object]] = [lambda: check_start(config, 1)]
    if damage != "damaged":  # --progress reads only the manifest
        questions.append(lambda: saved_iteration(checkpoint_folder(config)))
    for ask in questions:
        with pytest.raises(DataError) as caught:
            ask()
        assert says in str(caught.value)
        assert str(caught.value).endswith(advice)
    assert content_of(run_dir) == before
    if damage == "a folder":
        (run_dir / "checkpoints" / LATEST).rmdir()
    (run_dir / "checkpoints" / LATEST).write_text(newest + "\n")
    assert latest_checkpoint(str(run_dir / "checkpoints")) == str(run_dir / "checkpoints" / newest)


def test_a_start_whose_latest_is_missing_trains_nothing_and_changes_nothing(data: TinyData, run_dir: Path) -> None:
    (run_dir / "checkpoints" / LATEST).unlink()
    before = content_of(run_dir)
    ranks = start_ranks(data.config, run_dir, *RESUME, num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    assert "the newest complete checkpoint, by the sizes of its files, is iter_0000006" in ranks.output()
    assert content_of(run_dir) == before


def test_checkpoints_without_latest_and_manifests_do_not_start_from_scratch(data: TinyData, run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    for path in (checkpoints / LATEST, *checkpoints.glob("*/manifest.json"), *run_dir.glob("*.jsonl")):
        path.unlink()
    before = content_of(run_dir)
    ranks = start_ranks(data.config, run_dir, *RESUME, num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    names = "iter_0000002, iter_0000004, iter_0000006"
    assert f"is missing, but there are checkpoints, {names} ({names} without a manifest.json);" in ranks.output()
    assert content_of(run_dir) == before


def test_a_run_with_a_single_save_does_not_start_from_scratch_without_it(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(data.config, run_dir, *COMMAND, "train.exit_interval=2")
    assert [json.loads(line)["iteration"] for line in (run_dir / "saves.jsonl").read_text().splitlines()] == [2]
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(DataError, match=r"reached iteration 2 and had checkpoints, but .*checkpoints has none: restore them"):
        check_start(load_config(str(data.config), [f"run_dir={run_dir}", *COMMAND]), 1)


def test_a_full_disk_at_the_start_is_an_error_with_the_file_and_leaves_no_part(data: TinyData, run_dir: Path) -> None:
    ranks = start_ranks(data.config, run_dir, *RESUME, num_ranks=2, hook=partial(fill_disk_for, "held_out.json"))
    assert ranks.wait() == [1, 1], ranks.output()
    assert f"error: {run_dir}/held_out.json cannot be written: No space left on device; make room" in ranks.output()
    assert "Traceback" not in ranks.output()
    assert list(run_dir.glob("*.part")) == []


def fill_disk_for(name: str) -> None:
    """Let every write of this file to the disk fail."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{name}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = fsync


def test_other_commands_name_the_newest_whole_checkpoint_too(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / LATEST).unlink()
    for command in (find_checkpoint, inspect_checkpoint):  # a conversion calls the former
        with pytest.raises(
            DataError, match="is missing, but there are checkpoints, iter_0000002, iter_0000004, iter_0000006; the newest"
        ):
            command(str(run_dir))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
    ]


def test_missing_checkpoints_do_not_start_from_scratch(data: TinyData, run_dir: Path) -> None:
    (run_dir / "checkpoints").rename(run_dir.parent / "elsewhere")
    before = content_of(run_dir)
    ranks = start_ranks(data.config, run_dir, *COMMAND, num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    assert "reached iteration 6 and had checkpoints, but" in ranks.output()
    after = content_of(run_dir)
    assert {path: after[path] for path in before if path != "lock"} == {p: c for p, c in before.items() if p != "lock"}


def die_before_latest(kill_at: str) -> None:
    """End the process while it publishes the first checkpoint, as a kill would."""
    import os

    from megatron_ledom.checkpoint import folder

    module, function = {"rename": (os, "replace"), "publish": (folder, "publish_latest")}[kill_at]
    original = getattr(module, function)

    def die(*arguments: object) -> None:
        if kill_at == "publish" or str(arguments[0]).endswith("iter_0000002.part"):
            os._exit(9)
        original(*arguments)

    setattr(module, function, die)


@pytest.mark.parametrize(("kill_at", "resumes_from"), [("rename", 0), ("publish", 2)])
def test_a_kill_while_the_first_checkpoint_is_published_needs_no_repair(
    data: TinyData, tmp_path: Path, kill_at: str, resumes_from: int
) -> None:
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *COMMAND, hook=partial(die_before_latest, kill_at))
    assert ranks.wait() == [9], ranks.output()
    checkpoints = run_dir / "checkpoints"
    assert not (checkpoints / LATEST).exists()
    assert (checkpoints / (LATEST + NEXT)).read_text() == "iter_0000002\n"
    records = run_on_ranks(data.config, run_dir, *COMMAND)
    assert [record["iteration"] for record in records] == list(range(1, 7))
    launches = [json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines()]
    assert [launch["from_iteration"] for launch in launches] == [0, resumes_from]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000002", "iter_0000004", "iter_0000006", LATEST]


def test_a_checkpoint_announced_before_a_kill_does_not_override_latest(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / LATEST).write_text("iter_0000004\n")
    (checkpoints / (LATEST + NEXT)).write_text("iter_0000006\n")
    settle_latest(str(checkpoints))
    assert latest_checkpoint(str(checkpoints)) == str(checkpoints / "iter_0000004")
    assert list(finished_checkpoints(str(checkpoints))) == [2, 4, 6]


def fill_disk(limit_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))


def test_logs_that_cannot_be_written_do_not_end_a_run_and_its_checkpoints_are_saved(data: TinyData, run_dir: Path) -> None:
    """The logs have the largest possible size, and TensorBoard's folder is a file. Then there is space again."""
    limit = 2_000_000
    for log in ("metrics.jsonl", "steps.jsonl"):
        path = run_dir / log
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(first + b" " * (limit - len(first) - 1 - len(rest)) + b"\n" + rest)
    shutil.rmtree(run_dir / "tensorboard")
    (run_dir / "tensorboard").touch()
    command = (*RESUME, "logging.tensorboard=true")
    ranks = start_ranks(data.config, run_dir, *command, hook=partial(fill_disk, limit))
    assert ranks.wait() == [0], ranks.output()
    output = ranks.log.read_text()
    assert "Traceback" not in output
    assert (run_dir / "checkpoints" / LATEST).read_text() == "iter_0000008\n"
    for log in ("metrics.jsonl", "steps.jsonl", "tensorboard"):
        assert output.count(f"{run_dir}/{log} cannot be written (") == 1
        assert f"{run_dir}/{log} lacks 2 records that could not be written" in output
        assert f"not written: 2 records of {log}" in output or log == "steps.jsonl"
    (run_dir / "tensorboard").unlink()
    records = run_on_ranks(data.config, run_dir, "train.train_iters=9", "logging.tensorboard=true")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6, 9]
    assert read_metrics(run_dir) == records


def test_a_damaged_line_ends_a_start_with_its_file_and_line_and_code_1(data: TinyData, run_dir: Path) -> None:
    lines = (run_dir / "steps.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "steps.jsonl").write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    ranks = start_ranks(data.config, run_dir, *RESUME, num_ranks=2)
    assert ranks.wait() == [1, 1], ranks.output()
    assert f"error: {run_dir}/steps.jsonl:3: this line is damaged" in ranks.output()
    assert "Traceback" not in ranks.output()


def test_a_finished_run_reports_that_it_is_complete_before_anything_heavy(data: TinyData, run_dir: Path) -> None:
    before = content_of(run_dir)
    assert check_start(load_config(str(data.config), [f"run_dir={run_dir}", *COMMAND]), 2).startswith("the run is complete at")
    ranks = start_ranks(data.config, run_dir, *COMMAND, num_ranks=2, hook=forbid_the_heavy_start)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "is complete at iteration 6: nothing is left to do; raise train.train_iters to train longer" in ranks.output()
    assert content_of(run_dir) == before


def forbid_the_heavy_start() -> None:
    from megatron_ledom.platform import device

    device.prepare_platform = None  # type: ignore[assignment]
