"""Copies at a mirror and fetches from it: killed at any step, they lose nothing; who may write; what is kept."""

import hashlib
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from megatron_ledom.checkpoint.folder import latest_checkpoint, put_in_place, settle_latest
from megatron_ledom.checkpoint.manifest import MANIFEST, CheckpointManifest, load_manifest, save_manifest
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, DataError, MismatchError
from megatron_ledom.mirror.contents import LOCAL_ID, RUN_FILES, Claim, check_mirror, read_latest, whole_checkpoints
from megatron_ledom.mirror.copying import Copier
from megatron_ledom.mirror.fetching import fetch_newest, wait_for_fetch
from megatron_ledom.mirror.store import MirrorStore, check_address
from megatron_ledom.mirror.uploader import Uploader
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.hashes import checksum, content_problems, size_problems
from tests.support.crashes import LOSSES, Job, Loss, Report, check_every_crash
from tests.support.paths import ROOT
from tests.support.served import until

CONFIG = str(ROOT / "examples/configs/quickstart_reverse.yaml")
FILES = ("__0_0.distcp", "common.pt")


BASE = load_config(CONFIG)


def config_of(run_dir: Path | str, mirror: Path | str | None, *more: str) -> RunConfig:
    config = load_config(CONFIG, more) if more else BASE
    checkpoint = replace(config.checkpoint, mirror=None if mirror is None else str(mirror))
    return replace(config, run_dir=str(run_dir), checkpoint=checkpoint)


