"""Step times: the published points, and properties of every roofline model."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.errors import ConfigError
from megatron_ledom.markdown import marked
from megatron_ledom.model.arithmetic import flops_per_token
from megatron_ledom.planning.hardware import Hardware, hardware_files, load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.planning.schedule import PassTimes, pipeline_seconds
from megatron_ledom.planning.shapes import Layout, architecture_of, layout_of
from megatron_ledom.planning.step_time import (
    all_reduce_seconds,
    delay,
    exposed_with_passes,
    gather_seconds,
    group,
    matmul_seconds,
    shape_efficiency,
    step_time,
)
from megatron_ledom.planning.validation.accuracy import (
    HARDWARE,
    compare_points,
    errors,
    exact_memory,
    fitted_points,
    validation_page,
    worked_examples,
)
from megatron_ledom.planning.validation.published import published
from tests.benchmarks.fit_planner import PAGE, cross_validation, drift
from tests.support.paths import ROOT

A100, H100 = load_hardware("a100-80"), load_hardware("h100-sxm")
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


@pytest.mark.parametrize(("hardware", "count", "mean_goal", "goal"), [(A100, 10, 0.03, 0.08), (H100, 49, 0.05, 0.1)])
def test_unfitted_points_are_within_the_goal(hardware: Hardware, count: int, mean_goal: float, goal: float) -> None:
    comparisons = compare_points(hardware)
    mean, most = errors(comparisons, "unfitted")
    assert sum(one.point.use == "unfitted" for one in comparisons) == count
    assert mean < mean_goal
    assert most < goal


@pytest.mark.parametrize("name", HARDWARE)
def test_the_hardware_file_contains_the_fitted_numbers(name: str) -> None:
    assert drift(name) == {}


def test_judged_runs_set_no_number() -> None:
    judged = {point.name for point in published().judged}
    assert len(judged) == 9
    assert not judged & {point.run for name in HARDWARE for point in fitted_points(load_hardware(name))}


def test_validation_page_is_the_output_of_validate_planner() -> None:
    text = (ROOT / "megatron_ledom/planning/validation/VALIDATION.md").read_text(encoding="utf-8")
    assert marked(text, "validation", "VALIDATION.md")[1] == validation_page()


@pytest.mark.slow
def test_cross_validation_of_the_page_is_that_of_the_script() -> None:
    """The quick tests compare the fitted numbers and the other tables; this one repeats six fits."""
    assert marked(PAGE.read_text(encoding="utf-8"), "cross", "VALIDATION.md")[1] == cross_validation()


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
    assert step_time(model, replace(layout, overlap_tensor=True), A100).total < plain
    assert step_time(model, layout, replace(A100, congestion=0.01)).total == pytest.approx(plain * 1.03, rel=0.01)  # 8 nodes


def test_overlapped_traffic_slows_kernels_or_outlasts_them() -> None:
    half = replace(A100, overlap_slowdown=1.0)
    assert delay(half, 2.0, 10.0) == 1.0  # two seconds at half speed
    assert delay(half, 6.0, 2.0) == 4.0
    assert delay(replace(A100, overlap_slowdown=0.0), 2.0, 10.0) == 0.0


def test_interleaved_passes_hide_the_traffic_of_all_but_one_chunk() -> None:
    free = replace(A100, overlap_slowdown=0.0)
    layout = Layout(seq_length=8, micro_batch_size=1, num_microbatches=8, pipeline=4, chunks=2)
    passes = ((1.0, 1.0),) * 4
    assert exposed_with_passes(free, replace(layout, chunks=1), 6.0, passes) == 4.0
    assert exposed_with_passes(free, layout, 6.0, passes) == 2.0  # half of it during one pass of one chunk
    assert exposed_with_passes(free, layout, 2.0, passes) == 0.0
    assert exposed_with_passes(free, layout, 12.0, passes) == 5.0


def test_deferred_gradients_fill_the_wait_of_the_last_stage() -> None:
    times = PassTimes(((1.0,),) * 4, ((2.0,),) * 4)
    plain = pipeline_seconds(times, 8)
    assert pipeline_seconds(replace(times, deferred=5.0), 8) == plain  # three backward passes of the other stages follow
    assert pipeline_seconds(replace(times, deferred=7.0), 8) == plain + 1


@pytest.mark.parametrize("name", hardware_files())
def test_every_hardware_file_plans_the_7b(name: str) -> None:
    plan = make_plan(load_config(str(ROOT / "examples/configs/ledom_7b.yaml")), 64, load_hardware(name))
    assert 0 < plan.mfu < 1
    assert plan.interval[0] < plan.time.total < plan.interval[1]


def test_unknown_hardware_lists_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a100-80, b200, .*did you mean h100-sxm\?"):
        load_hardware("h100-smx")
    with pytest.raises(ConfigError, match=r"GB200 has an NVLink domain of 72 GPUs, which the planner does not model"):
        load_hardware("GB200")
    (tmp_path / "own.yaml").write_text("name: x\npeak_tflop: 3\n")
    with pytest.raises(ConfigError, match=r"memory_gib: field required.*peak_tflop: "):
        load_hardware(str(tmp_path / "own.yaml"))
