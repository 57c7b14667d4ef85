"""Outdated checkpoints and remains are deleted, but never the one that `latest` names, and never partly."""

import os
from pathlib import Path

import pytest

from megatron_ledom.checkpoint import folder
from megatron_ledom.checkpoint.folder import finished_checkpoints, latest_checkpoint, outdated, put_in_place, retire, sweep
from megatron_ledom.config.schema import CheckpointConfig


@pytest.mark.parametrize(
    ("iterations", "latest", "keep_last", "keep_interval", "gone"),
    [
        ([1, 2, 3, 4], 4, None, None, []),
        ([1, 2, 3, 4], 4, 2, None, [1, 2]),
        ([1, 2, 3, 4], 4, 9, None, []),
        ([2, 4, 6, 8, 10, 12], 12, 2, 4, [2, 6]),
        ([1, 2, 3, 4], 4, 1, 1, []),
        ([1, 2, 3, 4], 2, 1, None, [1]),  # set back to 2: 3 and 4 neither count nor are deleted
        ([10, 30, 40], 20, 1, None, []),
        ([], 5, 1, None, []),
    ],
)
def test_newest_and_multiples_are_kept(
    iterations: list[int], latest: int, keep_last: int | None, keep_interval: int | None, gone: list[int]
) -> None:
    assert outdated(iterations, latest, CheckpointConfig(keep_last=keep_last, keep_interval=keep_interval)) == gone


@pytest.mark.parametrize(
    ("replayed", "gone"), [([15], [20, 30]), ([15, 25], [30]), ([45], [10, 20, 30]), ([5], [10, 20, 30]), ([20], [20, 30])]
)
def test_the_checkpoint_before_a_bad_step_is_kept(replayed: list[int], gone: list[int]) -> None:
    assert outdated([10, 20, 30, 40, 50], 50, CheckpointConfig(keep_last=2), replayed) == gone


def make(folder: Path, *iterations: int) -> None:
    for iteration in iterations:
        name = f"iter_{iteration:07d}"
        (folder / f"{name}.part").mkdir(parents=True)
        (folder / f"{name}.part/manifest.json").write_text("{}")
        put_in_place(str(folder), name)


def test_outdated_checkpoints_are_renamed_in_one_step_and_deleted_later(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    (tmp_path / "iter_0000001.0.trash").mkdir()  # from a kill while the trash was being deleted
    retire(str(tmp_path), CheckpointConfig(keep_last=1))
    assert sorted(os.listdir(tmp_path)) == [
        "iter_0000001.0.trash",
        "iter_0000001.1.trash",
        "iter_0000002.0.trash",
        "iter_0000003",
        "latest",
    ]
    assert finished_checkpoints(str(tmp_path)) == {3: "iter_0000003"}
    (tmp_path / "iter_0000004.part").mkdir()
    (tmp_path / "iter_0000005.part").mkdir()
    (tmp_path / "latest.part").touch()
    (tmp_path / "my_notes.trash").mkdir()
    sweep(str(tmp_path), keep="iter_0000005.part")
    assert sorted(os.listdir(tmp_path)) == ["iter_0000003", "iter_0000005.part", "latest", "my_notes.trash"]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    (tmp_path / "iter_0000003").mkdir()
    assert list(finished_checkpoints(str(tmp_path))) == [1, 2]
    assert finished_checkpoints(str(tmp_path / "nowhere")) == {}
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_0000002")


def test_a_latest_that_another_process_renames_meanwhile_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "manifest.json").write_text("{}")
    (tmp_path / "latest").write_text("iter_0000001\n")
    answers = iter([None])
    whole = folder.latest_name
    monkeypatch.setattr(folder, "latest_name", lambda place: next(answers, whole(place)))
    assert folder.latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_0000001")
