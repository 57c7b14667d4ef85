"""A resumed run uses every setting of its config, as a fresh run at that iteration would, with either optimizer.

One process measures all settings: it trains three iterations, saves, and then builds the run twice for each changed key: once
from the checkpoint and once from scratch.
"""

import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import OptimizerSettings, RunConfig, TrainConfig
from megatron_ledom.errors import LedomError
from tests.support.tiny_runs import TinyData, curve, run_on_ranks, start_ranks

DONE = 3
"""Number of iterations before the checkpoint."""
SAMPLES = 8 * DONE
"""Number of samples before the checkpoint."""
BASE = ("train.train_iters=12", "optimizer.lr_warmup_iters=1", "optimizer.lr=1e-3", "optimizer.min_lr=1e-4")
WSD = ("optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_iters=5")
OPTIMIZERS = {
    "ordinary": ("parallel.use_distributed_optimizer=false",),
    "distributed": ("parallel.use_distributed_optimizer=true",),
    "ordinary in bf16": ("parallel.use_distributed_optimizer=false", "model.params_dtype=bf16"),
}
REFUSED = "refused"

CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "optimizer.lr": ("lr", ("optimizer.lr=3e-4",)),
    "optimizer.min_lr": ("lr", ("optimizer.min_lr=2e-5",)),
    "optimizer.lr_decay_style": ("lr", ("optimizer.lr_decay_style=linear",)),
    "optimizer.lr_warmup_iters": ("lr", ("optimizer.lr_warmup_iters=6",)),
    "optimizer.lr_decay_iters": ("lr", ("optimizer.lr_decay_iters=9",)),
    "optimizer.lr_wsd_decay_iters": ("lr", WSD),
    "optimizer.lr_wsd_decay_style": ("lr", (*WSD, "optimizer.lr_wsd_decay_style=linear")),
    "optimizer.weight_decay": ("groups", ("optimizer.weight_decay=0.3",)),
    "optimizer.adam_beta1": ("groups", ("optimizer.adam_beta1=0.5",)),
    "optimizer.adam_beta2": ("groups", ("optimizer.adam_beta2=0.5",)),
    "optimizer.adam_eps": ("groups", ("optimizer.adam_eps=0.1",)),
    "optimizer.clip_grad": ("clip_grad", ("optimizer.clip_grad=0.25",)),
    "train.train_iters": ("lr", ("train.train_iters=15",)),
    "train.micro_batch_size": ("num_microbatches", ("train.micro_batch_size=2",)),
    "train.global_batch_size": ("num_microbatches", ("train.global_batch_size=4",)),
    "train.rampup_batch_size": ("num_microbatches", ("train.rampup_batch_size=[4,2,100]",)),
    "train.batch_size_schedule": ("num_microbatches", ("train.batch_size_schedule=[[0,2],[640,16],[64000,8]]",)),
    "train.seed": (REFUSED, ("train.seed=7",)),
    "train.eval_interval": ("train", ("train.eval_interval=4",)),
    "train.eval_iters": ("valid_samples", ("train.eval_iters=2",)),
    "train.tasks": ("train", ("train.tasks=[arc_easy]",)),
    "train.task_data": ("train", ("train.task_data=folder",)),
    "train.task_interval": ("train", ("train.task_interval=4",)),
    "train.task_limit": ("train", ("train.task_limit=2",)),
    "train.task_num_fewshot": ("train", ("train.task_num_fewshot=1",)),
    "train.z_loss_coeff": ("loss", ("train.z_loss_coeff=0.1",)),
    "train.exit_interval": ("train", ("train.exit_interval=4",)),
    "train.exit_before_limit_seconds": ("train", ("train.exit_before_limit_seconds=9",)),
    "train.exit_duration_seconds": ("train", ("train.exit_duration_seconds=9",)),
    "train.num_threads": ("train", ("train.num_threads=2",)),
    "train.on_nonfinite": ("policy", ("train.on_nonfinite=skip",)),
    "train.on_spike": ("policy", ("train.on_spike=stop",)),
    "train.spike_score": ("policy", ("train.spike_score=4",)),
    "train.spike_window": ("policy", ("train.spike_window=200",)),
    "train.max_skips": ("policy", ("train.max_skips=300",)),
    "train.max_roll_backs": ("policy", ("train.max_roll_backs=1",)),
    "train.skip_iterations": ("skipped", ("train.skip_iterations=[5]",)),
    "train.watchdog_seconds": ("train", ("train.watchdog_seconds=9",)),
}
"""Key of the config -> part of the run that it decides, and overrides that change it."""
WITHOUT_EFFECT = {
    "an iteration that is done": ("train.skip_iterations=[2]", "train.skip_iterations names 2"),
    "the size of weights that exist": ("model.init_method_std=0.5", "model.init_method_std was 0.02 and is now 0.5"),
}


