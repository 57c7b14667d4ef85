"""Exit codes of a command: 1 for errors that a restart meets again, 3 for errors that it may not meet."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom import pretrain
from megatron_ledom.config.load import load_config
from megatron_ledom.errors import UNFORESEEN, DataError, TransientError, cannot_write, run_command
from megatron_ledom.platform.launch import read_launch
from megatron_ledom.training.resilience import StopRequest
from tests.support.tiny_runs import TinyData

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT)
CODES = [(number, 1) for number in LASTING] + [(number, UNFORESEEN) for number in PASSING]
NAMES = [errno.errorcode[number] for number, _ in CODES]


def disk_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/shard.bin")


def exit_code(error: Exception) -> int:
    """Return the exit code of a command that raises this error."""

    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(work)
    return int(str(ended.value.code))


@pytest.mark.parametrize(("number", "code"), CODES, ids=NAMES)
def test_training_that_meets_an_error_of_the_disk(
    data: TinyData, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(*_: object) -> None:
        raise disk_error(number)

    monkeypatch.setattr(pretrain, "run", fail)
    monkeypatch.setattr(StopRequest, "__init__", lambda self: None)
    config = load_config(str(data.config), [])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: pretrain.run_to_exit_code(config, read_launch(), StopRequest())[0])
    assert ended.value.code == code


@pytest.mark.parametrize(("number", "code"), CODES, ids=NAMES)
def test_file_that_cannot_be_written(number: int, code: int) -> None:
    """All ranks get the error of the process that writes a checkpoint."""
    error = cannot_write(disk_error(number), "a.bin")
    assert exit_code(pickle.loads(pickle.dumps(error))) == code
    assert isinstance(error, TransientError) == (code == UNFORESEEN)


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 3), (errno.ENOENT, 1), (errno.EISDIR, 1), (errno.EACCES, 1)])
def test_file_that_was_named_by_hand(number: int, code: int) -> None:
    """A missing input file will also be missing at the next start."""
    assert exit_code(disk_error(number)) == code


def test_an_argument_that_is_not_utf8_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tool", "--output", os.fsdecode(b"latin_\xe9")])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: 0)
    assert ended.value.code == 2
    assert r"b'latin_\xe9' is not UTF-8; rename the file" in capsys.readouterr().err


def test_control_characters_in_an_error_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(DataError("a\x1b[2J\nb")) == 1
    assert capsys.readouterr().err == "error: a\\x1b[2J\nb\n"


def test_path_given_wrongly_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(lambda: (tmp_path / "gone").read_text() and 0)
    assert f"error: {tmp_path}/gone: No such file or directory" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    source = "from megatron_ledom.errors import run_command\nrun_command(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")
