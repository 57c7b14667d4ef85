"""Bytes that each kernel moves between its threads and global memory, compared with the fewest that its op needs.

    python -m tests.kernels.traffic        writes the table in csrc/README.md

Computed from the arguments of a launch (`moved` of each op's module); test_compiled_code.py compares it with the interpreter's counts
on small cases. Reads from a cache are counted as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.kernels.build import CSRC, op_names
from tests.kernels.catalogue import op_module

README = CSRC / "README.md"
BEGIN, END = "<!-- bytes moved: begin -->\n", "<!-- bytes moved: end -->\n"
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Moved:
    """Bytes moved, and the fewest possible: every input read once, every output written once."""

    read: int
    written: int
    least_read: int
    least_written: int

    @property
    def ratio(self) -> float:
        """Moved bytes as a multiple of the fewest."""
        return (self.read + self.written) / (self.least_read + self.least_written)


@dataclass(frozen=True)
class Row:
    label: str
    function: str
    arguments: Mapping[str, Any]
    """Sizes, and None for missing tensors."""
    why: str = ""
    """Reason of the excess."""


def table() -> str:
    """Return the table as Markdown, with the rows of all ops."""
    lines = ["| launch | read MiB | written MiB | fewest MiB | ratio | excess |", "|---|---|---|---|---|---|"]
    for op in op_names():
        module = op_module(op)
        for row in module.TRAFFIC_ROWS:
            moved: Moved = module.moved(row.function, row.arguments)
            least = moved.least_read + moved.least_written
            sizes = " | ".join(f"{size / MEBIBYTE:.1f}" for size in (moved.read, moved.written, least))
            lines.append(f"| {row.label} | {sizes} | {moved.ratio:.2f} | {row.why} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README with the current table."""
    assert BEGIN in text, "csrc/README.md lacks the marks around its table"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
