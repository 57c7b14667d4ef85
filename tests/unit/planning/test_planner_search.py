"""The search: rules of the config, memory, ranking, and the messages if no layout works."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.load import load_config
from megatron_ledom.errors import ConfigError, UsageError
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.planning.search import SIMULATED, describe_search, search, table_of
from megatron_ledom.planning.shapes import layout_of
from megatron_ledom.reports.plans import plan_run
from tests.support.forked import run_forked
from tests.support.paths import ROOT

SEVEN = str(ROOT / "examples/configs/ledom_7b.yaml")
A100 = load_hardware("a100-80")


def test_the_7b_on_64_a100_gets_the_original_layout() -> None:
    """With unfused SwiGLU. Fused SwiGLU leaves memory for a micro-batch of two, in the same layout."""
    found = search(load_config(SEVEN, ["model.transformer_impl=torch"]), 64, A100)
    layout = found.ranked[0][1].layout
    fused = search(load_config(SEVEN), 64, A100).ranked[0][1].layout
    assert replace(fused, micro_batch_size=1, num_microbatches=32) == layout
    assert (layout.tensor, layout.pipeline, layout.context, layout.data) == (2, 1, 1, 32)
    assert (layout.sequence_parallel, layout.micro_batch_size, layout.recompute) == (True, 1, None)
    assert all(plan.fits for _, plan in found.ranked)
    assert {one.kind for one in found.rejected} == {"rule", "memory", "spare"}
    assert all(one.reason for one in found.rejected)


def test_every_ranked_layout_keeps_the_rules_and_the_batch() -> None:
    for config, plan in search(load_config(SEVEN), 64, A100).ranked:
        check_config(config, 64)
        assert plan.layout == layout_of(config, 64)
        assert plan.layout.tokens_per_iteration == 1024 * 8192


def test_512_devices_have_a_few_thousand_layouts() -> None:
    """The numbers of layouts and of simulated schedules bound the time of a search."""
    found = search(load_config(SEVEN, ["parallel.world_size=512"]), 512, load_hardware("h100-sxm"))
    assert len(found.ranked) <= SIMULATED
    assert 1000 < found.num_layouts < 10_000
    table = table_of(found).splitlines()
    assert len(table) == found.num_layouts + 1
    assert "do not fit" in describe_search(found)


def test_the_trainer_can_load_the_chosen_layout(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.yaml"
    text = plan_run(SEVEN, "a100-40", 32, search=True, save_config=str(chosen))[0]
    assert "rank  s/iteration" in text
    command = ["-m", "megatron_ledom.pretrain", "--config", str(chosen), "--dry-run"]
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    plan = make_plan(load_config(str(chosen)), 32, load_hardware("a100-40"))
    assert plan.fits
    assert plan.layout.num_ranks == 32


def test_a_model_that_does_not_fit_gets_a_suggestion() -> None:
    config = load_config(SEVEN, ["parallel.world_size=2"])
    with pytest.raises(
        ConfigError, match=r"no layout of 2 devices fits 39\.4 GiB: the smallest needs .* it fits on (4|8) devices \(TP"
    ):
        search(config, 2, load_hardware("a100-40"))


def test_a_number_of_devices_without_a_layout_gets_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 11 devices keeps the rules.*numbers that work: 8 or 14"):
        search(load_config(SEVEN, ["parallel.world_size=11"]), 11, A100)


def test_memory_decides_the_recompute() -> None:
    """With less memory the search chooses a layout with more recompute, and plans a longer time."""
    config = load_config(SEVEN)
    roomy, tight = (search(config, 64, replace(A100, memory_gib=size)).ranked[0][1] for size in (79.1, 24.0))
    assert roomy.layout.recompute is None
    assert tight.needed_gib <= 24.0
    assert tight.time.total > roomy.time.total


def test_the_command_of_the_docs_writes_layout_plots_and_page(tmp_path: Path) -> None:
    options = ["--hardware", "h100-sxm", "--num-gpus", "64", "--search"]
    files = ["--save-config", str(tmp_path / "chosen.yaml"), "--output", str(tmp_path / "plan")]
    command = ["tools/plan_run.py", "--config", SEVEN, *options, *files]
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"memory.png", "timeline.png", "plan.html", "layouts.tsv"}
    page = (tmp_path / "plan/plan.html").read_text(encoding="utf-8")
    assert "white-space: pre-wrap" in page  # no line is cut at the edge of the page
    assert page.count("data:image/png;base64,") == 4
    assert "64 x H100-SXM 80 GB" in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    config = load_config(str(tmp_path / "chosen.yaml"))
    assert (config.parallel.world_size, config.parallel.hardware) == (64, "h100-sxm")


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_ledom.reports.plans import plan_run;"
        f"plan_run({SEVEN!r}, 'a100-80', 64, search=True);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_plan_run_reports_first_if_the_plan_fits_and_ends_with_1_if_not() -> None:
    command = ["tools/plan_run.py", "--config", SEVEN, "--num-gpus", "64", "--hardware"]
    ends = {}
    for hardware in ("a100-40", "b200"):
        done = run_forked([*command, hardware])
        ends[hardware] = (done.returncode, done.stdout.splitlines()[1].rpartition(": ")[2])
    assert ends == {"a100-40": (1, "DOES NOT FIT"), "b200": (0, "fits")}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("h100", "h100-sxm"), ("H100", "h100-sxm"), ("a100", "a100-40 or a100-80"), ("h200x", "h200"), ("b20", "b200")],
)
def test_a_shortened_name_of_hardware_is_completed(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"hardware {name} is not known; .*; did you mean {meant}\\?"):
        load_hardware(name)


@pytest.mark.parametrize("count", [0, -3])
def test_no_devices_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        plan_run(SEVEN, "a100-80", count)
