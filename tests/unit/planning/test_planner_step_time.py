"""Step times: the published points, and properties of every roofline model."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.errors import ConfigError
from megatron_ledom.markdown import marked
from megatron_ledom.model.arithmetic import flops_per_token
from megatron_ledom.planning.hardware import hardware_files, load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.planning.shapes import architecture_of, layout_of
from megatron_ledom.planning.step_time import (
    all_reduce_seconds,
    gather_seconds,
    group,
    matmul_seconds,
    shape_efficiency,
    step_time,
)
from megatron_ledom.planning.validation.accuracy import (
    PRIORS,
    compare_points,
    errors,
    exact_memory,
    fit,
    validation_page,
    worked_examples,
)
from tests.support.paths import ROOT

A100 = load_hardware("a100-80")
IDEAL = replace(
    A100,
    matmul_efficiency=1.0,
    matmul_half_depth=1e-9,
    attention_efficiency=1.0,
    attention_backward_efficiency=1.0,
    memory_gb_per_second=1e12,
    node_gb_per_second=1e12,
    network_gb_per_second=1e12,
    latency_us=1e-9,
    iteration_ms=0.0,
    multiprocessors=1,
)


def test_unfitted_points_are_within_the_goal() -> None:
    comparisons = compare_points(A100)
    mean, most = errors(comparisons, "unfitted")
    assert sum(one.point.use == "unfitted" for one in comparisons) == 10
    assert mean < 0.03
    assert most < 0.08


def test_the_hardware_file_contains_the_fitted_numbers() -> None:
    found = fit(A100)
    for name in PRIORS:
        assert getattr(A100, name) == pytest.approx(getattr(found, name), rel=2e-3)


def test_validation_page_is_the_output_of_validate_planner() -> None:
    text = (ROOT / "megatron_ledom/planning/validation/VALIDATION.md").read_text(encoding="utf-8")
    assert marked(text, "validation", "VALIDATION.md")[1] == validation_page(A100)


def test_worked_examples_of_the_planner_page_are_those_of_validate_planner() -> None:
    assert marked((ROOT / "docs/planner.md").read_text(encoding="utf-8"), "plans", "planner.md")[1] == worked_examples()


def test_exact_memory_of_the_page() -> None:
    assert [round(value, 2) for value in exact_memory("1T")] == [32.96, 131.25, 26.56]


@pytest.mark.parametrize("overrides", [[], ["model.num_query_groups=4"], ["parallel.tensor_model_parallel_size=8"]])
def test_on_ideal_hardware_a_step_takes_its_flops(overrides: list[str]) -> None:
    """The planner's FLOPs are those of `flops_per_token`, except that flash attention recomputes the scores in the backward pass."""
    config = load_config(str(ROOT / "examples/configs/ledom_7b.yaml"), ["parallel.pipeline_model_parallel_size=1", *overrides])
    model, layout = architecture_of(config.model), layout_of(config, 64)
    tokens, length = layout.tokens_per_iteration, config.data.seq_length
    weights = flops_per_token(config.model, length, model.padded_vocab_size, "none")
    causal = flops_per_token(config.model, length, model.padded_vocab_size, "causal") - weights
    expected = tokens * (weights + causal * 3.5 / 3) / (64 * IDEAL.peak_tflops * 1e12)
    assert step_time(model, layout, IDEAL).total == pytest.approx(expected, rel=1e-3)


def test_a_ring_moves_its_fraction_of_the_bytes() -> None:
    quick = replace(A100, latency_us=1e-9, collective_efficiency=1.0)
    inside, across = group(8, 1, quick), group(16, 8, quick)
    assert (inside.in_node, across.in_node) == (8, 1)
    assert gather_seconds(quick, inside, 8e9) == pytest.approx(7 / 8 * 8e9 / 300e9, rel=1e-4)
    assert all_reduce_seconds(quick, across, 8e9) == pytest.approx(2 * 15 / 16 * 8e9 / 25e9, rel=1e-4)
    assert gather_seconds(quick, group(1, 1, quick), 8e9) == 0


def test_small_products_are_less_efficient() -> None:
    assert shape_efficiency(128, 128, 4096, 108, 256.0) < 0.02  # one tile for 108 units
    assert shape_efficiency(8192, 8192, 8192, 108, 256.0) > 0.85
    full = matmul_seconds(A100, 8192, 8192, 8192)
    assert full == pytest.approx(
        2 * 8192**3 / (312e12 * A100.matmul_efficiency * shape_efficiency(8192, 8192, 8192, 108, 276.6))
    )


def test_recompute_and_exposed_traffic_take_longer() -> None:
    config = load_config(str(ROOT / "examples/configs/ledom_7b.yaml"))
    model, layout = architecture_of(config.model), layout_of(config, 64)
    plain = step_time(model, layout, A100).total
    longer = {
        "full recompute": replace(layout, recompute="full"),
        "mlp recompute": replace(layout, recompute="selective", recompute_modules=("mlp",)),
        "no overlap": replace(layout, overlap_grad_reduce=False, overlap_param_gather=False),
        "a pipeline": replace(layout, pipeline=4, data=8, num_microbatches=128),
    }
    for name, changed in longer.items():
        assert step_time(model, changed, A100).total > plain, name


@pytest.mark.parametrize("name", hardware_files())
def test_every_hardware_file_plans_the_7b(name: str) -> None:
    plan = make_plan(load_config(str(ROOT / "examples/configs/ledom_7b.yaml")), 64, load_hardware(name))
    assert 0 < plan.mfu < 1
    assert plan.interval[0] < plan.time.total < plan.interval[1]


def test_unknown_hardware_lists_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a100-80, b200, .*did you mean h100-sxm\?"):
        load_hardware("h100-smx")
    (tmp_path / "own.yaml").write_text("name: x\npeak_tflop: 3\n")
    with pytest.raises(ConfigError, match=r"memory_gib: field required.*peak_tflop: "):
        load_hardware(str(tmp_path / "own.yaml"))
