"""Tasks evaluated during training: the same scores as the exported model in every layout, and no effect on training."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.callbacks.task_files import check_tasks
from megatron_ledom.callbacks.tasks import TrainingScorer
from megatron_ledom.config.load import load_config
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, UsageError
from megatron_ledom.evaluation.multiple_choice import distinct_pairs, score_requests
from megatron_ledom.evaluation.task_evaluation import evaluate_task
from megatron_ledom.evaluation.task_model import LanguageTaskModel
from megatron_ledom.evaluation.tasks.loading import load_task
from megatron_ledom.inference import ReverseLM
from tests.support.tiny_runs import TinyData, curve, run_each_on_ranks, run_on_ranks, start_ranks

CHOICES = [
    [" ".join(str(100 * ((k + j) % 10) + 4 + i) for i in range(1 + (k + j) % 3)) for j in range(3)] for k in range(1, 10)
]
ITEMS: list[dict[str, Any]] = [
    {
        "question_stem": f"{100 * k + 1} {100 * k + 2} {100 * k + 3}"[: 7 + 4 * (k % 2)],
        "choices": {"text": CHOICES[k - 1], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[k % 3],
    }
    for k in range(1, 10)
]
"""Items in the format of OpenBookQA: words of document k, and choices from documents k, k + 1 and k + 2."""
VPP = "parallel.virtual_pipeline_model_parallel_size"


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that name the task and its file."""
    for name in ("test", "train"):
        (tmp_path / f"openbookqa_{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return "train.tasks=[openbookqa]", f"train.task_data={tmp_path}"


def overrides(data: TinyData, *more: str) -> list[str]:
    """Return overrides of a short run with dropout, so that a changed random state is seen."""
    return ["train.train_iters=9", f"data.tokenizer={data.folder / 'legible'}", "model.hidden_dropout=0.1", *more]


def test_training_is_unchanged_and_the_metrics_are_those_of_the_export(
    data: TinyData, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    seed = load_config(str(data.config), []).train.seed
    with_tasks = overrides(data, *tasks, "train.task_interval=2", "train.task_num_fewshot=1", "train.task_limit=8")
    evaluated = run_on_ranks(data.config, tmp_path / "evaluated", *with_tasks)
    plain = run_on_ranks(data.config, tmp_path / "plain", *overrides(data))
    assert curve(evaluated) == curve(plain)
    assert [record["iteration"] for record in evaluated if "tasks" in record] == [2, 4, 6, 8, 9]
    export_hf(str(tmp_path / "evaluated"), str(tmp_path / "model"))
    model = LanguageTaskModel(ReverseLM.from_pretrained(tmp_path / "model"))
    result = evaluate_task(model, load_task("openbookqa", tmp_path, limit=8, num_fewshot=1, seed=seed))
    expected = {name.partition("/")[2]: value for name, value in result.metric_values().items()}
    assert evaluated[-1]["tasks"]["openbookqa"] == {"accuracy": expected[result.main], **expected, "num_items": 8}


def record_scores() -> None:
    """Write, as a hook of each rank, the scores of every evaluation into `scores_RANK.json` in the run folder."""
    original = TrainingScorer.score

    def score(self: TrainingScorer, pairs: Any) -> Any:
        found = original(self, pairs)
        import torch.distributed as dist

        path = Path(self.state.config.run_dir, f"scores_{dist.get_rank()}.json")
        path.write_text(json.dumps([[one.text_ids, one.token_logprobs] for one in found]))
        return found

    TrainingScorer.score = score  # type: ignore[method-assign]


def test_every_layout_gives_the_values_of_the_export_on_every_rank(
    data: TinyData, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    layouts = {
        "dp": [],
        "tp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        "pp": ["parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=2", "train.z_loss_coeff=1e-4"],
        "vpp": ["parallel.pipeline_model_parallel_size=2", f"{VPP}=2", "model.num_layers=4"],
        "cp": ["parallel.context_parallel_size=2", "data.reset_attention_mask=true"],
        "overlap": ["use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"],
    }
    layouts["overlap"] = [f"parallel.{key}=true" for key in layouts["overlap"]]
    common = [text for text in overrides(data, *tasks, "train.train_iters=3") if "dropout" not in text]
    runs = {tmp_path / name: [*common, *layout] for name, layout in layouts.items()}
    run_each_on_ranks(data.config, runs, num_ranks=2, hook=record_scores)
    task = load_task("openbookqa", tmp_path)
    pairs = distinct_pairs([score_requests(task.task, Direction.REVERSE, item, []) for item in task.items])
    assert {bool(following) for _, following in pairs} == {True, False}  # the edge of a document is scored, too
    for name in layouts:
        found = [json.loads((tmp_path / name / f"scores_{rank}.json").read_text()) for rank in range(2)]
        assert found[0] == found[1], name
        export_hf(str(tmp_path / name), str(tmp_path / f"{name}_model"), verify=None)
        expected = LanguageTaskModel(ReverseLM.from_pretrained(tmp_path / f"{name}_model")).score(pairs)
        for (text_ids, logprobs), score in zip(found[0], expected, strict=True):
            assert text_ids == score.text_ids, name
            assert logprobs == pytest.approx(score.token_logprobs, abs=2e-5), name


def test_tasks_that_cannot_be_evaluated_are_refused_before_anything_heavy(
    data: TinyData, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    def config(*more: str) -> Any:
        return load_config(str(data.config), [*tasks, *more])

    check_tasks(config(), True)
    with pytest.raises(ConfigError, match=r"set data.tokenizer"):
        check_tasks(config(), False)
    with pytest.raises(ConfigError, match=r"train.task_data=null"):
        check_tasks(config("train.task_data=null"), True)
    with pytest.raises(ConfigError, match=r"names gsm8k, in which the model writes text"):
        check_tasks(config("train.tasks=[gsm8k]"), True)
    with pytest.raises(UsageError, match=r"no task 'openbook'; did you mean openbookqa"):
        check_tasks(config("train.tasks=[openbook]"), True)
    with pytest.raises(UsageError, match=r"piqa needs its items in"):
        check_tasks(config("train.tasks=[piqa]"), True)
    with pytest.raises(UsageError, match="a pass of the whole pipeline"):
        TrainingScorer.__new__(TrainingScorer).write(["1"], max_new_tokens=1, stop_strings=[])


def test_a_text_longer_than_a_sample_ends_the_run_before_its_first_step(
    data: TinyData, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    ranks = start_ranks(data.config, tmp_path / "run", *overrides(data, *tasks, "train.task_num_fewshot=8"))
    assert ranks.wait() == [1]
    assert "exceeds data.seq_length=" in ranks.output()
    assert "lower train.task_num_fewshot" in ranks.output()
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()