def save(config: RunConfig, iteration: int, text: str = "") -> None:
    """Make a checkpoint of a few bytes, and the records of the run up to it."""
    run_dir, name = Path(config.run_dir), f"iter_{iteration:07d}"
    part = run_dir / "checkpoints" / f"{name}.part"
    part.mkdir(parents=True)
    for file in FILES:
        (part / file).write_text(f"{file} of {iteration}{text}\n" * 20)
    provenance = Provenance(
        direction=Direction.REVERSE, tokenizer_name="t", tokenizer_sha256="0" * 64, vocab_size=100, eod_id=0
    )
    position = {"iteration": iteration, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    manifest = CheckpointManifest.describe(config, provenance, [], 2, **position)
    files = {file: checksum(str(part / file)) for file in FILES}
    save_manifest(
        CheckpointManifest(**{**{key: getattr(manifest, key) for key in asdict(manifest)}, "files": files}), str(part)
    )
    put_in_place(str(part.parent), name)
    (run_dir / "tokenizer").mkdir(exist_ok=True)
    (run_dir / "tokenizer/tokenizer.json").write_text("{}")
    lines = "".join(json.dumps({"iteration": number}) + "\n" for number in range(1, iteration + 1))
    (run_dir / "metrics.jsonl").write_text(lines)
    (run_dir / LOCAL_ID).write_text("1234\n")


def copier_of(config: RunConfig) -> Copier:
    found = Copier(MirrorStore(str(config.checkpoint.mirror)), Claim.of(config), config.checkpoint)
    found.open(None)
    return found


def copy_all(config: RunConfig, *iterations: int) -> None:
    copier = copier_of(config)
    for iteration in iterations:
        copier.copy(f"iter_{iteration:07d}")
        copier.delete_outdated([], [])


def check_whole(checkpoint: str) -> int:
    files = load_manifest(checkpoint).files
    assert size_problems(checkpoint, files) == content_problems(checkpoint, files) == []
    return load_manifest(checkpoint).iteration


def before_copies(folder: Path) -> None:
    config = config_of(folder / "run", folder / "mirror")
    save(config, 1)
    save(config, 2)


def copies(folder: Path, report: Report) -> None:
    """Copy checkpoints 1 and 2, of which the mirror keeps one."""
    config = config_of(folder / "run", folder / "mirror")
    copier = copier_of(replace(config, checkpoint=replace(config.checkpoint, mirror_keep_last=1)))
    latest = read_latest(copier.store) or 0
    for iteration in range(latest or 1, 3):
        copier.copy(f"iter_{iteration:07d}")
        if iteration > latest:
            report()
        copier.delete_outdated([], [])


def kept_copies(folder: Path) -> int:
    store = MirrorStore(str(folder / "mirror"))
    latest = read_latest(store)
    for name in whole_checkpoints(store).values():
        check_whole(str(folder / "mirror/checkpoints" / name))
    assert latest is None or latest in whole_checkpoints(store)
    return latest or 0


def losses(*quick: str) -> pytest.MarkDecorator:
    """Return all losses as parameters, of which those that are not quick are slow tests."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in LOSSES}
    return pytest.mark.parametrize("loss", [pytest.param(loss, id=name, marks=marks[name]) for name, loss in LOSSES.items()])


@losses("power failure, removals lost")
def test_a_copy_that_is_killed_at_any_step_loses_nothing(tmp_path: Path, loss: Loss) -> None:
    job = Job(act=copies, kept=kept_copies, steps=50, before=before_copies)
    check_every_crash(job, tmp_path, loss, changing=("run.json", "owner.json", MANIFEST))


@losses("kill")
def test_a_fetch_that_is_killed_at_any_step_ends_with_the_same_bytes(tmp_path: Path, loss: Loss) -> None:
    source, mirror = config_of(tmp_path / "source", tmp_path / "mirror"), tmp_path / "mirror"
    save(source, 2)
    copy_all(source, 2)

    def before(folder: Path) -> None:
        """A machine without checkpoints, which knows the run."""
        (folder / "run").mkdir()
        (folder / "run" / LOCAL_ID).write_text("1234\n")

    def fetch(folder: Path, report: Report) -> None:
        fetch_newest(config_of(folder / "run", mirror))
        settle_latest(str(folder / "run/checkpoints"))  # as a start does
        report()

    def kept(folder: Path) -> int:
        latest = latest_checkpoint(str(folder / "run/checkpoints"))
        if latest is None:
            return 0
        assert (folder / "run/metrics.jsonl").read_bytes() == Path(source.run_dir, "metrics.jsonl").read_bytes()
        return check_whole(latest) // 2

    (tmp_path / "runs").mkdir()
    check_every_crash(Job(act=fetch, kept=kept, steps=25, before=before), tmp_path / "runs", loss)


def test_files_of_the_run_folder_are_newer_than_those_of_the_mirror(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 2)
    copy_all(config, 2)
    os.rename(tmp_path / "run/checkpoints", tmp_path / "lost")
    (tmp_path / "run/metrics.jsonl").write_text("own")
    (tmp_path / "run/tokenizer/tokenizer.json").unlink()
    fetch_newest(config)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "own"
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == "{}"
    wait_for_fetch(config)


def test_an_unfinished_fetch_is_replaced_by_that_of_a_later_checkpoint(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path / "run", tmp_path / "mirror"), tmp_path / "run"
    save(config, 1)
    save(config, 2)
    copy_all(config, 2)
    os.rename(run_dir / "checkpoints", tmp_path / "lost")
    (run_dir / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (run_dir / "fetch.json").write_text('["metrics.jsonl"]')
    fetch_newest(config)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (run_dir / "fetch.json").exists()


def test_a_run_that_was_set_back_is_continued_from_its_own_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    for iteration in (1, 2, 3):
        save(config, iteration)
    copy_all(config, 1, 2, 3)
    copier = Copier(MirrorStore(str(config.checkpoint.mirror)), Claim.of(config), config.checkpoint)
    copier.open(1)
    copier.copy("iter_0000001")
    assert read_latest(copier.store) == 1
    (tmp_path / "run/checkpoints/iter_0000002").rename(tmp_path / "old")
    save(config, 2, " again")
    copier.copy("iter_0000002")
    os.rename(tmp_path / "run/checkpoints", tmp_path / "lost")
    fetch_newest(config)
    assert latest_checkpoint(str(tmp_path / "run/checkpoints")) == str(tmp_path / "run/checkpoints/iter_0000002")
    assert "again" in (tmp_path / "run/checkpoints/iter_0000002/common.pt").read_text()


def test_copies_are_kept_by_the_rules_of_the_mirror(tmp_path: Path) -> None:
    more = "checkpoint.mirror_keep_last=2", "checkpoint.mirror_keep_interval=4"
    config = config_of(tmp_path / "run", tmp_path / "mirror", *more, "checkpoint.save_interval=1")
    for iteration in range(1, 9):
        save(config, iteration)
    copy_all(config, *range(1, 9))
    assert list(whole_checkpoints(MirrorStore(str(tmp_path / "mirror")))) == [4, 7, 8]


def test_another_run_is_refused_and_an_empty_folder_of_the_same_run_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("run", tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    save(config, 1)
    (tmp_path / "run" / LOCAL_ID).unlink()
    copy_all(config, 1)
    with pytest.raises(MismatchError, match=r"belongs to another run \(run_dir was 'run' and is 'other'\)"):
        check_mirror(config_of("other", tmp_path / "mirror"), may_adopt=True)
    os.rename("run", "machine1")
    with pytest.raises(MismatchError, match=r"train.seed was \d+ and is 5.*echo [0-9a-f]{32} > "):
        fetch_newest(config_of("run", tmp_path / "mirror", "train.seed=5"))
    with pytest.raises(MismatchError, match="has checkpoints, but not its id"):
        check_mirror(config, may_adopt=False)
    fetch_newest(config)
    check_mirror(config, may_adopt=False)


def test_the_later_of_two_launches_writes(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    first = copier_of(config)
    copier_of(config)
    with pytest.raises(MismatchError, match="is written by another launch of this run"):
        first.copy("iter_0000001")
    assert not whole_checkpoints(first.store)


def test_an_earlier_launch_replaces_nothing_of_the_later_one(tmp_path: Path) -> None:
    """Also if the process that copies is started again, and if its own checkpoint of that iteration is another one."""
    stale, config = (config_of(tmp_path / name, tmp_path / "mirror") for name in ("stale", "run"))
    save(stale, 1, " of the earlier launch")
    first = copier_of(stale)
    (tmp_path / "run").mkdir()
    save(config, 1)
    copy_all(config, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "mirror").rglob("*") if path.is_file()}
    again = Copier(first.store, first.claim, stale.checkpoint)
    for attempt in (
        lambda: first.copy("iter_0000001"),
        lambda: first.delete_outdated([], []),
        lambda: again.open(1, has_taken=True),
    ):
        with pytest.raises(MismatchError, match="is written by another launch of this run"):
            attempt()
    assert {path: path.read_bytes() for path in (tmp_path / "mirror").rglob("*") if path.is_file()} == before


def test_a_mirror_without_any_intact_copy_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    copy_all(config, 1)
    copy = tmp_path / "mirror/checkpoints/iter_0000001"
    (copy / "run/metrics.jsonl").write_text("changed")
    os.rename(tmp_path / "run/checkpoints", tmp_path / "lost")
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"all of the mirror .* are damaged"):
        fetch_newest(config)
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match="had checkpoints up to iteration 1, but has no whole one"):
        fetch_newest(config)
    assert latest_checkpoint(str(tmp_path / "run/checkpoints")) is None


@pytest.mark.parametrize("name", ["../escaped", "sub/../../escaped", "/escaped", "", "."])
@pytest.mark.parametrize("file", [MANIFEST, RUN_FILES])
def test_a_file_of_the_mirror_outside_its_folder_is_refused(tmp_path: Path, name: str, file: str) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    copy_all(config, 1)
    copy = tmp_path / "mirror/checkpoints/iter_0000001"
    escaped = name.replace("/escaped", f"{tmp_path}/escaped") if name.startswith("/") else name
    if file == MANIFEST:
        manifest = load_manifest(str(copy))
        manifest.files[escaped] = manifest.files["common.pt"]
        save_manifest(manifest, str(copy))
    else:
        files = json.loads((copy / file).read_text())["files"]
        files[escaped] = files["metrics.jsonl"]
        hashed = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        (copy / file).write_text(json.dumps({"files": files, "sha256_of_the_rest": hashed}))
    os.rename(tmp_path / "run", tmp_path / "lost")
    with pytest.raises(DataError, match=r"all of the mirror .* are damaged"):
        fetch_newest(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost", "mirror", "run"]
    assert latest_checkpoint(str(tmp_path / "run/checkpoints")) is None


def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    (tmp_path / "run/checkpoints/iter_0000001/common.pt").write_text("?")
    with pytest.raises(DataError, match="is damaged and is not copied"):
        copy_all(config, 1)


def test_the_newest_is_copied_first_it_is_held_and_deleted_ones_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    for iteration in (1, 2, 3, 4):
        save(config, iteration)
    with Uploader(config, Claim.of(config)) as uploader:
        uploader.add([2, 3, 4])
        uploader.poll()
        assert uploader.held == {4}
        os.rename(tmp_path / "run/checkpoints/iter_0000003", tmp_path / "deleted")
        uploader.finish(lambda: 30.0)
        assert uploader.mirrored == {2, 4}
        uploader.add([1, 4])
        assert not uploader.held
    assert "iter_0000003: deleted by checkpoint.keep_last before it was copied" in caplog.text
    assert list(whole_checkpoints(MirrorStore(str(tmp_path / "mirror")))) == [2, 4]


def test_a_copy_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    (tmp_path / "mirror").write_text("a file instead of a folder")
    with Uploader(config, Claim.of(config)) as uploader:
        uploader.add([1])
        uploader.finish(lambda: 0.0 if caplog.records else 60.0)
        assert not uploader.held
        assert "Not a directory" in caplog.text
        assert "next try in 5 s, training continues" in caplog.text
        (tmp_path / "mirror").unlink()
        uploader.finish(lambda: 60.0)
        assert uploader.mirrored == {1}
    assert "NOT copied" not in caplog.text


def test_a_process_that_dies_between_two_copies_is_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    with Uploader(config, Claim.of(config)) as uploader:
        uploader.add([1])
        uploader.finish(lambda: 60.0)
        # the process of the tests can have other children, such as the server of the warm Python
        running = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
        (child,) = [one for one in running if "megatron_ledom.mirror.process" in one.cmdline()]
        child.kill()
        until(lambda: child.status() == psutil.STATUS_ZOMBIE)
        save(config, 2)
        uploader.add([2])
        uploader.poll()
        assert "the process that copies does not run (Broken pipe); next try in 5 s" in caplog.text
        uploader.finish(lambda: 60.0)
        assert uploader.mirrored == {1, 2}
    assert "NOT copied" not in caplog.text


def test_polling_a_mirror_that_hangs_takes_no_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mirror_is_a_pipe")
    (tmp_path / "mirror").mkdir()
    os.symlink(tmp_path / "mirror_is_a_pipe", tmp_path / "mirror/run.json")
    config = config_of(tmp_path / "run", tmp_path / "mirror")
    save(config, 1)
    with Uploader(config, Claim.of(config)) as uploader:
        uploader.add([1])
        began = time.monotonic()
        for _ in range(100):
            uploader.poll()
        assert time.monotonic() - began < 1.0
        assert uploader.held == {1}
        began = time.monotonic()
        uploader.finish(lambda: 0.2)
    assert time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://key:secret@bucket/run", r"checkpoint.mirror=s3://\*\*\*@bucket/run contains credentials"),
        ("https://host/run?token=abcdef", r"checkpoint.mirror=https://host/run\?\*\*\* contains credentials"),
        ("runs/reverse/mirror", "are one folder, or one is inside the other"),
        ("runs", "are one folder, or one is inside the other"),
    ],
)
def test_addresses_that_cannot_work_are_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_address(config_of(Path("runs/reverse"), address))
    assert "abcdef" not in str(refused.value)
    check_address(config_of(Path("runs/reverse"), None))
