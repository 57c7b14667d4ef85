"""The process of the models: the results of a model in this process, given-up rows, errors of both sides, and the ends."""

import errno
import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, NotFiniteError
from megatron_ledom.inference import ReverseLM, TransformersEngine
from megatron_ledom.inference.engines.model_process import ModelProcess, ModelProcessLost
from megatron_ledom.inference.engines.process_engine import ProcessEngine
from megatron_ledom.inference.generation import Generation, Sampling
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_generation import RowRequest, RowResult, write_rows
from tests.support.paths import ROOT
from tests.support.served import until
from tests.support.tiny_models import random_model_folder
from tests.support.warm_python import shared_python

BATCH = 3
PAIRS = [("The capital", " of France"), ("one\n", "two 漢"), ("", " is nice"), ("The capital", " of France")]
ORPHANED = """
import sys, time
from pathlib import Path
from megatron_ledom.inference import ReverseLM
from megatron_ledom.inference.engines.model_process import ModelProcess
process = ModelProcess(lambda direction, folder: time.sleep(3600), 1)
print(__import__("os").getpid(), process.pid, flush=True)
process.load(None, None)
"""


def load(direction: Direction, folder: Path) -> LanguageModel:
    """Load a reverse model; an error that cannot be pickled for a folder of the name `bad`."""
    if folder.name == "full":
        raise OSError(errno.ENOSPC, "no space", "weights")
    if folder.name == "bad":
        raise type("LocalError", (Exception,), {})("of a class that only one process knows")
    return ReverseLM.from_pretrained(folder, device="cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A fork of a process that has used torch's threads must not use them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model_folder(tmp_path_factory.mktemp("process") / "model", "sentencepiece", "reverse")


@pytest.fixture
def process() -> Iterator[ModelProcess]:
    made = ModelProcess(load, BATCH)
    yield made
    made.end()
    assert not psutil.pid_exists(made.pid)


def rows_of(process: ModelProcess, requests: list[RowRequest]) -> tuple[list[RowResult], list[tuple[int, str]], list[int]]:
    """Write rows; return the results, the texts that were shown, and the rows in the order of their ends."""
    shown: list[tuple[int, str]] = []
    ended: list[int] = []

    def _on_step(index: int, read: Callable[[], Generation]) -> bool:
        shown.append((index, read().text))
        return True

    found = process.write_rows(Direction.REVERSE, requests, _on_step, lambda index, _: ended.append(index), lambda index: True)
    return found, shown, ended


def test_scores_and_rows_are_those_of_a_model_in_this_process(process: ModelProcess, folder: Path) -> None:
    engine = ProcessEngine(process, folder, Direction.REVERSE)
    model = ReverseLM.from_pretrained(folder, device="cpu")
    expected = TransformersEngine(model, BATCH)
    assert engine.score(PAIRS, include_end=True) == expected.score(PAIRS, include_end=True)
    assert engine.usage.tokens == expected.usage.tokens > 0
    assert (engine.rows.num_positions, engine.rows.leading_ids) == (model.num_positions, model.leading_ids)
    assert engine.rows.growth_problem("a cat", 9999) == model.growth_problem("a cat", 9999) is not None
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    requests = [RowRequest(" is nice", sampling, str(number), 2, is_shown=number == 4) for number in range(5)]
    found, shown, ended = rows_of(process, requests)
    assert found == write_rows(model, requests, BATCH)
    assert sorted(ended) == list(range(5))
    texts = [text for _, text in shown]
    assert {index for index, _ in shown} == {4}  # the others are not read while they grow
    assert texts[-1] == found[4].generation.text
    assert texts == sorted(texts, key=len)


def test_a_row_that_nobody_wants_ends_and_the_others_do_not(process: ModelProcess, folder: Path) -> None:
    process.load(Direction.REVERSE, folder)
    requests = [RowRequest(text, Sampling(max_new_tokens=400), "0") for text in ("Paris is nice.", " the cat sat")]
    whole, _, _ = rows_of(process, requests)
    assert min(result.num_new for result in whole) == 400
    wanted = process.write_rows(Direction.REVERSE, requests, lambda *_: True, lambda *_: None, lambda index: index == 1)
    assert wanted[0].num_new < 400
    assert wanted[1].generation == whole[1].generation
    (again,), _, _ = rows_of(process, requests[:1])
    assert again.generation == whole[0].generation  # a late message about an ended row changes nothing


@pytest.mark.parametrize("place", ["step", "wanted"])
def test_an_error_of_the_caller_ends_all_rows_and_gives_no_result(process: ModelProcess, folder: Path, place: str) -> None:
    process.load(Direction.REVERSE, folder)
    requests = [RowRequest("Paris is nice.", Sampling(max_new_tokens=300), str(n), is_shown=n == 0) for n in range(2)]
    ended: list[int] = []

    def _fail(where: str) -> bool:
        if where == place:
            raise KeyError("of the caller")
        return True

    with pytest.raises(KeyError, match="of the caller"):
        process.write_rows(
            Direction.REVERSE,
            requests,
            lambda *_: _fail("step"),
            lambda index, _: ended.append(index),
            lambda _: _fail("wanted"),
        )
    assert ended == []  # a cut text is no result
    assert [result.num_new for result in rows_of(process, requests)[0]] == [300, 300]


def test_after_an_interrupted_call_no_other_gets_its_answer(folder: Path) -> None:
    process = ModelProcess(load, BATCH)
    process.load(Direction.REVERSE, folder)
    requests = [RowRequest("Paris is nice.", Sampling(max_new_tokens=300), "0", is_shown=True)]

    def _interrupt(index: int, read: Callable[[], Generation]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.write_rows(Direction.REVERSE, requests, _interrupt, lambda *_: None, lambda _: True)
    assert process.load(Direction.REVERSE, folder).stop_ids  # not a row of the call before
    assert [result.num_new for result in rows_of(process, requests)[0]] == [300]
    process.end()
    assert not psutil.pid_exists(process.pid)


def test_calls_of_several_threads_get_their_own_answers(process: ModelProcess, folder: Path) -> None:
    engine = ProcessEngine(process, folder, Direction.REVERSE)
    expected = [engine.score([pair])[0] for pair in PAIRS]
    rows = [RowRequest("Paris is nice.", Sampling(max_new_tokens=20), str(n), is_shown=n % 2 == 0) for n in range(4)]
    texts = [result.generation.text for result in rows_of(process, rows)[0]]

    def _ask(number: int) -> bool:
        if number % 2:
            return bool(engine.score([PAIRS[number % 4]])[0] == expected[number % 4])
        return [result.generation.text for result in rows_of(process, rows)[0]] == texts

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(_ask, range(24)))


def test_errors_of_the_process_are_raised_and_the_next_call_is_answered(process: ModelProcess, folder: Path) -> None:
    other = random_model_folder(folder.parent / "forward", "sentencepiece", "forward")
    with pytest.raises(MismatchError, match="records the direction forward"):
        process.load(Direction.REVERSE, other)
    with pytest.raises(RuntimeError, match="LocalError: of a class that only one process knows"):
        process.load(Direction.REVERSE, folder / "bad")
    with pytest.raises(OSError, match="no space") as full:
        process.load(Direction.REVERSE, folder / "full")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "weights")
    assert process.load(Direction.REVERSE, folder).stop_ids