def measure(config_file: str, common: list[str], keys: list[str], output: str) -> None:
    """Write the effects of each change on a resumed and a fresh run into `output`, as the body of one rank."""
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed, stop_distributed
    from megatron_ledom.platform.device import prepare_platform
    from megatron_ledom.platform.launch import read_launch
    from megatron_ledom.training.state import save_checkpoint
    from megatron_ledom.training.step_policy import StepPolicy
    from megatron_ledom.training.trainer import open_batches, run_iteration

    launch = read_launch()
    first = load_config(config_file, common)
    platform = prepare_platform(1, launch)
    groups = start_distributed(platform, first.parallel, launch)
    build = partial(build_at_checkpoint, platform=platform, groups=groups, choice=choose_layers(first), launch=launch)
    try:
        state = build(first, None)
        policy, batches = StepPolicy(first.train, platform.device), open_batches(state)
        for _ in range(DONE):
            run_iteration(state, batches, policy, frozenset())
        save_checkpoint(state)
        state.store.finish()
        checkpoint = state.store.latest()
        found = {"": compared(build, first, checkpoint)}
        for key in keys:
            found[key] = compared(build, load_config(config_file, [*common, *CHANGES[key][1]]), checkpoint)
        for name, (override, _) in WITHOUT_EFFECT.items():
            found[name] = compared(build, load_config(config_file, [*common, override]), checkpoint)
        distinguish_groups_as_newer_megatron_core()
        found["newer megatron-core"] = compared(
            build, load_config(config_file, [*common, *CHANGES["optimizer.lr"][1]]), checkpoint
        )
    finally:
        stop_distributed()
    Path(output).write_text(json.dumps(found), encoding="utf-8")


def build_at_checkpoint(config: RunConfig, checkpoint: str | None, *, launch: Any, **parts: Any) -> Any:
    from megatron_ledom.data.blends.sources import load_sources
    from megatron_ledom.data.dataset.blend_samples import index_cache
    from megatron_ledom.data.dataset.sample_index import prepare_indices
    from megatron_ledom.training.state import build_state, check_resumable

    sources, _ = check_resumable(config, load_sources(config), checkpoint)
    prepare_indices(config, sources, index_cache(config), launch)
    return build_state(config, sources, checkpoint=checkpoint, **parts)


def compared(build: Any, config: RunConfig, checkpoint: str) -> dict[str, Any]:
    """Return the settings of a run resumed from the checkpoint and of a fresh one moved there, or the reason of a refusal."""
    try:
        resumed = build(config, checkpoint)
    except LedomError as error:
        return {REFUSED: str(error)}
    fresh = build(config, None)
    fresh.scheduler.step(increment=DONE)
    updates = {float(group["step"]) for group in resumed.optimizer.param_groups if group["params"]}
    position = {"updates": sorted(updates), "iteration": resumed.iteration}
    return {"resumed": effective(resumed), "fresh": effective(fresh), "position": position, "loss": total_loss(resumed)}


def effective(state: Any) -> dict[str, Any]:
    """Return the effects of the settings on a run: schedule, groups, batches, policies."""
    from megatron_ledom.config.batch_schedule import batch_size_at
    from megatron_ledom.config.derived import num_microbatches
    from megatron_ledom.platform.core_state import settings_of
    from megatron_ledom.training.history import RunHistory
    from megatron_ledom.training.step_policy import StepPolicy

    optimizer, scheduler, train = state.optimizer, state.scheduler, state.config.train
    groups = [settings_of(group) for group in optimizer.param_groups]
    now, rates = scheduler.num_steps, []
    for scheduler.num_steps in range(DONE, train.train_iters + 1):
        rates.append([scheduler.get_lr(group) for group in optimizer.param_groups])
    scheduler.num_steps = now
    policy = StepPolicy(train, state.platform.device)
    return {
        "lr": rates,
        "groups": groups,
        "clip_grad": [part.config.clip_grad for part in optimizer.chained_optimizers],
        "loss_scale": float(optimizer.get_loss_scale()),
        "num_microbatches": num_microbatches(state.config, 1, batch_size_at(state.config, SAMPLES)),
        "valid_samples": {name: len(dataset) for name, dataset in state.valid_datasets.items()},
        "policy": [policy.past.maxlen, asdict(policy.settings)],
        "skipped": sorted(RunHistory(state.config.run_dir, train.skip_iterations).skip_iterations),
        "train": asdict(train),
    }


