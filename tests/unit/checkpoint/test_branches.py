"""Checkpoints of a branch that a run has abandoned count nowhere: not for averages, nor for what is kept, mirrored or fetched."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.branches import abandoned
from megatron_ledom.checkpoint.folder import finished_checkpoints, how_to_resume, own_checkpoints, put_in_place, retire
from megatron_ledom.checkpoint.manifest import CheckpointManifest, save_manifest
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import CheckpointConfig, RunConfig
from megatron_ledom.convert.average import choose_checkpoints
from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.mirror.contents import Claim, whole_checkpoints
from megatron_ledom.mirror.copying import Copier
from megatron_ledom.mirror.fetching import candidates_of
from megatron_ledom.mirror.store import MirrorStore
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.hashes import checksum
from tests.support.paths import ROOT

PROVENANCE = Provenance(direction=Direction.REVERSE, tokenizer_name="t", tokenizer_sha256="0" * 64, vocab_size=100, eod_id=0)
CONFIG = load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"))
START = datetime(2026, 1, 1, tzinfo=UTC)


def at(minutes: int) -> str:
    return (START + timedelta(minutes=minutes)).isoformat(timespec="seconds")


def launch(run: Path, minutes: int, from_iteration: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "launches.jsonl").open("a") as file:
        file.write(json.dumps({"started_at": at(minutes), "from_iteration": from_iteration}) + "\n")


def save(run: Path, minutes: int, iteration: int) -> None:
    name = f"iter_{iteration:07d}"
    part = run / "checkpoints" / f"{name}.part"
    part.mkdir(parents=True)
    (part / "common.pt").write_text(f"{iteration} at {minutes}")
    position = {"iteration": iteration, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    manifest = CheckpointManifest.describe(CONFIG, PROVENANCE, [], 1, **position)
    files = {"common.pt": checksum(str(part / "common.pt"))}
    save_manifest(replace(manifest, created_at=at(minutes), files=files), str(part))
    put_in_place(str(run / "checkpoints"), name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that saved 10 to 40, was set back to 10, and continued with 15, 30 and 45, with a requeue at 30: 20 and 40 are left."""
    run = tmp_path / "run"
    launch(run, 0, 0)
    for iteration in (10, 20, 30, 40):
        save(run, iteration, iteration)
    (run / "checkpoints/latest").write_text("iter_0000010\n")
    launch(run, 60, 10)
    save(run, 75, 15)
    save(run, 90, 30)
    launch(run, 100, 30)
    save(run, 115, 45)
    return run


def config_of(run: Path, mirror: Path, keep_last: int | None = None) -> RunConfig:
    return replace(
        CONFIG, run_dir=str(run), checkpoint=replace(CONFIG.checkpoint, mirror=str(mirror), mirror_keep_last=keep_last)
    )


def test_a_checkpoint_counts_if_the_last_launch_before_it_made_it(run: Path) -> None:
    assert [*finished_checkpoints(str(run / "checkpoints"))] == [10, 15, 20, 30, 40, 45]
    assert [*own_checkpoints(str(run / "checkpoints"))] == [10, 15, 30, 45]
    records = [{"from_iteration": 0, "started_at": at(0)}, {"from_iteration": 10, "started_at": at(60)}]
    assert abandoned(records, [10, 20, 30], {10: at(10), 20: at(20), 30: at(60)}.get) == [20]
    assert abandoned(records, [20], lambda _: None) == []
    assert abandoned([{}, {}], [20], lambda _: at(20)) == []


def test_a_run_without_readable_launches_keeps_all(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "launches.jsonl").write_text("{\n" + (run / "launches.jsonl").read_text())
    assert own_checkpoints(str(run / "checkpoints")) == finished_checkpoints(str(run / "checkpoints"))
    assert "launches.jsonl" in caplog.text
    (run / "launches.jsonl").unlink()
    assert len(own_checkpoints(str(run / "checkpoints"))) == 6


def test_an_average_skips_them_and_reports_it_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_checkpoints([str(run)], 3, [])
    assert [os.path.basename(one) for one in chosen] == ["iter_0000015", "iter_0000030", "iter_0000045"]
    assert caplog.text.count("of a branch that the run has abandoned: iter_0000020, iter_0000040") == 1
    with pytest.raises(UsageError, match=r"iter_0000020 is of a branch that the run has abandoned: .* name the folder"):
        choose_checkpoints([str(run)], None, [15, 20])
    with pytest.raises(UsageError, match="has 4 trained checkpoints"):
        choose_checkpoints([str(run)], 5, [])


def test_they_take_no_place_among_those_that_are_kept(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    retire(str(run / "checkpoints"), CheckpointConfig(keep_last=None))
    assert len(finished_checkpoints(str(run / "checkpoints"))) == 6
    retire(str(run / "checkpoints"), CheckpointConfig(keep_last=3, keep_interval=20))
    assert [*finished_checkpoints(str(run / "checkpoints"))] == [15, 20, 30, 40, 45]
    retire(str(run / "checkpoints"), CheckpointConfig(keep_last=2, keep_interval=20))
    assert [*finished_checkpoints(str(run / "checkpoints"))] == [30, 40, 45]
    assert "deleting iter_0000020 of a branch that the run has abandoned" in caplog.text


def test_a_clock_that_was_set_back_deletes_none_of_the_newest(run: Path) -> None:
    """The last launch began at 100 by its clock; by the corrected one, its checkpoint and a later one are older than that."""
    save(run, 90, 50)
    save(run, 91, 60)
    (run / "checkpoints/latest").write_text("iter_0000060\n")
    retire(str(run / "checkpoints"), CheckpointConfig(keep_last=2))
    assert [*finished_checkpoints(str(run / "checkpoints"))] == [30, 40, 45, 50, 60]


def test_those_that_the_run_may_still_replace_stay(run: Path) -> None:
    (run / "checkpoints/latest").write_text("iter_0000015\n")
    launch(run, 120, 15)
    retire(str(run / "checkpoints"), CheckpointConfig(keep_last=1))
    assert [*finished_checkpoints(str(run / "checkpoints"))] == [15, 20, 30, 40, 45]


def test_no_advice_names_them(run: Path) -> None:
    save(run, 116, 60)
    launch(run, 130, 45)
    assert "is iter_0000045: to resume" in how_to_resume(str(run / "checkpoints"))


def test_the_mirror_neither_counts_nor_offers_them(run: Path, tmp_path: Path) -> None:
    config = config_of(run, tmp_path / "mirror", 3)
    copier = Copier(MirrorStore(str(tmp_path / "mirror")), Claim.of(config), replace(config.checkpoint, mirror_keep_last=None))
    copier.open(None)
    for iteration in (10, 15, 20, 30, 40, 45):
        copier.copy(f"iter_{iteration:07d}")
    copier.delete_outdated([], [])
    assert [*whole_checkpoints(copier.store)] == [10, 15, 20, 30, 40, 45]
    assert candidates_of(copier.store) == ["iter_0000045", "iter_0000030", "iter_0000015", "iter_0000010"]
    later = Copier(copier.store, copier.claim, config.checkpoint)
    later.open(45)
    assert sorted(later.delete_outdated([], [])) == ["iter_0000010"]
    assert [*whole_checkpoints(copier.store)] == [15, 20, 30, 40, 45]
    later.settings = replace(later.settings, keep_last=2)
    assert sorted(later.delete_outdated([], [])) == ["iter_0000015", "iter_0000020"]
