"""Killed at any step of its writing, a job resumes at the next start: no finished work is lost, and the result has the same bytes.

Every job is killed once before each open for writing, each fsync, rename and removal, in each write of lines, and at its end. The test
checks the files after the kill, or after a power failure; then it starts the job again and compares its result with an undisturbed run.
A job that does not force its content to the disk must fail these tests.
"""

from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megatron_ledom.checkpoint.folder import latest_checkpoint, move_to_trash, put_in_place, retire, settle_latest, sweep
from megatron_ledom.checkpoint.manifest import MANIFEST
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.sample_index import index_spec, prepare_indices
from megatron_ledom.errors import LedomError
from megatron_ledom.evaluation.item_file import ItemFile, numbered
from megatron_ledom.evaluation.results import write_summary
from megatron_ledom.inference.line_output import UnfinishedOutput, Window
from megatron_ledom.inference.reverse_reward.input_lines import RANKED, Record
from megatron_ledom.platform.launch import ALONE
from megatron_ledom.storage.files import sync, write_file, write_synced
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.storage.jobs import WorkFolder, finish_unit
from megatron_ledom.storage.lines import LineFile, whole_lines
from megatron_ledom.storage.records import append_record, as_line, drop_after, read_records
from tests.support.crashes import Job, Loss, Report, check_every_crash, every_loss
from tests.support.tiny_runs import TinyData

UNITS, LINES = 3, 6


def units_of_a_toy_job(folder: Path, report: Report) -> None:
    """Write units of work, then one file that joins them."""
    with WorkFolder(f"{folder}/result", {"units": UNITS}, start_over=False) as work:
        if (folder / "result").exists():
            return work.remove()
        for number in range(UNITS):
            path = work.path(f"unit-{number}")
            content = f"{number}\n" * 9
            if work.finished(f"unit-{number}") is None or Path(f"{path}.txt").read_text() != content:
                Path(f"{path}.txt").write_text(content)
                finish_unit(path, {"number": number})
            report()
        write_file(
            folder / "result", b"".join(Path(f"{work.path(f'unit-{number}')}.txt").read_bytes() for number in range(UNITS))
        )
        work.remove()


def kept_units(folder: Path) -> int:
    if (folder / "result").exists():
        return UNITS
    return len(list((folder / "result.work").glob("unit-*.json")))


def one_file(folder: Path, report: Report) -> None:
    write_file(folder / "result", "new\n" * 99)
    report()


def kept_file(folder: Path) -> int:
    content = (folder / "result").read_text()
    assert content in ("old\n" * 50, "new\n" * 99)
    return int(content[0] == "n")


def reranked_windows(folder: Path, report: Report) -> None:
    """Write the windows of a reranking whose lines need no model."""
    records = [Record(n, f"in:{n}", f"p{n}", [], {"prompt": f"p{n}"}) for n in range(LINES)]
    windows = [records[n : n + 2] for n in range(0, LINES, 2)]
    part = UnfinishedOutput(folder / "out.jsonl", {"settings": {"weight": 0.5}}, RANKED)
    if part.is_complete(records, overwrite=False):
        return
    for window in windows[part.resume(windows) :]:
        lines = [{**record.fields, "ranking": [0], "scores": [{"reward": -1.0}] * 9} for record in window]
        part.append(Window(lines, {"forward_tokens": 3, "reverse_tokens": 4, "seconds": 0.0}, dict.fromkeys(RANKED.counts, 2)))
        report()
    part.finish()


