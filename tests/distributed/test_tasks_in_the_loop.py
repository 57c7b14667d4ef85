"""Tasks evaluated while training: as the exported model would score, alike in every layout, and training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.convert.export_hf import export_hf
from megatron_ledom.errors import ConfigError, DataError, UsageError
from megatron_ledom.inference import ReverseLM
from megatron_ledom.training.choice_files import check_tasks, read_choices
from megatron_ledom.training.span_scoring import TrainingScorer
from tests.tiny_runs import TinyData, curve, run_each_on_ranks, run_on_ranks

ITEMS: list[dict[str, Any]] = [
    {"context": f"{100 * k + 1} {100 * k + 2} {100 * k + 3}"[: 7 + 4 * (k % 2)] + " ", "gold": k % 3}
    | {"choices": [" ".join(str(100 * ((k + j - k % 3) % 10) + 4 + i) for i in range(1 + (k + j) % 3)) for j in range(3)]}
    for k in range(1, 10)
]
"""Item k: words of document k, then words of documents k, k + 1 and so on; the right choice is of document k."""
VPP = "parallel.virtual_pipeline_model_parallel_size"


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    """The override that names the file."""
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return f"train.task_files={{words: {tmp_path / 'choices.jsonl'}}}"


def overrides(data: TinyData, *more: str) -> list[str]:
    """A short run with dropout, so that a random state that was touched shows."""
    return ["train.train_iters=9", f"data.tokenizer={data.folder / 'legible'}", "model.hidden_dropout=0.1", *more]


def test_training_does_not_notice_and_the_values_are_the_exports(data: TinyData, tasks: str, tmp_path: Path) -> None:
    asked = run_on_ranks(data.config, tmp_path / "asked", *overrides(data, tasks, "train.task_interval=2"))
    plain = run_on_ranks(data.config, tmp_path / "plain", *overrides(data))
    assert curve(asked) == curve(plain)
    assert [record["iteration"] for record in asked if "tasks" in record] == [2, 4, 6, 8, 9]
    export_hf(str(tmp_path / "asked"), str(tmp_path / "model"))
    model = ReverseLM.from_pretrained(tmp_path / "model")
    right = per_token = 0
    for item in ITEMS:
        scores = model.log_likelihood([item["context"]] * 3, item["choices"])
        values = [[score.logprob for score in scores], [score.logprob / score.num_tokens for score in scores]]
        right += values[0].index(max(values[0])) == item["gold"]
        per_token += values[1].index(max(values[1])) == item["gold"]
    found = asked[-1]["tasks"]["words"]
    assert found == {"accuracy": right / 9, "accuracy_per_token": per_token / 9, "num_items": 9}


def record_scores() -> None:
    """A hook: every evaluation's scores go into `scores.jsonl` in the run folder, by each rank."""
    original = TrainingScorer.score

    def score(self: TrainingScorer, pairs: Any) -> Any:
        found = original(self, pairs)
        import torch.distributed as dist

        path = Path(self.state.config.run_dir, f"scores_{dist.get_rank()}.json")
        path.write_text(json.dumps([[one.text_ids, one.token_logprobs] for one in found]))
        return found

    TrainingScorer.score = score  # type: ignore[method-assign]


def test_every_layout_gives_the_exports_values_on_every_rank(data: TinyData, tasks: str, tmp_path: Path) -> None:
    layouts = {
        "dp": [],
        "tp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        "pp": ["parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=2", "train.z_loss_coeff=1e-4"],
        "vpp": ["parallel.pipeline_model_parallel_size=2", f"{VPP}=2", "model.num_layers=4"],
        "cp": ["parallel.context_parallel_size=2", "data.reset_attention_mask=true"],
        "overlap": ["use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"],
    }
    layouts["overlap"] = [f"parallel.{key}=true" for key in layouts["overlap"]]
    common = [text for text in overrides(data, tasks, "train.train_iters=3") if "dropout" not in text]
    runs = {tmp_path / name: [*common, *layout] for name, layout in layouts.items()}
    run_each_on_ranks(data.config, runs, num_ranks=2, hook=record_scores)
    pairs = [(item["context"], choice) for item in ITEMS for choice in item["choices"]]
    for name in layouts:
        found = [json.loads((tmp_path / name / f"scores_{rank}.json").read_text()) for rank in range(2)]
        assert found[0] == found[1], name
        export_hf(str(tmp_path / name), str(tmp_path / f"{name}_model"), verify=None)
        model = ReverseLM.from_pretrained(tmp_path / f"{name}_model")
        expected = model.log_likelihood([before for before, _ in pairs], [after for _, after in pairs])
        for (text_ids, logprobs), score in zip(found[0], expected, strict=True):
            assert text_ids == score.text_ids, name
            assert logprobs == pytest.approx(score.token_logprobs, abs=2e-5), name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "choices.jsonl:1 is not JSON"),
        ('{"context": "1", "choices": ["2"], "gold": 0}', "fewer than two choices"),
        ('{"context": "1", "choices": ["2", "3"], "gold": 2}', "gold=2, none of 0 to 1"),
        ('{"choices": ["2", "3"], "gold": 1}', "lacks a key"),
        ("", "has no lines"),
    ],
)
def test_faulty_items_are_refused_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "choices.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_choices(str(tmp_path / "choices.jsonl"))


def test_what_cannot_be_evaluated_is_refused_before_anything_heavy(data: TinyData, tasks: str, tmp_path: Path) -> None:
    from megatron_ledom.config.load import load_config

    with pytest.raises(ConfigError, match=r"train.task_files.words=.* is no file"):
        check_tasks(load_config(str(data.config), ["train.task_files={words: nowhere.jsonl}"]), True)
    with pytest.raises(ConfigError, match=r"set data.tokenizer"):
        check_tasks(load_config(str(data.config), [tasks]), False)
    with pytest.raises(UsageError, match="a pass of the whole pipeline"):
        TrainingScorer.__new__(TrainingScorer).write(["1"], max_new_tokens=1, stop_strings=[])