def test_a_model_without_finite_logits_is_named_with_the_text(process: ModelProcess, tmp_path: Path) -> None:
    broken = random_model_folder(tmp_path / "broken", "sentencepiece", "reverse")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    engine = ProcessEngine(process, broken, Direction.REVERSE)
    with pytest.raises(NotFiniteError, match=r"not finite.*before"):
        engine.score(PAIRS)


def test_scores_are_computed_from_their_start_and_read_in_any_order(process: ModelProcess, folder: Path) -> None:
    engine = ProcessEngine(process, folder, Direction.REVERSE)
    expected = engine.score(PAIRS[:2]), engine.score(PAIRS[2:])
    with engine.scoring(PAIRS[:2]) as first, engine.scoring(PAIRS[2:]) as second, engine.scoring([]) as nothing:
        with engine.scoring(PAIRS):
            pass  # nobody reads these
        assert second() == expected[1]
        assert first() == expected[0]
        process.end()
        assert nothing() == []  # nothing was sent


def test_a_killed_process_is_reported_at_once_and_by_each_call(process: ModelProcess, folder: Path) -> None:
    process.load(Direction.REVERSE, folder)
    lost, is_lost = [], threading.Event()
    process.watch(lambda error: (lost.append(error), is_lost.set()))
    os.kill(process.pid, signal.SIGKILL)
    assert is_lost.wait(30)
    assert "ended by signal 9; signal 9 often means that the memory was full" in str(lost[0])
    for _ in range(2):
        with pytest.raises(ModelProcessLost, match="signal 9"):
            process.load(Direction.REVERSE, folder)


def test_all_threads_learn_how_the_process_ended() -> None:
    for _ in range(10):
        process = ModelProcess(load, BATCH)
        told: list[str] = []
        begin = threading.Barrier(4)

        def _ask(own: ModelProcess = process, told: list[str] = told, begin: threading.Barrier = begin) -> None:
            begin.wait()
            with pytest.raises(ModelProcessLost) as lost, own.logprobs(Direction.REVERSE, []) as logprobs:
                logprobs()
            told.append(str(lost.value))

        threads = [threading.Thread(target=_ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        process.watch(lambda error, told=told: told.append(str(error)))
        begin.wait()
        os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        until(lambda told=told: len(told) == 4)
        assert all("ended by signal 9" in text for text in told), told
        process.end()


def test_signals_to_all_do_not_end_it_but_the_death_of_its_owner_does() -> None:
    owner = subprocess.Popen([shared_python(), "-c", ORPHANED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    owner_pid, pid = map(int, owner.stdout.readline().split())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert psutil.Process(pid).is_running()
    os.kill(owner_pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    owner.wait(30)
