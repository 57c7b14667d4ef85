"""A forward run with a reverse teacher (`train.auxiliary`): every layout and micro-batch equal to one process, resumed bit for bit,
other heads and teachers refused, averages, `init_from` and exports that know the head."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.config.load import load_config
from megatron_ledom.convert.average import average_checkpoints
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.errors import LedomError, MismatchError
from megatron_ledom.training.origin import find_origin
from megatron_ledom.training.state import check_resumable
from tests.distributed.test_layouts import ANY_STEP, FIRST_STEP, LAYOUTS, differences
from tests.support.tiny_runs import (
    Record,
    TinyData,
    check_same_run,
    read_metrics,
    read_tensors,
    run_each_on_ranks,
    run_on_ranks,
)

STEPS = 4
FORWARD = ["data.direction=forward", f"train.train_iters={STEPS}", "checkpoint.save_interval=2", "model.num_layers=4"]
OF_A_LAYOUT = 2e-5
"""Relative tolerance of the auxiliary loss."""
LINEAR = ["train.auxiliary.head=linear", "train.auxiliary.teacher_layer=1"]
OFF = ["train.auxiliary.kind=null", "train.auxiliary.teacher=null"]
BF16 = ["model.params_dtype=bf16", "optimizer.ema_decay=0.6"]
ALONE = {
    "one": [],
    "micro-batches_of_4": ["train.micro_batch_size=4"],
    "linear": LINEAR,
    "stopped": ["train.exit_interval=2"],
    "bf16": [*BF16, "train.z_loss_coeff=1e-4"],
    "off": [*BF16, *OFF],
}
"""Runs of one process."""
SPLIT = ["parallel.tensor_model_parallel_size=2"]
MORE = {"linear TP2": (2, [*SPLIT, *LINEAR]), "linear TP2 SP": (2, [*SPLIT, "parallel.sequence_parallel=true", *LINEAR])}
ALL = {name: (count, [f"parallel.{setting}" for setting in layout]) for name, (count, layout) in LAYOUTS.items()} | MORE
QUICK = ("TP2 with sequence parallel", "PP2 of 2 chunks", "CP2", "DP2 with distributed optimizer", "linear TP2")
"""Layouts that together have every kind of split; the others are slow."""
SHORT = ["train.exit_interval=2", "data.valid_blend=[]"]
HEAD = "auxiliary_head."


@pytest.fixture(scope="module")
def teacher(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a reverse run of another width and depth than its students."""
    folder = tmp_path_factory.mktemp("teacher")
    run_on_ranks(data.config, folder / "run", "model.hidden_size=48", "train.train_iters=3", "checkpoint.save_interval=3")
    export_hf(str(folder / "run"), str(folder / "hf"), verify=None)
    return folder / "hf"


def student(data: TinyData, teacher: Path, *further: str) -> list[str]:
    """Return the overrides of a forward run with this teacher."""
    shards = [
        f"data.train_blend=[[1.0,{data.shard('forward_train')}]]",
        f"data.valid_blend=[[1.0,{data.shard('forward_valid')}]]",
    ]
    chosen = ["train.auxiliary.kind=reverse_state", f"train.auxiliary.teacher={teacher}"]
    return [*FORWARD, *shards, *chosen, "train.eval_iters=1", *further]


