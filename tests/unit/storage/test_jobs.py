"""Work folders: unfinished work is resumed, refused or replaced. test_crashes.py kills such jobs."""

import json
from pathlib import Path

import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.jobs import WorkFolder


@pytest.mark.parametrize(
    ("stored", "message"),
    [("", "is damaged"), ("[1]", "it contains a list"), ('{"inputs": ["x"]}', "inputs was .*'x'.* and is .*'y'")],
)
def test_another_or_a_damaged_request_is_refused_and_replaced_on_request(tmp_path: Path, stored: str, message: str) -> None:
    output = str(tmp_path / "out")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "plan.json").write_text(stored)
    with pytest.raises(UsageError, match=rf"{message}.*start again with --overwrite"):
        WorkFolder(output, {"inputs": ["y"]}, start_over=False)
    assert (tmp_path / "out.work" / "plan.json").read_text() == stored
    with WorkFolder(output, {"inputs": ["y"]}, start_over=True) as work:
        assert json.loads((work.folder / "plan.json").read_text()) == {"inputs": ["y"]}
