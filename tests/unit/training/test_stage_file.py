"""A stage file: its form, its configs and overrides, and where each stage starts from."""

import shutil
from pathlib import Path

import pytest
import yaml

from megatron_ledom.checkpoint.manifest import CheckpointManifest, save_manifest
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.provenance import Provenance
from megatron_ledom.training.stages import Stage, check_stages, current_stage, load_stages
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


@pytest.mark.parametrize("by", ["the config", "the command line"])
def test_an_inherited_init_from_does_not_cut_the_chain(data: TinyData, tmp_path: Path, by: str) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(data.config.read_text() + (f"init_from: {tmp_path}/old\n" if by == "the config" else ""))
    entries = [{"config": str(base), "overrides": [f"run_dir={tmp_path}/{name}"]} for name in ("one", "two")]
    file, more = write(tmp_path, {"stages": entries}), [] if by == "the config" else [f"init_from={tmp_path}/old"]
    with pytest.raises(
        ConfigError, match=r"stage 2 has init_from=.*old from .*, so it would not start from stage 1 of 2 \(one\)"
    ):
        load_stages(file, more)
    for number, entry in enumerate(entries):
        entry["overrides"].append(f"init_from={tmp_path}/{'new' if number else 'old'}")
    stages = load_stages(write(tmp_path, {"stages": entries}))
    assert [Path(str(stage.config.init_from)).name for stage in stages] == ["old", "new"]


def test_a_stage_that_continues_needs_iterations_of_its_own(data: TinyData, tmp_path: Path) -> None:
    entries = [{"config": str(data.config), "overrides": [f"run_dir={tmp_path}/{name}"]} for name in ("one", "two")]
    entries[1]["overrides"].append("init_state=all")
    with pytest.raises(ConfigError, match=r"stage 2 of 2 \(two\): init_state=all continues stage 1 of 2 \(one\) at iteration"):
        check_stages(load_stages(write(tmp_path, {"stages": entries})), 1)


def test_an_incomplete_stage_before_another_is_refused(data: TinyData, tmp_path: Path) -> None:
    """Unless a later stage has started from its last checkpoint, which may have been deleted since."""
    overrides = [[f"run_dir={tmp_path}/one"], [f"run_dir={tmp_path}/two", f"init_from={tmp_path}/elsewhere"]]
    stages = load_stages(write(tmp_path, {"stages": [{"config": str(data.config), "overrides": one} for one in overrides]}))
    record = {"path": f"{tmp_path}/elsewhere", "init_from": f"{tmp_path}/elsewhere", "init_state": "weights"}
    begun = save_empty(stages[1], [record])
    with pytest.raises(MismatchError, match=r"stage 1 of 2 \(one\) is not complete, but stage 2 of 2 \(two\) has begun"):
        current_stage(stages)
    shutil.rmtree(begun)
    save_empty(stages[1], [{**record, "path": stages[0].last_checkpoint}, record])
    assert current_stage(stages) is stages[1]


def save_empty(stage: Stage, chain: list[dict[str, str]]) -> Path:
    """Make a checkpoint of a stage that has only a manifest; return its folder."""
    folder = Path(stage.config.run_dir, "checkpoints")
    (folder / "iter_0000001").mkdir(parents=True)
    provenance = Provenance(direction=Direction.REVERSE, tokenizer_name="t", tokenizer_sha256="0" * 64, vocab_size=9, eod_id=0)
    position = {"iteration": 1, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    save_manifest(CheckpointManifest.describe(stage.config, provenance, [], 1, chain, **position), str(folder / "iter_0000001"))
    (folder / "latest").write_text("iter_0000001\n")
    return folder