@pytest.fixture(scope="module")
def folder(data: TinyData, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of one process; `stopped` is resumed."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {folder / name: student(data, teacher, *settings) for name, settings in ALONE.items()}
    run_each_on_ranks(data.config, runs, num_ranks=1)
    run_on_ranks(data.config, folder / "stopped", *student(data, teacher))
    return folder


def train_layouts(data: TinyData, teacher: Path, folder: Path, names: Sequence[str]) -> dict[str, list[Record]]:
    """Return the records of layouts; those with the same number of ranks share one launch."""
    found: dict[str, list[Record]] = {}
    for num_ranks in sorted({ALL[name][0] for name in names}):
        chosen = [name for name in names if ALL[name][0] == num_ranks]
        runs = {folder / name.replace(" ", "_"): student(data, teacher, *ALL[name][1], *SHORT) for name in chosen}
        found |= dict(zip(chosen, run_each_on_ranks(data.config, runs, num_ranks=num_ranks).values(), strict=True))
    return found


@pytest.fixture(scope="module")
def trained(data: TinyData, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    return train_layouts(data, teacher, tmp_path_factory.mktemp("layouts"), QUICK)


def auxiliary(records: list[Record]) -> list[float]:
    return [record["auxiliary_loss"] for record in records]


def check_equal(found: list[Record], whole: list[Record]) -> None:
    """Check that the first steps of a run, at least two, are those of a run of one process."""
    expected = whole[: max(len(found), 2)]
    assert auxiliary(found) == pytest.approx(auxiliary(expected), rel=OF_A_LAYOUT)
    different = differences(found, expected)
    assert different[0] <= FIRST_STEP
    assert max(different) <= ANY_STEP


@pytest.mark.parametrize("name", QUICK)
def test_a_layout_trains_as_one_process(trained: dict[str, list[Record]], folder: Path, name: str) -> None:
    check_equal(trained[name], read_metrics(folder / ("linear" if name in MORE else "one")))


@pytest.mark.slow
def test_the_other_layouts_train_as_one_process(data: TinyData, teacher: Path, folder: Path, tmp_path: Path) -> None:
    for name, found in train_layouts(data, teacher, tmp_path, [name for name in ALL if name not in QUICK]).items():
        check_equal(found, read_metrics(folder / ("linear" if name in MORE else "one")))


def test_micro_batches_make_no_difference(folder: Path) -> None:
    check_equal(read_metrics(folder / "micro-batches_of_4"), read_metrics(folder / "one"))


def test_the_loss_changes_the_gradient_and_is_no_part_of_the_language_loss(folder: Path) -> None:
    one, linear = read_metrics(folder / "one"), read_metrics(folder / "linear")
    assert one[0]["lm_loss"] == linear[0]["lm_loss"]
    assert one[0]["grad_norm"] != linear[0]["grad_norm"]
    assert "auxiliary_loss" not in read_metrics(folder / "off")[0]
    assert [value for name, value in read_tensors(folder / "off").items() if HEAD in name] == []


def test_a_resumed_run_is_equal_bit_for_bit(folder: Path) -> None:
    check_same_run(folder / "stopped", folder / "one")
    assert auxiliary(read_metrics(folder / "stopped")) == auxiliary(read_metrics(folder / "one"))
    assert any(HEAD in name for name in read_tensors(folder / "one"))


def other_teacher(teacher: Path, folder: Path) -> Path:
    """Return a copy of the teacher whose card lists other weights."""
    shutil.copytree(teacher, folder)
    card = json.loads((folder / "export.json").read_text())
    card["files"] = dict.fromkeys(card["files"], "0" * 64)
    (folder / "export.json").write_text(json.dumps(card))
    return folder


CHANGED = {
    "without the loss": (OFF, "train.auxiliary.kind was 'reverse_state' and is None"),
    "another head": (["train.auxiliary.head=linear"], "train.auxiliary.head was 'mlp' and is 'linear'"),
    "another layer": (["train.auxiliary.teacher_layer=1"], "train.auxiliary.teacher_layer was None and is 1"),
    "another teacher": (["train.auxiliary.teacher={other}"], "are not those of the teacher before"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_resume_with_another_head_or_teacher_is_refused(
    data: TinyData, teacher: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    settings, reason = CHANGED[name]
    other = other_teacher(teacher, tmp_path / "other")
    chosen = student(data, teacher, *[setting.format(other=other) for setting in settings], f"run_dir={folder / 'one'}")
    config, checkpoint = load_config(str(data.config), chosen), find_checkpoint(str(folder / "one"))
    with pytest.raises(MismatchError, match="has the optimizer state of another auxiliary loss") as caught:
        check_resumable(config, load_sources(config), checkpoint)
    assert reason in str(caught.value)
    config = load_config(
        str(data.config), [*chosen, f"run_dir={tmp_path / 'new'}", f"init_from={folder / 'one'}", "init_state=optimizer"]
    )
    sources = load_sources(config)
    origin = find_origin(config, sources.provenance, None)
    with pytest.raises(MismatchError, match="set init_state=weights"):
        check_resumable(config, sources, None, origin)


def test_a_changed_weight_of_the_loss_and_a_moved_teacher_are_accepted(
    data: TinyData, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(teacher, tmp_path / "moved")
    chosen = student(data, moved, f"run_dir={folder / 'one'}", "train.auxiliary.weight=3")
    config = load_config(str(data.config), chosen)
    check_resumable(config, load_sources(config), find_checkpoint(str(folder / "one")))


def without_steps(data: TinyData, teacher: Path, source: Path | None, *further: str) -> list[str]:
    """Return the overrides of a run that saves the weights of another run, or new ones, unchanged."""
    still = ["train.train_iters=1", "train.skip_iterations=[1]", "optimizer.lr_warmup_iters=0"]
    return student(data, teacher, *still, *([] if source is None else [f"init_from={source}"]), *further)


def test_init_from_takes_the_head_if_there_is_the_same_and_else_begins_a_new_one(
    data: TinyData, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    """In bf16 also from averaged weights, which have fp32 main weights beside them."""
    for name in ("bf16", "off"):
        average_checkpoints([str(folder / name)], str(tmp_path / f"average_{name}"), last=2)
    sources = {"bf16": folder / "bf16", "off": folder / "off"}
    sources |= {f"average_{name}": tmp_path / f"average_{name}" for name in ("bf16", "off")}
    runs = {tmp_path / f"of_{name}": without_steps(data, teacher, source, *BF16) for name, source in sources.items()}
    runs[tmp_path / "new"] = without_steps(data, teacher, None, *BF16)
    run_each_on_ranks(data.config, runs, num_ranks=1)
    new = read_tensors(tmp_path / "new")
    for name, source in sources.items():
        found, given = read_tensors(tmp_path / f"of_{name}"), read_tensors(source)
        for weight in [weight for weight in new if not weight.startswith(("optimizer.", "ema."))]:
            expected = new if weight.startswith(HEAD) and "off" in name else given
            assert torch.equal(found[weight], expected[weight]), (name, weight)
        mains = [main for main in found if main.startswith("optimizer.state.fp32_param.")]
        assert mains
        for main in mains if name.startswith("average") else []:
            expected = new if HEAD in main and "off" in name else given
            assert torch.equal(found[main], expected[main]), (name, main)
    log = (tmp_path / "of_bf16.log").read_text()
    assert log.count("the auxiliary head starts afresh") == 2


@pytest.mark.parametrize("weights", ["main", "ema"])
def test_an_export_has_no_head_and_passes_the_parity_check(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, weights: str
) -> None:
    with caplog.at_level(logging.INFO):
        check = export_hf(str(folder / "bf16"), str(tmp_path / "hf"), weights=weights)  # type: ignore[arg-type]
    assert check is not None
    assert "the export does not have it" in caplog.text
    assert "distance to the states of the reverse model hf" in (tmp_path / "hf/README.md").read_text()
    assert not [name for name in load_file(tmp_path / "hf/model.safetensors") if "auxiliary" in name]


UNFIT = {
    "a forward model": ({"config.json": {"direction": "forward"}}, "records the direction forward, ReverseLM needs"),
    "no direction": ({"config.json": {"direction": None}}, "records no direction"),
    "another tokenizer": ({"config.json": {"tokenizer_sha256": "b" * 64}}, "use the same tokenizer for both"),
    "another vocabulary": ({"config.json": {"vocab_size": 900}}, "of 900 ids"),
    "a short context": ({"config.json": {"max_position_embeddings": 16}}, "fewer than data.seq_length=32"),
    "few layers": ({"config.json": {"num_hidden_layers": 1}}, "but the teacher has 1 layers"),
    "no card": ({"export.json": {"files": None}}, "has a damaged config.json or export.json"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_built(
    data: TinyData, teacher: Path, tmp_path: Path, name: str
) -> None:
    changed, reason = UNFIT[name]
    other = shutil.copytree(teacher, tmp_path / "other")
    for file, values in changed.items():
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **values}))
    config = load_config(str(data.config), student(data, other, "train.auxiliary.teacher_layer=1"))
    with pytest.raises(LedomError) as caught:
        check_resumable(config, load_sources(config), None)
    assert reason in str(caught.value)
