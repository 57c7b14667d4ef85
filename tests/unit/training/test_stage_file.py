"""A stage file: its form, its configs and overrides, and where each stage starts from."""

from pathlib import Path

import pytest
import yaml

from megatron_ledom.errors import ConfigError
from megatron_ledom.training.stages import load_stages
from tests.support.tiny_runs import TinyData


def write(folder: Path, content: object) -> str:
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_each_stage_starts_from_the_last_checkpoint_of_the_one_before(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"base: {data.config}\nrun_dir: runs/first\n")
    entries = [
        {"config": "own.yaml", "name": "pretraining"},
        {"config": "own.yaml", "overrides": ["run_dir=runs/second", "train.train_iters=5"]},
        {"config": str(data.config), "overrides": ["run_dir=runs/third", "init_from=runs/first", "init_state=optimizer"]},
        {"config": str(data.config), "overrides": ["run_dir=runs/fourth", "init_from=elsewhere"]},
    ]
    stages = load_stages(write(tmp_path, {"stages": entries}), ["train.seed=3"])
    assert [stage.config.init_from for stage in stages] == [
        None,
        "runs/first/checkpoints/iter_0000020",
        "runs/first/checkpoints/iter_0000020",
        "elsewhere",
    ]
    assert {stage.config.train.seed for stage in stages} == {3}
    assert stages[0].title == "stage 1 of 4 (pretraining)"
    assert stages[1].last_checkpoint == "runs/second/checkpoints/iter_0000005"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": []}, "has no stages; expected `stages:`"),
        ({"stage": [{"config": "x"}]}, "stages: Field required; expected `stages:`"),
        ({"stages": [{"overrides": []}]}, "stages.0.config"),
        ({"stages": [{"config": "tiny", "init": "x"}]}, "stages.0.init"),
        ({"stages": [{"config": "nowhere.yaml"}]}, "nowhere.yaml does not exist"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_stages(write(tmp_path, content))
    assert message in str(error.value)


def test_two_stages_in_one_folder_are_refused(data: TinyData, tmp_path: Path) -> None:
    entries = [{"config": str(data.config)}, {"config": str(data.config), "overrides": ["train.seed=2"]}]
    with pytest.raises(ConfigError, match=r"stage 1 of 2 \(run\) and stage 2 of 2 \(run\) have the same run_dir="):
        load_stages(write(tmp_path, {"stages": entries}))


def test_two_stages_with_one_mirror_are_refused(data: TinyData, tmp_path: Path) -> None:
    config, mirror = str(data.config), f"checkpoint.mirror={tmp_path}/mirror"
    entries = [{"config": config, "overrides": [f"run_dir={tmp_path}/{name}", mirror]} for name in ("one", "two")]
    with pytest.raises(ConfigError, match=r"stage 1 of 2 \(one\) and stage 2 of 2 \(two\) have the same checkpoint.mirror="):
        load_stages(write(tmp_path, {"stages": entries}))