def total_loss(state: Any) -> float:
    """Return the loss that the next iteration computes for one token of loss 1 and log Z 1."""
    import torch

    from megatron_ledom.training import trainer

    step: Any = trainer
    functions: list[Any] = []

    def look(forward_step_func: Any, **_: Any) -> list[Any]:
        functions.append(forward_step_func)
        return []

    original = step.get_forward_backward_func
    step.get_forward_backward_func = lambda *_: look
    try:
        size = state.next_batch_size
        step.run_schedule(state.config, state.model, [iter(())], state.groups, global_batch_size=size, forward_only=False)
    finally:
        step.get_forward_backward_func = original
    z_loss_coeff = functions[0].args[0]
    output = torch.ones(1, 1, 2) if z_loss_coeff else torch.ones(1, 1)
    return float(step.masked_loss(torch.ones(1, 1), z_loss_coeff, output)[0])


def distinguish_groups_as_newer_megatron_core() -> None:
    """Let max_lr and min_lr be part of a group's identity, as in megatron-core 0.19."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer import optimizer as plain

    keys = (*plain.param_group_identifier_keys, "max_lr", "min_lr")
    plain.param_group_identifier_keys = distrib_optimizer.param_group_identifier_keys = keys


@pytest.fixture(scope="module")
def measured(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measurements by optimizer, then by key of `keys_of`."""
    found: dict[str, Any] = {}
    for kind, chosen in OPTIMIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        settings = [*chosen, f"data.valid_blend=[[1,{data.shard('reverse_valid')}]]"]
        common, output = [f"run_dir={folder / 'run'}", *settings, *BASE], folder / "measured.json"
        body = partial(measure, str(data.config), common, keys_of(kind), str(output))
        ranks = start_ranks(data.config, folder / "run", instead=body)
        assert ranks.wait() == [0], ranks.output()
        found[kind] = json.loads(output.read_text(encoding="utf-8"))
    return found


def keys_of(kind: str) -> list[str]:
    """Return the keys to test: all with the ordinary optimizer in fp32, with the others those that affect the optimizer."""
    beginnings = {"ordinary": "", "distributed": "optimizer.", "ordinary in bf16": "optimizer.adam"}
    return [key for key in CHANGES if key.startswith(beginnings[kind]) or key == "optimizer.lr"]


def test_every_key_of_optimizer_and_train_has_a_change_here() -> None:
    """Or elsewhere: the moving average in test_weight_ema.py, the auxiliary loss in test_reverse_teacher.py, Muon's keys, which need
    another kind of optimizer, in test_muon_layouts.py."""
    sections = {"optimizer": OptimizerSettings, "train": TrainConfig}
    muon = {f"optimizer.{key.name}" for key in fields(OptimizerSettings) if key.name.startswith("muon_")}
    every = {f"{section}.{key.name}" for section, kind in sections.items() for key in fields(kind)}
    assert set(CHANGES) | muon | {"optimizer.optimizer", "optimizer.ema_decay", "train.auxiliary"} == every


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in OPTIMIZERS for key in keys_of(kind)])
def test_a_changed_key_has_the_same_effect_as_on_a_fresh_run(measured: dict[str, Any], kind: str, key: str) -> None:
    reading, _ = CHANGES[key]
    found, before = measured[kind][key], measured[kind][""]
    if reading == REFUSED:
        assert key in found[REFUSED]
        return
    assert found["resumed"] == found["fresh"]
    changed, unchanged = ((of[reading] if reading in of else of["resumed"][reading]) for of in (found, before))
    assert changed != unchanged
    assert found["position"] == {"updates": [DONE], "iteration": DONE}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_change_without_effect_is_refused(measured: dict[str, Any], name: str) -> None:
    assert WITHOUT_EFFECT[name][1] in measured["ordinary"][name][REFUSED]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_changed_learning_rate_loads_if_it_is_part_of_the_identity(measured: dict[str, Any], kind: str) -> None:
    assert measured[kind]["newer megatron-core"]["resumed"] == measured[kind]["optimizer.lr"]["fresh"]


def test_a_lowered_learning_rate_counts_from_the_first_step_after_the_resume(data: TinyData, tmp_path: Path) -> None:
    """The rates at iterations 11 and 20 are those of the new schedule, computed by hand."""
    command = ["optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "train.exit_interval=10"]
    first = run_on_ranks(data.config, tmp_path / "run", *command)
    assert first[-1]["lr"] > 6e-4
    lowered = ["optimizer.lr=3e-5", "optimizer.min_lr=2e-5"]
    records = run_on_ranks(data.config, tmp_path / "run", *lowered)
    assert [records[index]["lr"] for index in (10, 19)] == pytest.approx([2.5e-5, 2e-5])
    assert curve(records[:10]) == curve(first)
