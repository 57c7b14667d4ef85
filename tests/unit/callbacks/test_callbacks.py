"""The moments of a real run as a callback sees them: their order, their values, and errors that end the run."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ledom.errors import UNFORESEEN
from megatron_ledom.training.callback import Callback, TrainingRun
from tests.support.tiny_runs import TinyData, read_metrics, start_ranks


class Diary(Callback):
    """Writes each moment, the number of iterations done and the value passed into `diary.jsonl`."""

    def __init__(self, folder: Path, *, breaks_at: str = "") -> None:
        self.folder, self.breaks_at = folder, breaks_at

    def note(self, moment: str, run: TrainingRun, value: Any = None) -> None:
        with (self.folder / "diary.jsonl").open("a") as file:
            file.write(json.dumps([moment, run.state.iteration, value]) + "\n")
        if moment == self.breaks_at:
            raise ValueError("a callback of the test is broken")

    def on_train_start(self, run: TrainingRun) -> None:
        self.note("on_train_start", run)

    def on_step_start(self, run: TrainingRun) -> None:
        self.note("on_step_start", run)

    def on_batch_wait(self, run: TrainingRun) -> None:
        self.note("on_batch_wait", run)

    def on_batch(self, run: TrainingRun, seconds: float) -> None:
        assert seconds > 0
        self.note("on_batch", run)

    def on_step_end(self, run: TrainingRun, result: Any) -> None:
        self.note("on_step_end", run, None if result is None else result.lm_loss)

    def on_pause_start(self, run: TrainingRun, activity: str) -> None:
        self.note("on_pause_start", run, activity)

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        assert seconds > 0
        self.note("on_pause_end", run)

    def wants_record(self, run: TrainingRun) -> bool:
        return run.state.iteration in (2, 3)

    def on_measure(self, run: TrainingRun, record: dict[str, Any]) -> None:
        record["diary"] = {"deep": {"number": 100 + run.state.iteration}}
        self.note("on_measure", run)

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        self.note("on_record", run, record["lm_loss"])

    def on_rollback(self, run: TrainingRun) -> None:
        self.note("on_rollback", run)

    def on_train_end(self, run: TrainingRun) -> None:
        self.note("on_train_end", run)


def test_a_misspelled_moment_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Misspelled\.on_step_ends is not a moment of training.*did you mean on_step_end\?"):
        type("Misspelled", (Callback,), {"on_step_ends": lambda self, run, result: None})
    with pytest.raises(TypeError, match=r"want_record is not a moment.*did you mean wants_record\?"):
        type("Misspelled", (Diary,), {"want_record": lambda self, run: True})
    with pytest.raises(TypeError, match=r"on_xyz is not a moment.*the moments are on_train_start, .*, on_train_end"):
        type("Misspelled", (Callback,), {"on_xyz": None})


def train(config: str, folder: Path, settings: list[str], breaks_at: str, injected: str) -> int:
    """Train with the callback, as the body of one rank."""
    from megatron_ledom import pretrain

    if injected:
        from tests.support.injected_errors import inject

        inject(injected)
    sys.argv = ["pretrain", "--config", config, f"run_dir={folder / 'run'}", *settings]
    return pretrain.main(callbacks=[Diary(folder, breaks_at=breaks_at)])


def diary(data: TinyData, folder: Path, *settings: str, breaks_at: str = "", injected: str = "") -> tuple[list[Any], int, str]:
    """Return the moments of a run, its exit code and its output."""
    body = partial(train, str(data.config), folder, list(settings), breaks_at, injected)
    ranks = start_ranks(data.config, folder / "log", instead=body)
    (code,) = ranks.wait()
    return [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()], code, ranks.output()


def test_a_callback_sees_every_moment_in_order(data: TinyData, tmp_path: Path) -> None:
    settings = ("train.train_iters=4", "train.skip_iterations=[2]", "logging.log_interval=10", "checkpoint.save_interval=3")
    settings += ("train.global_batch_size=2", "logging.tensorboard=true")
    found, code, output = diary(data, tmp_path, *settings)
    assert code == 0, output
    records = {record["iteration"]: record for record in read_metrics(tmp_path / "run")}
    assert list(records) == [2, 3, 4]  # those that the callback wants, even if skipped, and the last one
    assert [record["diary"] for record in records.values()] == [{"deep": {"number": 100 + each}} for each in (2, 3, 4)]
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("diary/deep/number")] == [(2, 102.0), (3, 103.0), (4, 104.0)]
    assert "deep: number 103" in output
    assert "iteration 2/4  loss none (skipped)  grad norm none (skipped)  lr " in output
    losses = [value for moment, _, value in found if moment == "on_step_end"]
    assert losses[1] is None  # a skipped iteration
    batches: list[tuple[str, Any]] = 2 * [("on_batch_wait", None), ("on_batch", None)]

    def pause(activity: str) -> list[tuple[str, Any]]:
        return [("on_pause_start", activity), ("on_pause_end", None)]

    expected: list[tuple[int, str, Any]] = [(0, "on_train_start", None)]
    for iteration, loss in enumerate(losses, 1):
        expected += [(iteration - 1, moment, value) for moment, value in [("on_step_start", None), *batches]]
        after = [("on_step_end", loss), *(pause("saving") if iteration >= 3 else [])]
        after += [("on_measure", None), ("on_record", loss)] if iteration >= 2 else []
        expected += [(iteration, moment, value) for moment, value in after + pause("checking the pending checkpoint")]
    expected += [(4, moment, value) for moment, value in [*pause("finishing the last checkpoint"), ("on_train_end", None)]]
    assert [(iteration, moment, value) for moment, iteration, value in found] == expected
    assert records[3]["lm_loss"] == losses[2]


def test_a_callback_sees_a_return_to_a_checkpoint(data: TinyData, tmp_path: Path) -> None:
    settings = ("train.train_iters=4", "train.on_nonfinite=roll_back", "checkpoint.save_interval=2")
    found, code, output = diary(data, tmp_path, *settings, injected="nan:4")
    assert code == 0, output
    moments = [(moment, iteration) for moment, iteration, _ in found]
    start = moments.index(("on_rollback", 2))
    assert moments[start - 3 : start] == [("on_batch", 3), ("on_pause_start", 3), ("on_pause_end", 2)]
    assert found[start - 2][2] == "recovering from a bad step"
    assert moments[start + 1] == ("on_step_start", 2)
    assert moments.count(("on_step_start", 3)) == 2
    assert moments.count(("on_step_end", 4)) == 1
    assert moments[-1] == ("on_train_end", 4)
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("moment", ["on_train_start", "on_batch", "on_step_end", "on_measure", "on_train_end"])
def test_a_callback_that_raises_ends_the_run_and_is_named(data: TinyData, tmp_path: Path, moment: str) -> None:
    found, code, output = diary(data, tmp_path, "train.train_iters=3", breaks_at=moment)
    assert code == UNFORESEEN
    assert found[-1][0] == moment
    assert "ValueError: a callback of the test is broken" in output
    assert f"raised in Diary.{moment}, a callback of the training loop" in output


def test_a_moment_with_other_arguments_is_refused_when_it_is_defined() -> None:
    with pytest.raises(
        TypeError, match=r"Careless\.on_measure is called with \(self, run, record\): too many positional arguments"
    ):

        class Careless(Callback):
            def on_measure(self, record: dict[str, Any]) -> None:  # type: ignore[override]
                """Lacks the argument `run`."""
