"""Run every layout of 2, 4 and 8 ranks in fp32 and bf16, and write their table, layouts.md in the folder of this file.

    python -m tests.distributed.make_layout_table --work DIR [--minutes 9]

Measurements are kept in DIR: the same command continues with the rest. The table has those that are done.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from tests.distributed.layout_runs import ANY_STEP, FIRST_STEP, STEPS, Outcome, compare, run_layouts, run_references
from tests.distributed.layouts import Layout, measured
from tests.support.tiny_runs import TinyData, read_metrics, write_tiny_data

TABLE = Path(__file__).with_name("layouts.md")
RANKS = (2, 4, 8)
AT_ONCE = 6
"""Number of layouts in one launch."""
INTRODUCTION = """# Every layout against one process

Made by `python -m tests.distributed.make_layout_table --work DIR`; `make test-slow` checks the tolerances. Each row compares a
run of a tiny model (4 layers, or as many as it has model chunks) with the same run in one process: {fp32} steps in fp32 and, for
every third layout, {bf16} in bf16.
The layouts are all factorizations of 2, 4 and 8 ranks into DP x TP x PP x CP, each with and without sequence parallelism (+SP)
and two chunks per pipeline stage (PP2x2). Optimizers (plain, distributed, distributed with overlapped reduce and gather in small
buckets) and recompute (none, selective, full uniform, full block) are distributed so that any two compatible values occur together.

Differences are relative, the larger of loss and gradient norm. Allowed: {first:.0e} at step 1 and {any:.0e} at any step in fp32;
{first_bf16:.0e} and {any_bf16:.0e} in bf16. Largest found: {found}.
{done} of {wanted} runs are in this table.

Bytes are those that the busiest rank sends in one step in fp32, with ring algorithms, by kind of group: TP (tensor, with or
without sequence parallelism), CP (keys and values), PP (activations and their gradients), DP (gradients and parameters, also
over the context-parallel ranks). `tests/benchmarks/bench_communication.py` has the formulas.

| ranks | layout | step 1 | any step | bf16, any step | TP kB | CP kB | PP kB | DP kB |
|---|---|---|---|---|---|---|---|---|
"""


def measure(work: Path, until: float) -> dict[tuple[Layout, str], Outcome]:
    """Return the outcome of every layout and data type that is measured before `until`."""
    work.mkdir(parents=True, exist_ok=True)
    data = TinyData(work) if (work / "tiny.yaml").exists() else write_tiny_data(work)
    outcomes = {}
    for dtype in STEPS:
        for num_ranks in RANKS:
            layouts = measured(num_ranks, dtype)
            references = {layout.num_layers: work / dtype / f"one process of {layout.num_layers} layers" for layout in layouts}
            if time.monotonic() <= until and not all((run_dir / "done").exists() for run_dir in references.values()):
                run_references(data, work, layouts, dtype)
                for run_dir in references.values():
                    (run_dir / "done").touch()
            while left := _left(work / dtype, layouts):
                if time.monotonic() > until:
                    break
                _run_some(data, work, dtype, left[:AT_ONCE])
            for layout in set(layouts) - set(_left(work / dtype, layouts)):
                outcomes[layout, dtype] = Outcome(**json.loads(_kept(work / dtype, layout).read_text()))
    return outcomes


def _kept(folder: Path, layout: Layout) -> Path:
    return folder / layout.name / "outcome.json"


def _left(folder: Path, layouts: list[Layout]) -> list[Layout]:
    return [layout for layout in sorted(layouts) if not _kept(folder, layout).exists()]


def _run_some(data: TinyData, work: Path, dtype: str, layouts: list[Layout]) -> None:
    for layout, records in run_layouts(data, work, layouts, dtype, seconds=600).items():
        run_dir = work / dtype / layout.name
        reference = read_metrics(work / dtype / f"one process of {layout.num_layers} layers")
        _kept(work / dtype, layout).write_text(json.dumps(asdict(compare(records, reference, run_dir))))


def table(outcomes: dict[tuple[Layout, str], Outcome], wanted: int) -> str:
    """Return the table as Markdown, with one line per layout that was measured in fp32."""
    largest = {dtype: [one for (_, kind), one in outcomes.items() if kind == dtype] for dtype in STEPS}
    found = "; ".join(
        f"{max(one.first for one in ones):.1e} and {max(one.worst for one in ones):.1e} in {dtype}"
        f" (only of the losses {max(one.worst_loss for one in ones):.1e})"
        for dtype, ones in largest.items()
        if ones
    )
    first, worst = FIRST_STEP, ANY_STEP
    limits = {"first": first["fp32"], "any": worst["fp32"], "first_bf16": first["bf16"], "any_bf16": worst["bf16"]}
    lines = [INTRODUCTION.format(**STEPS, **limits, found=found, done=len(outcomes), wanted=wanted)]
    for layout in sorted({layout for layout, dtype in outcomes if dtype == "fp32"}, key=lambda one: (one.num_ranks, one)):
        single, half = outcomes[layout, "fp32"], outcomes.get((layout, "bf16"))
        sent = [
            sum(size for name, size in single.traffic.items() if name.startswith(kind)) for kind in ("TP", "CP", "PP", "DP")
        ]
        cells = [
            layout.num_ranks,
            layout.name,
            f"{single.first:.1e}",
            f"{single.worst:.1e}",
            f"{half.worst:.1e}" if half else "",
        ]
        cells += [f"{size / 1000:.1f}" if size >= 100 else "" for size in sent]
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(lines)


def main() -> None:
    """Measure the layouts that are left, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further launch after this time")
    arguments = parser.parse_args()
    outcomes = measure(arguments.work.resolve(), time.monotonic() + 60 * arguments.minutes)
    wanted = [(layout, dtype) for dtype in STEPS for num_ranks in RANKS for layout in measured(num_ranks, dtype)]
    TABLE.write_text(table(outcomes, len(wanted)), encoding="utf-8")
    print(f"wrote {TABLE}: {len(outcomes)} of {len(wanted)} runs; the same command continues with the rest")


if __name__ == "__main__":
    main()
