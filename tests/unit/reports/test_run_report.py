"""Reports of runs: one page without external files, forward and reverse in one plot, and the metrics of the records."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.reports import curves
from megatron_ledom.reports.curves import EXACT, _colours, moving_average
from megatron_ledom.reports.run_data import RunData, load_runs, training_pairs
from megatron_ledom.reports.runs import final_loss, planned_rows, report_runs, summary, twin_sentence
from tests.support.forked import run_forked
from tests.support.paths import ROOT


def write_run(folder: Path, direction: str, floor: float, num_records: int = 120) -> str:
    """Write a run folder with losses from 8.7 down to about `floor`, validations every 30 records and a bad step."""
    config = load_config(
        str(ROOT / f"examples/configs/quickstart_{direction}.yaml"), [f"run_dir={folder}", "train.train_iters=600"]
    )
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


def test_the_tool_draws_both_directions_and_one_page_without_external_files(twins: list[str], tmp_path: Path) -> None:
    output = tmp_path / "report"
    command = ["tools/report_run.py", *twins, "--output", str(output), "--smooth", "5"]
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"loss.png", "loss_difference.png", "grad_norm.png", "tokens_per_second.png", "lr.png"}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (output / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert len(addresses) == 10
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "prefers-color-scheme: dark" in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "above the forward run" in page
    assert "above the forward run" in done.stdout


def test_a_two_way_run_has_a_curve_of_its_own(twins: list[str]) -> None:
    runs = load_runs(twins)
    config = runs[0].config
    runs.append(replace(runs[0], name="two-way", config=replace(config, data=replace(config.data, direction="both"))))
    assert len(set(_colours(runs, "light"))) == len(set(_colours(runs, "dark"))) == 3


def test_metrics_are_those_of_the_records(twins: list[str]) -> None:
    reverse, forward = load_runs(twins)
    assert (reverse.name, forward.name) == ("reverse", "forward")
    records = [json.loads(line) for line in Path(twins[0], "metrics.jsonl").read_text().splitlines()[:-1]]
    mean = sum(record["lm_loss"] for record in records[-10:]) / 10
    assert final_loss(reverse) == pytest.approx(mean)
    assert len(reverse.points("lm_loss")[0]) == 119  # without the step that has no finite loss, and without the torn line
    row = summary(reverse)
    assert row["iterations"] == "600 of 600"
    assert row["tokens"] == "240,000,000"
    assert row["iterations skipped"] == "1"
    assert row["tokens/s, median"] == "4,060"
    assert row["MFU, median"] == "40.0%"
    assert row["validation loss, mean of sets"] == f"{records[-1]['lm_loss'] + 0.2:.4f}"
    ends = [records[-1]["lm_loss"] + 0.2 for records in (reverse.records, forward.records)]
    told = twin_sentence([reverse, forward])
    assert (
        f"{ends[0]:.4f} nats a token, the forward run at {ends[1]:.4f}: {ends[0] / ends[1] - 1:.2%} above the forward run"
        in told
    )
    assert "mean of 2 sets, after 240,000,000 tokens" in told
    assert "over the last 4 validations" in told
    assert twin_sentence([reverse]) == ""


def with_losses(run: RunData, losses: list[float], validations: dict[int, dict[str, float]] | None = None) -> RunData:
    """Return the run with other records: a training loss every 1000 tokens, and validation losses by number of the record."""
    records = [{"iteration": n, "consumed_train_tokens": 1000 * n, "lm_loss": loss} for n, loss in enumerate(losses, 1)]
    for number, sets in (validations or {}).items():
        found = {name: {"lm_loss": loss, "bits_per_byte": 1.0} for name, loss in sets.items()}
        records[number - 1]["validation"] = found  # type: ignore[assignment]
    return replace(run, records=records)


def test_validation_counts_and_not_the_last_noisy_training_records(twins: list[str]) -> None:
    """The last ten training losses are below those of the forward run, while every validation is above."""
    runs = load_runs(twins)
    reverse = with_losses(runs[0], [4.0] * 20 + [3.0] * 10, {10: {"a": 4.2}, 20: {"a": 4.1}, 30: {"a": 4.04}})
    forward = with_losses(runs[1], [4.0] * 30, {10: {"a": 4.1}, 20: {"a": 4.0}, 30: {"a": 4.0}})
    assert (
        "reverse run is at 4.0400 nats a token, the forward run at 4.0000: 1.00% above the forward run (+1.00 % to +2.50 %"
        in (twin_sentence([reverse, forward]))
    )


@pytest.mark.parametrize(
    ("reverse", "forward", "message"),
    [
        ({30: {"a": 4.1}}, {30: {"a": 4.0}}, "1 common validation"),
        ({n: {"a": 4.1, "b": 3.9} for n in (10, 20, 30)}, {n: {"a": 4.0, "b": 4.0} for n in (10, 20, 30)}, "changes its sign"),
        ({n: {"a": 4.0 + n % 3 / 10} for n in (10, 21, 30)}, {n: {"a": 4.0} for n in (10, 21, 30)}, "changes its sign"),
        ({10: {"a": 4.1}}, {20: {"a": 4.0}}, "no validation of the same set at the same training tokens"),
        ({10: {"a": 4.1}}, {}, "no validation of the same set"),
        ({10: {"a": 4.1, "b": 1}}, {10: {"c": 4.1, "d": 1}}, "no validation of the same set"),
    ],
)
def test_without_a_clear_validation_difference_neither_twin_is_called_lower(
    reverse: dict[int, dict[str, float]], forward: dict[int, dict[str, float]], message: str, twins: list[str]
) -> None:
    runs = [with_losses(run, [4.0] * 30, found) for run, found in zip(load_runs(twins), (reverse, forward), strict=True)]
    told = twin_sentence(runs)
    assert message in told
    assert "above" not in told
    assert "below" not in told


def test_training_losses_make_a_claim_only_beyond_their_interval(twins: list[str]) -> None:
    """Correlated noise of 0.1: 200 records show a difference of 0.4 but not of 0.005, and ten records show none."""
    noise = [0.1 * math.sin(n / 3) + 0.05 * math.sin(5 * n) for n in range(200)]
    base = [4.0 + math.exp(-n / 20) for n in range(200)]
    runs = load_runs(twins)

    def told(gap: float, num: int) -> str:
        reverse = [loss + gap + wave for loss, wave in zip(base, noise, strict=True)]
        return twin_sentence([with_losses(runs[0], reverse[:num]), with_losses(runs[1], base[:num])])

    assert "is above the forward run" in told(0.4, 200)
    assert "is below the forward run" in told(-0.4, 200)
    assert "95 % interval" in told(0.4, 200)
    assert "neither is called lower" in told(0.005, 200)
    assert "10 training records at the same tokens" in told(0.4, 10)


def test_the_difference_of_twins_is_computed_at_the_same_tokens(twins: list[str]) -> None:
    reverse, forward = (
        with_losses(run, losses) for run, losses in zip(load_runs(twins), ([5.0, 4.0, 3.0], [4.5, 3.5]), strict=True)
    )
    assert training_pairs(reverse, replace(forward, records=forward.records[1:])) == {2000: (4.0, 3.5)}


def test_moving_average_by_hand() -> None:
    assert moving_average([1.0, 2.0, 6.0, 1.0], 3) == [1.0, 3.0, 3.0, 1.0]


@pytest.mark.parametrize("width", [1, 2, 5, 8, 100])
def test_smoothing_moves_no_curve(width: int) -> None:
    """A straight line stays unchanged, and the learning rate is not smoothed."""
    line = [0.5 * n for n in range(30)]
    assert moving_average(line, width) == pytest.approx(line)
    assert EXACT == ("lr",)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, twins: list[str]) -> None:
    with pytest.raises(UsageError, match=r"has no config\.yaml"):
        report_runs([str(tmp_path)], str(tmp_path / "report"), 0)
    with pytest.raises(UsageError, match="named twice"):
        report_runs([twins[0], twins[0]], str(tmp_path / "report"), 0)
    Path(twins[0], "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no record yet"):
        report_runs(twins[:1], str(tmp_path / "report"), 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation": None}, "its validation is None, expected an object"),
        ({"validation": {"v": {}}}, "its validation.v has no lm_loss"),
        ({"validation": {"v": {"lm_loss": 4.0}}}, "its validation.v has no bits_per_byte"),
        ({"validation": {"v": 4.0}}, "its validation.v is 4.0, expected an object"),
        ({"validation": {"v": {"lm_loss": [4.0], "bits_per_byte": 1}}}, "its validation.v.lm_loss is .*, expected a number"),
        ({"lm_loss": "4.0"}, "its lm_loss is '4.0', expected a number"),
        ({"lm_loss": True}, "its lm_loss is True, expected a number"),
        ({"grad_norm": {}}, "its grad_norm is {}, expected a number"),
        ({"mfu": 10**400}, "its mfu is an integer of 1329 bits"),
        ({"skipped_iterations": None}, "its skipped_iterations is None, expected a number"),
        ({"consumed_train_tokens": None}, "its consumed_train_tokens is None, expected a number"),
        ({"consumed_train_tokens": math.inf}, "its consumed_train_tokens is inf, expected a finite number"),
        ({}, "'consumed_train_tokens' is missing"),
    ],
)
def test_a_record_of_other_types_is_named_by_file_and_line(
    changed: dict[str, object], message: str, twins: list[str], tmp_path: Path
) -> None:
    path = Path(twins[0], "metrics.jsonl")
    lines = path.read_text().splitlines()
    record = {**json.loads(lines[2]), **changed}
    if not changed:
        del record["consumed_train_tokens"]
    path.write_text("\n".join([*lines[:2], json.dumps(record), *lines[3:-1]]) + "\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl:3: this line is damaged \({message}"):
        report_runs(twins, str(tmp_path / "report"), 0)


def test_a_value_that_no_validation_measured_is_a_dash(twins: list[str]) -> None:
    for sets, expected in (
        ({}, ("–", "–")),
        ({"v": {"lm_loss": 4.0, "bits_per_byte": None}}, ("4.0000", "–")),
        ({"v": {"lm_loss": 4.0, "bits_per_byte": 1.0}, "w": {"lm_loss": None, "bits_per_byte": None}}, ("–", "–")),
    ):
        record = {"iteration": 1, "consumed_train_tokens": 5, "lm_loss": 4.0, "validation": sets}
        Path(twins[0], "metrics.jsonl").write_text(json.dumps(record) + "\n")
        row = summary(load_runs(twins[:1])[0])
        assert (row["validation loss, mean of sets"], row["bits per byte, mean of sets"]) == expected


@pytest.mark.parametrize("validations", [{n: {"a": 0.0} for n in (10, 20, 30)}, {}])
def test_a_forward_loss_of_0_gives_no_percentage(validations: dict[int, dict[str, float]], twins: list[str]) -> None:
    reverse, forward = load_runs(twins)
    theirs = {number: {"a": 4.0} for number in validations}
    runs = [with_losses(reverse, [4.0] * 40, theirs), with_losses(forward, [0.0] * 40, validations)]
    assert twin_sentence(runs).startswith("The forward run has a loss of 0")


def test_a_run_is_compared_with_its_plan(twins: list[str], tmp_path: Path) -> None:
    sizes = ["model.vocab_size=8000", "parallel.hardware=a100-80"]
    for folder in twins:
        config = load_config(str(Path(folder, "config.yaml")), sizes)
        save_config(config, str(Path(folder, "config.yaml")))
    command = ["tools/report_run.py", *twins, "--output", str(tmp_path / "report"), "--plan"]
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    config = load_config(str(Path(twins[0], "config.yaml")))
    planned = make_plan(config, 1, load_hardware("a100-80")).time.total
    measured = 8 * 256 / 4060.0  # the median of the records
    assert re.search(rf"s/iteration, planned +{planned:.3f} +{planned:.3f}", done.stdout)
    assert re.search(rf"s/iteration, measured +{measured:.3f}", done.stdout)
    assert f"{planned / measured - 1:+.1%}" in (tmp_path / "report/report.html").read_text()
    with pytest.raises(UsageError, match="sets no parallel"):
        planned_rows(
            replace(load_runs(twins[:1])[0], config=load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"))), None
        )


def test_a_stage_begins_where_the_tokens_of_the_earlier_runs_end(twins: list[str], tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(twins[0], stage)
    places = {"init_from": "runs/base", "path": "/runs/base", "manifest_sha256": "0"}
    chain = [{**places, "init_state": state, "iteration": 1, "consumed_train_tokens": 1000} for state in ("weights", "all")]
    (stage / "init_from.json").write_text(json.dumps(chain))
    before, after = load_runs([twins[0], str(stage)])
    assert after.points("lm_loss") == ([1000 + tokens for tokens in before.points("lm_loss")[0]], before.points("lm_loss")[1])
    for name, (tokens, losses) in before.validations().items():
        assert after.validations()[name] == ([1000 + one for one in tokens], losses)


def test_the_picture_reaches_to_the_end_of_the_last_stage() -> None:
    """A long run sets the scale of both axes; a stage after it must not be cut off."""
    config = load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"))
    records = [{"iteration": i, "consumed_train_tokens": 100 * i, "lm_loss": 5 - i / 100} for i in range(1, 101)]
    runs = [RunData("base", config, records), RunData("anneal", config, records, earlier_tokens=10_000)]
    axes = Mock()
    curves._scale(axes, runs, 1.0)
    assert axes.set_xlim.call_args.args[1] > 20_000
