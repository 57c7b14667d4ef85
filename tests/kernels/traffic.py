"""Bytes that each kernel moves between its threads and global memory, against the fewest that its op needs.

    python -m tests.kernels.traffic        writes the table in csrc/README.md

Computed from what a launch is given (`moved` of each op's module), which test_bytes_moved.py holds against what the interpreter counts
on small cases. Reads that a cache answers are counted too: it is what the kernel asks for.
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
    """Bytes asked for, and the fewest that do: every input read once, every output written once."""

    read: int
    written: int
    least_read: int
    least_written: int

    @property
    def ratio(self) -> float:
        """How many times the fewest bytes are moved."""
        return (self.read + self.written) / (self.least_read + self.least_written)


@dataclass(frozen=True)
class Row:
    label: str
    function: str
    arguments: Mapping[str, Any]
    """Sizes, and None for tensors that are absent."""
    why: str = ""
    """Where the excess comes from."""


def table() -> str:
    """Markdown: a line for each op's rows."""
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
    """The README with the table as it is now."""
    assert BEGIN in text, "csrc/README.md has lost the marks around its table"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
