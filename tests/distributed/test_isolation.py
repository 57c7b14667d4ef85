"""With data.reset_attention_mask, documents of one sample do not influence each other at all, in any layout."""

import json
from pathlib import Path

import pytest

from tests.distributed.isolation import measure_each
from tests.distributed.layouts import RECOMPUTE, Layout
from tests.support.tiny_runs import TinyData, free_ports, start_processes

LAYOUTS = {
    1: [Layout(recompute=recompute) for recompute in RECOMPUTE],
    2: [
        Layout(tp=2, recompute="selective"),
        Layout(tp=2, sp=True, recompute="uniform"),
        Layout(pp=2, recompute="block"),
        Layout(pp=2, vpp=2, recompute="none"),
        Layout(cp=2, recompute="selective"),
        Layout(cp=2, recompute="uniform"),
    ],
    4: [Layout(tp=2, sp=True, cp=2, recompute="block"), Layout(pp=2, cp=2), Layout(cp=4, recompute="selective")],
}


CASES = [
    *((1, "fp32"), (1, "bf16"), (2, "fp32"), (4, "fp32")),
    *(pytest.param(num_ranks, "bf16", marks=pytest.mark.slow) for num_ranks in (2, 4)),
]
"""The type changes the kernels of one rank; the layouts divide the documents in the same way for both."""


@pytest.mark.parametrize(("num_ranks", "dtype"), CASES)
def test_documents_do_not_influence_each_other(data: TinyData, tmp_path: Path, num_ranks: int, dtype: str) -> None:
    layouts = LAYOUTS[num_ranks]
    shared = [f"model.params_dtype={dtype}", "train.global_batch_size=16", "model.num_attention_heads=8"]
    arguments = [[*shared, *layout.overrides(), "train.micro_batch_size=1"] for layout in layouts]
    ports = free_ports(len(layouts))
    ranks = start_processes(num_ranks, tmp_path / "log", measure_each, str(data.config), str(tmp_path), arguments, ports)
    assert ranks.wait() == [0] * num_ranks, ranks.output()
    for number, layout in enumerate(layouts):
        reports = [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in range(num_ranks)]
        for what in ("logits", "gradient"):
            isolated, leaking = (largest(reports, kind, what) for kind in ("isolated", "leaking"))
            assert set(isolated) == {"0", "1", "2"}, (layout.name, what)
            own = "0" if what == "logits" else "1"
            assert isolated.pop(own) > 0, (layout.name, what)
            assert isolated == dict.fromkeys(isolated, 0.0), (layout.name, what)
            leaked = {"logits": ("1", "2"), "gradient": ("0",)}[what]  # documents before the trained one, after the changed one
            assert all(leaking[document] > 0 for document in leaked), (layout.name, what)


def largest(reports: list[dict[str, dict[str, dict[str, float]]]], kind: str, what: str) -> dict[str, float]:
    """Return the largest value of each document over the ranks that have one."""
    found: dict[str, float] = {}
    for report in reports:
        for document, value in report[kind].get(what, {}).items():
            found[document] = max(value, found.get(document, 0.0))
    return found
