"""The marked part of a Markdown document."""

from pathlib import Path

import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.markdown import write_between


def test_only_the_marked_part_of_a_document_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- part -->\nold\n<!-- /part -->\nafter\n")
    write_between(str(page), "part", "new\n")
    assert page.read_text() == "before\n<!-- part -->\nnew\n<!-- /part -->\nafter\n"
    with pytest.raises(UsageError, match="lacks the lines <!-- other -->"):
        write_between(str(page), "other", "new\n")
