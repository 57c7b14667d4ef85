"""Reports of runs: one page that stands alone, forward against reverse in one picture, and figures that are the records'."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.errors import UsageError
from megatron_ledom.planner.hardware import load_hardware
from megatron_ledom.planner.plan import make_plan
from megatron_ledom.training.curves import moving_average
from megatron_ledom.training.plan_report import planned_rows
from megatron_ledom.training.run_report import final_loss, load_runs, report_runs, summary, twin_sentence

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, direction: str, floor: float, num_records: int = 120) -> str:
    """A run folder with losses from 8.7 down to about `floor`, validations every 30 records and a bad step."""
    config = load_config(str(ROOT / f"examples/configs/quickstart_{direction}.yaml"), [f"run_dir={folder}"])
    save_config(config, str(folder / "config.yaml"))
    lines = []
    for number in range(1, num_records + 1):
        loss = floor + (8.7 - floor) * math.exp(-number / 8) + 0.05 * math.sin(7 * number)
        record = {"iteration": 5 * number, "lm_loss": None if number == 50 else loss, "grad_norm": 1 + 0.3 * math.cos(number)}
        record |= {"lr": 1e-3 * (1 - number / 150), "consumed_train_tokens": 2_000_000 * number, "mfu": 0.4}
        record |= {"tokens_per_second": 4000.0 + number, "skipped_iterations": int(number > 50)}
        if number % 30 == 0:
            record["validation"] = {
                name: {"lm_loss": loss + gap, "bits_per_byte": 1.5} for name, gap in (("a", 0.1), ("b", 0.3))
            }
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 99')
    return str(folder)


@pytest.fixture
def twins(tmp_path: Path) -> list[str]:
    for direction in ("reverse", "forward"):
        (tmp_path / direction).mkdir()
    return [write_run(tmp_path / "reverse", "reverse", 4.2), write_run(tmp_path / "forward", "forward", 4.1)]


def test_the_tool_draws_both_directions_and_one_page_that_stands_alone(twins: list[str], tmp_path: Path) -> None:
    output = tmp_path / "report"
    command = [sys.executable, "tools/report_run.py", *twins, "--output", str(output), "--smooth", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"loss.png", "grad_norm.png", "tokens_per_second.png", "lr.png"}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (output / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert len(addresses) == 8
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "prefers-color-scheme: dark" in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "above the forward run" in page
    assert "above the forward run" in done.stdout


def test_figures_are_those_of_the_records(twins: list[str]) -> None:
    reverse, forward = load_runs(twins)
    assert (reverse.name, forward.name) == ("reverse", "forward")
    records = [json.loads(line) for line in Path(twins[0], "metrics.jsonl").read_text().splitlines()[:-1]]
    mean = sum(record["lm_loss"] for record in records[-10:]) / 10
    assert final_loss(reverse) == pytest.approx(mean)
    assert len(reverse.points("lm_loss")[0]) == 119  # the step without a finite loss is left out, a torn line too
    row = summary(reverse)
    assert row["iterations"] == "600 of 600"
    assert row["tokens"] == "240,000,000"
    assert row["iterations skipped"] == "1"
    assert row["tokens/s, median"] == "4,060"
    assert row["MFU, median"] == "40.0%"
    assert row["validation loss, mean of sets"] == f"{records[-1]['lm_loss'] + 0.2:.4f}"
    gap = (final_loss(reverse) or 0) / (final_loss(forward) or 1) - 1
    assert f"{gap:.2%} above the forward run" in twin_sentence([reverse, forward])
    assert twin_sentence([reverse]) == ""


def test_moving_average_by_hand() -> None:
    assert moving_average([1.0, 2.0, 6.0, 1.0], 2) == [1.0, 1.5, 4.0, 3.5]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, twins: list[str]) -> None:
    with pytest.raises(UsageError, match=r"has no config\.yaml"):
        report_runs([str(tmp_path)], str(tmp_path / "report"), 0)
    with pytest.raises(UsageError, match="named twice"):
        report_runs([twins[0], twins[0]], str(tmp_path / "report"), 0)
    Path(twins[0], "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no record yet"):
        report_runs(twins[:1], str(tmp_path / "report"), 0)


def test_a_run_is_compared_with_its_plan(twins: list[str], tmp_path: Path) -> None:
    sizes = ["model.vocab_size=8000", "parallel.hardware=a100-80"]
    for folder in twins:
        config = load_config(str(Path(folder, "config.yaml")), sizes)
        save_config(config, str(Path(folder, "config.yaml")))
    command = [sys.executable, "tools/report_run.py", *twins, "--output", str(tmp_path / "report"), "--plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = load_config(str(Path(twins[0], "config.yaml")))
    planned = make_plan(config, 1, load_hardware("a100-80")).time.total
    measured = 8 * 256 / 4060.0  # the median of the records
    assert re.search(rf"s/iteration, planned +{planned:.3f} +{planned:.3f}", done.stdout)
    assert re.search(rf"s/iteration, measured +{measured:.3f}", done.stdout)
    assert f"{planned / measured - 1:+.1%}" in (tmp_path / "report/report.html").read_text()
    with pytest.raises(UsageError, match="names no parallel"):
        planned_rows(
            replace(load_runs(twins[:1])[0], config=load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"))), None
        )
