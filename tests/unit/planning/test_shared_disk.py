"""Runs and mirrors on one disk are compared with its free space together, not one by one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_ledom import pretrain
from megatron_ledom.config.load import load_config
from megatron_ledom.errors import PlanError
from megatron_ledom.planning.plan import bytes_of_checkpoint
from megatron_ledom.planning.verdicts import DiskNeed, copies_to_come, disk_needs, shared_disk_verdicts
from tests.support.tiny_runs import TinyData

ALL_KEPT = ["checkpoint.keep_last=null", "checkpoint.save_interval=1", "data.allow_repeats=true"]


def checkpoints_that_fill(data: TinyData, folder: Path, part: float) -> int:
    """Return the number of checkpoints that need a part of the free space."""
    model = replace(load_config(str(data.config)).model, vocab_size=1_001)
    each = bytes_of_checkpoint(model, load_config(str(data.config)).optimizer)
    return round(part * shutil.disk_usage(folder).free / each)


@pytest.fixture
def stages(data: TinyData, tmp_path: Path) -> Path:
    """A file of two stages, of which each has room alone."""
    count = checkpoints_that_fill(data, tmp_path, 0.6)
    few = [f"train.train_iters={count}", "parallel.world_size=1"]
    entries = [
        {"config": str(data.config), "overrides": [f"run_dir={tmp_path / name}", *ALL_KEPT, *few]}
        for name in ("base", "anneal")
    ]
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({"stages": entries}), encoding="utf-8")
    return file


def test_stages_that_fit_one_by_one_but_not_together_are_refused(
    stages: Path, data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["--stages", str(stages), "--check", "1"]
    with pytest.raises(
        PlanError, match=r"disk: NO: together up to .* on one disk \(.* for run_dir=.*base, .* for run_dir=.*anneal\)"
    ):
        pretrain.main(check)
    assert pretrain.main([*check, "--accept-plan"]) == 0
    assert "all stages: disk: NO: together" in capsys.readouterr().out
    assert pretrain.main([*check, "checkpoint.keep_last=2"]) == 0
    assert "all stages: disk: together" in capsys.readouterr().out


def test_a_dry_run_of_stages_says_it_without_an_error(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--stages", str(stages), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# all stages: disk: together"))
    assert line.endswith("too little, if that is the run's disk")


def test_a_mirror_on_the_disk_of_the_run_counts(data: TinyData, tmp_path: Path) -> None:
    count = checkpoints_that_fill(data, tmp_path, 0.6)
    settings = [f"run_dir={tmp_path / 'run'}", *ALL_KEPT, f"train.train_iters={count}", "model.vocab_size=1001"]
    settings += [f"checkpoint.mirror=file://{tmp_path}/mirror", "checkpoint.mirror_keep_last=null"]
    config = load_config(str(data.config), settings)
    (verdict,) = shared_disk_verdicts(disk_needs(config, config.model))
    assert not verdict.holds
    assert f"for checkpoint.mirror=file://{tmp_path}/mirror" in verdict.text
    away = load_config(str(data.config), [*settings, "checkpoint.mirror=s3://bucket/run"])
    assert shared_disk_verdicts(disk_needs(away, away.model)) == []


def test_the_copies_at_the_mirror_are_counted_by_its_own_settings(data: TinyData) -> None:
    config = load_config(
        str(data.config), ["train.train_iters=100", "checkpoint.save_interval=10", "checkpoint.mirror=s3://b/r"]
    )
    assert (copies_to_come(config, []), copies_to_come(config, [], at_end=True)) == (4, 3)
    assert copies_to_come(config, [10, 20, 30]) == 1
    every = load_config(
        str(data.config), ["train.train_iters=100", "checkpoint.save_interval=10", "checkpoint.mirror_keep_interval=50"]
    )
    assert copies_to_come(every, [], at_end=True) == 4  # 50, and 80 to 100


def test_a_complete_stage_needs_less_than_while_it_trained(tmp_path: Path) -> None:
    folder, free = str(tmp_path), shutil.disk_usage(tmp_path).free
    first = DiskNeed("run_dir=base", 1, folder, at_most=free * 9 // 10, at_end=free // 10)
    second = DiskNeed("run_dir=anneal", 2, folder, at_most=free * 8 // 10, at_end=free * 7 // 10)
    assert shared_disk_verdicts([first, second])[0].holds
    assert not shared_disk_verdicts([first, replace(second, stage=1)])[0].holds
    assert shared_disk_verdicts([first]) == []


def test_folders_of_different_disks_are_not_added(tmp_path: Path) -> None:
    other = "/dev/shm"
    if not Path(other).is_dir() or Path(other).stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one disk")
    need = DiskNeed("run_dir=base", 1, str(tmp_path), at_most=1, at_end=1)
    assert shared_disk_verdicts([need, replace(need, folder=other)]) == []
