"""All layouts of 2, 4 and 8 ranks train the same model as one process: some in the quick test, all in the slow one.

`layouts.md` is the table of all results.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.layout_runs import ANY_STEP, FIRST_STEP, STEPS, compare, run_layouts, run_references, violations
from tests.distributed.layouts import Layout, all_layouts, every_combination, measured, shapes, value_pairs
from tests.distributed.make_layout_table import AT_ONCE, RANKS, TABLE
from tests.support.tiny_runs import Record, TinyData

SOME = [
    Layout(tp=4, optimizer="distributed", recompute="block"),
    Layout(cp=4, optimizer="overlapped", recompute="uniform"),
    Layout(pp=4, optimizer="plain", recompute="selective"),
    Layout(dp=2, tp=2, sp=True, pp=2, optimizer="distributed", recompute="uniform"),
]


def violations_of(
    data: TinyData, folder: Path, layouts: Sequence[Layout], dtype: str, seconds: float = 120, steps: int | None = None
) -> list[str]:
    """Run the layouts and return every tolerance that one of them exceeds."""
    references = run_references(data, folder, layouts, dtype, steps)
    found: list[str] = []
    for num_ranks in sorted({layout.num_ranks for layout in layouts}):
        group = [layout for layout in layouts if layout.num_ranks == num_ranks]
        for start in range(0, len(group), AT_ONCE):
            for layout, records in run_layouts(data, folder, group[start : start + AT_ONCE], dtype, seconds, steps).items():
                outcome = compare(records, references[layout.num_layers], folder / dtype / layout.name)
                found += violations(layout, outcome, dtype)
    return found


def test_some_layouts_train_as_one_process(data: TinyData, tmp_path: Path) -> None:
    assert violations_of(data, tmp_path, SOME, "fp32", steps=8) == []  # the slow test makes all steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_layout_trains_as_one_process(data: TinyData, tmp_path: Path, num_ranks: int, dtype: str) -> None:
    assert violations_of(data, tmp_path, measured(num_ranks, dtype), dtype, seconds=600) == []


@pytest.mark.parametrize("num_ranks", RANKS)
def test_the_matrix_has_every_shape_and_every_pair_of_values(num_ranks: int) -> None:
    layouts = all_layouts(num_ranks)
    assert len(set(layouts)) == len(layouts)
    assert {(one.dp, one.tp, one.sp, one.pp, one.vpp, one.cp) for one in layouts} == {
        (one.dp, one.tp, one.sp, one.pp, one.vpp, one.cp) for one in shapes(num_ranks)
    }
    possible = {pair for layout in every_combination(num_ranks) for pair in value_pairs(layout)}
    assert possible == {pair for layout in layouts for pair in value_pairs(layout)}
    assert {one.num_ranks for one in layouts} == {num_ranks}


def test_the_shapes_are_all_factorizations() -> None:
    """The number of ordered factorizations of 2^k into four is C(k + 3, 3)."""
    assert [len({(one.dp, one.tp, one.pp, one.cp) for one in shapes(n)}) for n in RANKS] == [4, 10, 20]


def test_the_table_has_all_layouts_of_the_matrix_within_the_tolerances() -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \d \| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert set(rows) == {layout.name for num_ranks in RANKS for layout in all_layouts(num_ranks)}
    cells = [cell.strip() for row in rows.values() for cell in row.split(" | ")[:3]]
    first, worst, half = ([float(cell) for cell in cells[column::3] if cell] for column in range(3))
    assert max(first) <= FIRST_STEP["fp32"]
    assert max(worst) <= ANY_STEP["fp32"]
    assert max(half, default=0) <= ANY_STEP["bf16"]
    wanted = sum(len(measured(num_ranks, dtype)) for num_ranks in RANKS for dtype in STEPS)
    assert len(rows) + len(half) == wanted
    assert f"{wanted} of {wanted} runs" in text


def test_the_comparison_sees_a_step_that_differs(tmp_path: Path) -> None:
    records: list[Record] = [{"iteration": i, "lm_loss": 3.0, "grad_norm": 1.0} for i in (1, 2, 3)]
    (tmp_path / "traffic-0.json").write_text("{}")
    changed = [dict(record) for record in records]
    changed[2]["grad_norm"] *= 1.0001
    outcome = compare(changed, records, tmp_path)
    assert outcome.first == 0
    assert [violation.split(":")[0] for violation in violations(Layout(dp=2), outcome, "fp32")] == [
        "DP2, plain, none in fp32, any step"
    ]
    changed[0]["lm_loss"] = float("nan")
    assert len(violations(Layout(dp=2), compare(changed, records, tmp_path), "fp32")) >= 2
