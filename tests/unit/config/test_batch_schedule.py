"""Schedules of the global batch size: megatron-core's sizes, exact positions, and errors that name the phase."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator as calculators

from megatron_ledom.checkpoint.manifest import CheckpointManifest, check_same_samples, samples_at_end
from megatron_ledom.config.batch_schedule import (
    batch_phases,
    batch_size_at,
    batch_steps,
    iterations_for,
    largest_batch,
    samples_before,
)
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import total_tokens, train_samples
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError
from megatron_ledom.provenance import Provenance

LENGTH = 32
SIZES = st.integers(1, 40)


def run_with(train_iters: int = 100, parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    model = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    sections = {"data": {"seq_length": LENGTH}, "parallel": parallel or {}, "optimizer": {"lr_warmup_iters": 0}}
    train = {"train_iters": train_iters, "global_batch_size": 16, **train}
    return config_from_dict({"run_dir": "run", "model": model, "train": train, **sections}, "test")


@st.composite
def rampups(draw: st.DrawFn) -> RunConfig:
    start, increment, count = draw(SIZES), draw(SIZES), draw(st.integers(1, 30))
    samples = draw(st.integers(1, 3000) | st.integers(1, 10**9))
    rampup, last = (start, increment, samples), start + count * increment
    return run_with(draw(st.integers(1, 300)), rampup_batch_size=list(rampup), global_batch_size=last)


@st.composite
def listed(draw: st.DrawFn) -> RunConfig:
    gaps, sizes = draw(st.lists(st.integers(LENGTH, 5000), max_size=5)), draw(st.lists(SIZES, min_size=6, max_size=6))
    tokens = [sum(gaps[:number]) for number in range(len(gaps) + 1)]
    entries = [list(entry) for entry in zip(tokens, sizes, strict=False)]
    return run_with(draw(st.integers(1, 300)), batch_size_schedule=entries, global_batch_size=entries[-1][1])


SCHEDULES = rampups() | listed() | st.builds(lambda count, size: run_with(count, global_batch_size=size), SIZES, SIZES)


@pytest.mark.skipif(
    not hasattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator"), reason="megatron-core 0.19 has no ramp-up"
)
@settings(deadline=None, max_examples=150)
@given(config=rampups(), data=st.data())
def test_a_ramp_up_has_the_sizes_of_megatron_core(config: RunConfig, data: st.DataObject) -> None:
    assert config.train.rampup_batch_size is not None
    start, increment, samples = config.train.rampup_batch_size
    theirs = calculators.RampupBatchsizeNumMicroBatchesCalculator(
        config.train.global_batch_size, 1, 1, False, 1, start, increment, samples
    )
    borders = [max(0, step.first_sample + shift) for step in batch_steps(config) for shift in (-1, 0, 1)]
    for consumed in [*borders, data.draw(st.integers(0, 2 * samples))]:
        theirs.update(consumed, False)
        assert batch_size_at(config, consumed) == theirs.get_current_global_batch_size(), consumed


@pytest.mark.skipif(
    not hasattr(calculators, "StepBatchsizeNumMicroBatchesCalculator"), reason="megatron-core 0.16 has no such schedule"
)
@settings(deadline=None, max_examples=100)
@given(config=listed())
def test_a_list_has_the_sizes_of_megatron_core(config: RunConfig) -> None:
    entries = config.train.batch_size_schedule or []
    theirs = calculators.StepBatchsizeNumMicroBatchesCalculator(
        1, 1, False, 1, " ".join(f"{tokens}:{size}" for tokens, size in entries), LENGTH
    )
    for consumed in (max(0, step.first_sample + shift) for step in batch_steps(config) for shift in (-1, 0, 1)):
        theirs.update(consumed, False)
        assert batch_size_at(config, consumed) == theirs.get_current_global_batch_size(), consumed


@settings(deadline=None)
@given(config=SCHEDULES)
def test_phases_are_the_iterations_one_by_one(config: RunConfig) -> None:
    one_by_one, consumed, positions = [], 0, [0]
    for _ in range(config.train.train_iters):
        one_by_one.append(batch_size_at(config, consumed))
        consumed += one_by_one[-1]
        positions.append(consumed)
    phases = batch_phases(config)
    assert [phase.global_batch_size for phase in phases for _ in range(phase.num_iterations)] == one_by_one
    assert [phase.first_sample for phase in phases] == [positions[phase.first_iteration - 1] for phase in phases]
    assert [samples_before(config, count) for count in range(len(positions))] == positions
    assert (train_samples(config), total_tokens(config)) == (consumed, consumed * LENGTH)
    assert largest_batch(config) == max(one_by_one)


@settings(deadline=None)
@given(config=SCHEDULES, data=st.data())
def test_phases_from_any_position_are_the_rest_of_the_run(config: RunConfig, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, config.train.train_iters))
    consumed = samples_before(config, done)
    rest = batch_phases(config, iteration=done, consumed_samples=consumed)
    assert consumed + sum(phase.num_samples for phase in rest) == train_samples(config)
    assert done + sum(phase.num_iterations for phase in rest) == config.train.train_iters


@settings(deadline=None)
@given(config=SCHEDULES, samples=st.integers(0, 5000))
def test_the_iterations_for_samples_are_the_most_that_they_fill(config: RunConfig, samples: int) -> None:
    count = iterations_for(config, samples)
    assert samples_before(config, count) <= samples < samples_before(config, count + 1)


def problems(config: RunConfig, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"rampup_batch_size": [16, 4, 100]}, "starts with 16 samples, not below train.global_batch_size=16"),
        ({"rampup_batch_size": [4, 5, 100]}, "train.global_batch_size can be 19"),
        ({"batch_size_schedule": []}, "train.batch_size_schedule is empty"),
        ({"batch_size_schedule": [[32, 16]]}, "begins at 32 tokens; its first entry must begin at 0"),
        ({"batch_size_schedule": [[0, 4], [64, 8], [64, 16]]}, "train.batch_size_schedule[2] begins at 64 tokens"),
        ({"batch_size_schedule": [[0, 4], [31, 16]]}, "not a sample of data.seq_length=32 after the entry before it, 0"),
        ({"batch_size_schedule": [[0, 4], [320, 8]]}, "ends with a batch of 8, but train.global_batch_size=16"),
        ({"batch_size_schedule": [[0, 16]], "rampup_batch_size": [4, 4, 9]}, "are both set; remove one of them"),
    ],
)
def test_a_wrong_schedule_is_refused(train: dict[str, Any], message: str) -> None:
    assert message in problems(run_with(**train))


def test_every_phase_must_fit_the_ranks_and_the_error_names_it() -> None:
    config = run_with(batch_size_schedule=[[0, 4], [3200, 6], [6400, 10], [2e9, 16]])
    found = problems(config, 4)
    assert found == (
        "train.batch_size_schedule[1]=[3200, 6] is not a multiple of train.micro_batch_size=1 x data-parallel size 4 = 4; the"
        " next multiple is 8 (as 1 more of the schedule)"
    )
    found = problems(run_with(rampup_batch_size=[4, 3, 100]), 2)
    assert found.startswith("step 2 of train.rampup_batch_size=[4, 3, 100], of 7 samples, is not a multiple of")
    check_config(run_with(rampup_batch_size=[4, 4, 100]), 4)


def test_virtual_stages_need_whole_rounds_in_every_phase() -> None:
    parallel = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "use_distributed_optimizer": False,
    }
    config = run_with(batch_size_schedule=[[0, 3], [3200, 16]], parallel=parallel)
    assert problems(config, 2).startswith("in train.batch_size_schedule[0]=[0, 3] 3 micro-batches are not a multiple of")
    config.train.batch_size_schedule = [(0, 4), (3200, 16)]
    check_config(config, 2)


def test_a_blend_in_tokens_needs_the_tokens_of_the_schedule() -> None:
    config = run_with(10, batch_size_schedule=[[0, 4], [640, 16]])  # 5 iterations of 4 samples and 5 of 16: 100 samples
    config.data = replace(config.data, blend_unit="tokens", train_blend=[(3200.0, "a")])
    check_config(config, 1)
    config.data.train_blend = [(4000.0, "a")]
    assert "train.train_iters=10 draws 3,200; set train.train_iters=11" in problems(config)


def test_a_blend_in_tokens_counts_the_batches_before_a_resume() -> None:
    """6 iterations of 4 samples and then of 8: 10 iterations draw 56 samples, but 80 of 32 tokens are listed, as for a run that never changed."""
    before, config = run_with(20, global_batch_size=4), run_with(10, global_batch_size=8)
    config.data = replace(config.data, blend_unit="tokens", train_blend=[(2560.0, "a")])
    check_config(config, 1)
    provenance = Provenance(direction=Direction.REVERSE, tokenizer_name="t", tokenizer_sha256="0" * 64, vocab_size=9, eod_id=0)
    position = {"iteration": 6, "consumed_train_samples": 24, "consumed_train_tokens": 24 * 32}
    manifest = CheckpointManifest.describe(before, provenance, [], 1, **position)
    with pytest.raises(
        ConfigError, match=r"2,560 tokens, but .* drawn 1,792 at train.train_iters=10: 768 up to here.*train_iters=13"
    ):
        check_same_samples(manifest, config, [], "here")
    config.data, config.train.train_iters = replace(config.data, blend_unit="weight"), 13
    assert samples_at_end(manifest, config) == 80
    assert check_same_samples(manifest, config, [], "here") == []
    config.data = replace(config.data, blend_unit="tokens")
    assert check_same_samples(manifest, config, [], "here") == []
    unchanged = run_with(10, global_batch_size=4)
    unchanged.data = replace(unchanged.data, blend_unit="tokens", train_blend=[(1280.0, "a")])
    assert check_same_samples(manifest, unchanged, [], "here") == []
