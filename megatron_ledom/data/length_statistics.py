"""Lengths of documents: counted exactly in memory that does not grow with their number, shown as text or as a picture."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shard import CHUNK_DOCUMENTS, ShardReader
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock

COUNTED_BELOW = 1 << 17  # lengths below have a counter each; of longer ones there are few, they are counted by value
LONG_TOKENS = 8192
BAR_CHARACTERS = 40


@dataclass(slots=True)
class LengthCounts:
    """How many documents have which length, in tokens with eod."""

    short: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(COUNTED_BELOW, np.int64))
    long: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of_shard(cls, reader: ShardReader) -> "LengthCounts":
        """Read the lengths of a shard once."""
        counts = cls()
        for first in range(0, len(reader), CHUNK_DOCUMENTS):
            counts.add(reader.lengths[first : first + CHUNK_DOCUMENTS])
        return counts

    def add(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count more documents of `lengths` [documents]."""
        possible = lengths[(lengths >= 0) & (lengths < COUNTED_BELOW)]
        self.short += np.bincount(possible, minlength=COUNTED_BELOW)
        self.long.update(lengths[lengths >= COUNTED_BELOW].tolist())

    def merge(self, other: "LengthCounts") -> None:
        """Count the documents of `other`, too."""
        self.short += other.short
        self.long.update(other.long)

    def table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(lengths that occur, ascending; documents of each)."""
        short = np.flatnonzero(self.short)
        long = np.array(sorted(self.long), np.int64)
        of_long = np.array([self.long[int(length)] for length in long], np.int64)
        return np.concatenate([short, long]), np.concatenate([self.short[short], of_long])

    def describe(self) -> str:
        """One line; empty when there are no documents."""
        lengths, documents = self.table()
        if not len(lengths):
            return ""
        total = int(documents.sum())
        ends = np.cumsum(documents)

        def percentile(share: float) -> int:
            """The smallest length that at least `share` of the documents do not exceed."""
            return int(lengths[np.searchsorted(ends, max(1, int(np.ceil(share * total))))])

        mean = float((lengths * documents).sum()) / total
        over = int(documents[lengths > LONG_TOKENS].sum())
        percentiles = ", ".join(f"p{number} {percentile(number / 100):,}" for number in (5, 25, 75, 95, 99))
        return (
            f"min {lengths[0]:,}, mean {mean:,.1f}, median {percentile(0.5):,}, max {lengths[-1]:,} tokens a document;"
            f" {percentiles}; {over / total:.2%} over {LONG_TOKENS:,}"
        )

    def bins(self) -> tuple[list[int], list[int]]:
        """(edges, documents in [edge, next edge)), edges doubling from a power of two; both empty without documents."""
        lengths, documents = self.table()
        if not len(lengths):
            return [], []
        first, last = (max(1, int(length)).bit_length() - 1 for length in (lengths[0], lengths[-1]))
        edges = [1 << power for power in range(first, last + 2)]
        which = np.searchsorted(edges, lengths, side="right") - 1
        return edges, np.bincount(np.maximum(which, 0), weights=documents, minlength=len(edges) - 1).astype(int).tolist()

    def histogram(self) -> str:
        """A bar of text for each bin."""
        edges, documents = self.bins()
        rows = []
        for begin, end, count in zip(edges, edges[1:], documents, strict=False):
            bar = "#" * max(round(BAR_CHARACTERS * count / max(documents)), int(count > 0))
            rows.append(f"{f'{begin:,} to {end - 1:,}':>21}  {count:>15,}  {bar}".rstrip())
        return "\n".join([f"{'tokens':>21}  {'documents':>15}", *rows])


def check_can_draw(path: str) -> None:
    """Refuse `path` before the work when it cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("--histogram needs matplotlib, which is not installed: pip install matplotlib") from error
    if not path.endswith(".png"):
        raise UsageError(f"--histogram {path} is not a .png file; give a name that ends with .png")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"the folder of --histogram {path} does not exist; make it, or give another name")


def draw_histogram(counts: LengthCounts, prefixes: Sequence[str], path: str) -> None:
    """Write a picture of the bins."""
    from matplotlib.figure import Figure

    edges, documents = counts.bins()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(documents, edges or [1], fill=True)
    axes.set_xscale("log", base=2)
    axes.axvline(LONG_TOKENS, color="black", linewidth=0.8, linestyle="dashed", label=f"{LONG_TOKENS:,}")
    axes.set(xlabel="tokens a document, eod included", ylabel="documents")
    axes.set_title(prefixes[0] if len(prefixes) == 1 else f"{prefixes[0]} and {len(prefixes) - 1} more")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    with output_file_lock(path, "--histogram"):
        write_file(path, picture.getvalue())