def kept_windows(folder: Path) -> int:
    if (folder / "out.jsonl").exists():
        assert len(whole_lines(folder / "out.jsonl")) == LINES
        return LINES // 2
    return min(max(0, len(whole_lines(folder / "out.jsonl.part.notes")) - 1), len(whole_lines(folder / "out.jsonl.part")) // 2)


def judged_items(folder: Path, report: Report) -> None:
    """Write the items of an evaluation, and its summary."""
    file = ItemFile(folder, "piqa.items", {"model": "m", "seed": 1})
    kept = file.resume(2, LINES, lambda number, record: None)
    for begin in range(len(kept), LINES, 2):
        file.append(numbered(begin, [{"gold": n, "text": "x" * 50} for n in range(begin, begin + 2)]))
        report()
    write_summary(folder, [], {"model": "m"})
    report()


def kept_items(folder: Path) -> int:
    return len(whole_lines(folder / "piqa.items.jsonl")) // 2 + (folder / "summary.md").exists()


def converted_folder(folder: Path, report: Report) -> None:
    """Replace a folder of several files, as an export with --overwrite."""
    with new_folder(f"{folder}/export", "config.json", may_replace=lambda: None) as part:
        for name in ("a.bin", "inner/b.bin", "config.json.part"):
            path = Path(part, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"new {name}\n" * 99)
    report()


def old_folder(folder: Path) -> None:
    (folder / "export").mkdir()
    (folder / "export/config.json").write_text("old\n")


def kept_folder(folder: Path) -> int:
    """Check that the old folder, perhaps moved aside, or the whole new one exists; an incomplete folder has no key."""
    place = folder / "export" if (folder / "export").exists() else folder / "export.old"
    content = (place / "config.json").read_text()
    for whole in (folder / "export", folder / "export.part"):
        if (whole / "config.json").exists() and (whole / "config.json").read_text() != "old\n":
            for name in ("a.bin", "inner/b.bin"):
                assert (whole / name).read_text() == f"new {name}\n" * 99
    return int(content != "old\n")


def records_of_a_run(folder: Path, report: Report) -> None:
    """Resume from iteration 2: later steps of the earlier launch are removed, bad steps stay."""
    steps, bad = str(folder / "steps.jsonl"), str(folder / "bad_steps.jsonl")
    for iteration in range(len(read_records(bad)) + 1, UNITS + 1):
        append_record(bad, {"iteration": iteration, "reason": "x" * 99})
        report()
    drop_after(steps, 2)
    file = LineFile(steps)
    for iteration in (3, 4):
        file.append(as_line({"iteration": iteration, "lm_loss": 1.5}))
    file.sync()
    file.close()


def steps_of_the_launch_before(folder: Path) -> None:
    for iteration in range(1, 6):
        append_record(str(folder / "steps.jsonl"), {"iteration": iteration, "lm_loss": 2.5})


def kept_records(folder: Path) -> int:
    found = [record["iteration"] for record in read_records(str(folder / "steps.jsonl"))]
    assert found[:2] == [1, 2]
    return len(read_records(str(folder / "bad_steps.jsonl")))


def saved_checkpoints(folder: Path, report: Report) -> None:
    """Publish checkpoints 1 to 3 one after another; all but the last are removed."""
    settle_latest(str(folder))
    latest = latest_checkpoint(str(folder))
    for number in range(1 if latest is None else int(latest[-7:]) + 1, UNITS + 1):
        name = f"iter_{number:07d}"
        part = folder / f"{name}.part"
        if part.exists():
            move_to_trash(str(folder), part.name)
        part.mkdir()
        for file in ("weights", MANIFEST):
            write_synced(part / file, f"{number}\n".encode() * 99)
        sync(part)
        put_in_place(str(folder), name)
        report()
        sweep(str(folder))
    retire(str(folder), CheckpointConfig(keep_last=1))  # as a run after each
    sweep(str(folder))


def kept_checkpoint(folder: Path) -> int:
    latest = latest_checkpoint(str(folder))
    if latest is None:
        return 0
    for file in ("weights", MANIFEST):
        assert Path(latest, file).read_text() == f"{int(latest[-7:])}\n" * 99
    return int(latest[-7:])


JOBS = {
    "a job of units": Job(act=units_of_a_toy_job, kept=kept_units, steps=20, is_forced=False),
    "a file that is replaced": Job(
        act=one_file, kept=kept_file, steps=3, before=lambda folder: (folder / "result").write_text("old\n" * 50)
    ),
    "reranked windows": Job(act=reranked_windows, kept=kept_windows, steps=18),
    "evaluated items": Job(act=judged_items, kept=kept_items, steps=18),
    "a converted folder": Job(act=converted_folder, kept=kept_folder, steps=15, before=old_folder),
    "records of a run": Job(act=records_of_a_run, kept=kept_records, steps=14, before=steps_of_the_launch_before),
    "checkpoints": Job(act=saved_checkpoints, kept=kept_checkpoint, steps=30),
}


@every_loss
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_any_step_it_loses_nothing_and_ends_with_the_same_bytes(name: str, loss: Loss, tmp_path: Path) -> None:
    check_every_crash(JOBS[name], tmp_path, loss)


def only_flush(stream: BinaryIO) -> None:
    stream.flush()


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "forces", "instead"),
    [
        ("a file that is replaced", "files.sync_stream", only_flush),
        ("a file that is replaced", "files.sync", nothing),
        ("reranked windows", "lines.LineFile.sync", nothing),
        ("evaluated items", "lines.LineFile.sync", nothing),
        ("evaluated items", "files.sync", nothing),
        ("a converted folder", "folders.sync_tree", nothing),
        ("a converted folder", "folders.sync", nothing),
        ("records of a run", "lines.LineFile.sync", nothing),
        ("records of a run", "lines.sync", nothing),
        ("records of a run", "files.sync_stream", only_flush),
        ("checkpoints", "files.sync_stream", only_flush),
        ("checkpoints", "files.sync", nothing),
    ],
)
def test_a_job_that_does_not_force_its_content_to_the_disk_loses_it(
    name: str, forces: str, instead: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(f"megatron_ledom.storage.{forces}", instead)
    with pytest.raises((AssertionError, LedomError, FileNotFoundError)):
        check_every_crash(JOBS[name], tmp_path, Loss(True, loses_names=True))


@every_loss
def test_the_building_of_a_sample_index_killed_at_any_step_leaves_none_or_a_sound_one(
    data: TinyData, loss: Loss, tmp_path: Path
) -> None:
    config = load_config(str(data.config))
    sources = load_sources(config)
    specs = [index_spec(config, blend) for blend in sources.all_blends()]

    def build(folder: Path, report: Report) -> None:
        prepare_indices(config, sources, str(folder / "cache"), ALONE)
        for _ in specs:
            report()

    def kept(folder: Path) -> int:
        return sum(spec.is_intact(str(folder / "cache")) for spec in specs if spec.is_built(str(folder / "cache")))

    check_every_crash(Job(act=build, kept=kept, steps=8), tmp_path, loss, changing=("lock",))
