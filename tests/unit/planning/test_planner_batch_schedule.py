"""The planner and the dry run add the phases of a batch-size schedule up."""

from dataclasses import replace

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.planning.dry_run import dry_run
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import Plan, make_plan
from megatron_ledom.planning.plan_text import describe_plan
from megatron_ledom.planning.search import mean_microbatches
from tests.support.paths import ROOT

SEVEN_B = str(ROOT / "examples/configs/ledom_7b.yaml")
LENGTH = 8192
SCHEDULE = f"train.batch_size_schedule=[[0,256],[{2560 * LENGTH},512],[{7680 * LENGTH},1024]]"
"""By hand: 10 iterations of 256 samples, 10 of 512, the other 80 of 1,024."""
PHASES = {256: 10, 512: 10, 1024: 80}
VIRTUAL = ("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=7")
SHORT = ("train.train_iters=100", "optimizer.lr_warmup_iters=10", *VIRTUAL)


def config_of(*more: str) -> RunConfig:
    return load_config(SEVEN_B, [*SHORT, *more])


def plan_of(config: RunConfig) -> Plan:
    return make_plan(config, 64, load_hardware("a100-80"))


def test_a_plan_sums_the_plans_of_its_phases() -> None:
    config = config_of(SCHEDULE)
    plan, parts = plan_of(config), {}
    for size, count in PHASES.items():
        train = replace(config.train, batch_size_schedule=None, global_batch_size=size, train_iters=count)
        parts[size] = plan_of(replace(config, train=train, optimizer=replace(config.optimizer, lr_warmup_iters=0)))
    assert [(phase.batch.global_batch_size, phase.batch.num_iterations) for phase in plan.phases] == [*PHASES.items()]
    assert [phase.seconds for phase in plan.phases] == pytest.approx([part.time.total for part in parts.values()])
    assert plan.seconds == pytest.approx(sum(part.seconds for part in parts.values()))
    assert plan.device_hours == pytest.approx(sum(part.device_hours for part in parts.values()))
    assert plan.tokens == sum(part.tokens for part in parts.values())
    assert (plan.stages, plan.time) == (parts[1024].stages, parts[1024].time)
    assert plan.mean_mfu < plan.mfu  # small batches have a larger bubble
    assert mean_microbatches(config, plan.layout) == pytest.approx(
        sum(parts[size].layout.num_microbatches * count for size, count in PHASES.items()) / 100
    )


def test_memory_is_that_of_the_largest_batch_wherever_it_is() -> None:
    falling = config_of(f"train.batch_size_schedule=[[0,1024],[{1024 * LENGTH},128]]", "train.global_batch_size=128")
    assert plan_of(falling).stages == plan_of(config_of()).stages


def test_the_text_of_a_plan_lists_the_phases() -> None:
    lines = describe_plan(plan_of(config_of(SCHEDULE))).splitlines()
    start = lines.index("batch schedule")
    assert [line.split()[:5] for line in lines[start + 2 : start + 5]] == [
        ["1", "to", "10", "256", "32"],
        ["11", "to", "20", "512", "64"],
        ["21", "to", "100", "1,024", "128"],
    ]
    assert "batch schedule" not in describe_plan(plan_of(config_of()))


def test_the_dry_run_has_the_numbers_of_every_phase() -> None:
    text = dry_run(config_of(SCHEDULE, "parallel.hardware=a100-80"), 64).text
    rows = {line[:24].strip(): line[24:].strip() for line in text.splitlines() if line.startswith("  ")}
    expected = {
        "micro-batches": "32 to 128 an iteration",
        "global batch": "256 to 1,024 samples, 2,097,152 to 8,388,608 tokens",
        "batch schedule": "256 from iteration 1 (sample 0); 512 from iteration 11 (sample 2,560); 1,024 from iteration 21"
        " (sample 7,680)",
        "samples": "89,600",
        "tokens": "734.00 M (734,003,200)",
        "warm-up": "10 iterations, 20.972 M tokens",
    }
    found = {name: next((row for key, row in rows.items() if key == name), None) for name in expected}
    assert found == expected
