"""Loss difference of a forward and a reverse model: slow reference, positions, windows, resuming, report."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation import loss_comparison
from megatron_ledom.evaluation.intervals import bootstrap_interval
from megatron_ledom.evaluation.item_file import numbered
from megatron_ledom.evaluation.loss_difference import (
    CompareSettings,
    Document,
    document_losses,
    document_records,
    summarize,
    windows,
)
from megatron_ledom.evaluation.record_checks import document_check
from megatron_ledom.inference.language_model import ForwardLM, LanguageModel, ReverseLM
from megatron_ledom.reports.losses import sentence
from tests.support.tiny_models import random_model_folder, random_text
from tests.support.tool_runs import run_tool

SETTINGS = CompareSettings(context=512, batch_size=4, num_resamples=200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("compared")
    models = {name: str(random_model_folder(root / name, "sentencepiece", name)) for name in ("forward", "reverse")}
    return {**models, "other": str(random_model_folder(root / "other", "byte_level", "reverse"))}


@pytest.fixture(scope="module")
def models(folders: dict[str, str]) -> tuple[ForwardLM, ReverseLM]:
    return ForwardLM.from_pretrained(folders["forward"]), ReverseLM.from_pretrained(folders["reverse"])


def documents(num: int) -> list[Document]:
    rng = random.Random(5)
    return [Document(random_text(rng, 12), f"part {number % 3}") for number in range(num)]


def one_by_one(model: LanguageModel, tokens: list[int], context: int) -> list[float]:
    """Return -log P of each of `tokens` after the first, each in its own pass over the context that the rule allows."""
    losses = []
    for at in range(1, len(tokens)):
        end = context
        while at >= end:
            end += context // 2
        first = max(0, min(end, len(tokens)) - context)
        with torch.no_grad():
            logits = model.model(torch.tensor([tokens[first:at]])).logits[0, -1].double()
        losses.append(-float(torch.log_softmax(logits, -1)[tokens[at]]))
    return losses


@pytest.mark.parametrize("context", [512, 17, 2])
def test_losses_are_those_of_a_slow_reference_by_token_place_and_sum(context: int, models: tuple[ForwardLM, ReverseLM]) -> None:
    found = document_records(*models, documents(2), CompareSettings(context=context, batch_size=3))
    for document, record in zip(documents(2), found, strict=True):
        text_ids = models[1].tokenizer.encode(document.text)
        num = len(text_ids)
        assert num > 8
        for model, side in zip(models, ("forward", "reverse"), strict=True):
            eod = model.stop_ids[0]
            turned = side == "reverse"
            tokens = [eod, *(reversed(text_ids) if turned else text_ids), eod]
            *losses, closing = one_by_one(model, tokens, context)
            losses = list(reversed(losses)) if turned else losses
            assert record[side]["tokens"] == num
            assert record[side]["loss"] == pytest.approx(sum(losses), abs=1e-4)
            assert record[side]["inner"] == pytest.approx(sum(losses[1:-1]), abs=1e-4)
            assert (record[side]["first"], record[side]["last"]) == pytest.approx((losses[0], losses[-1]), abs=1e-4)
            assert record[side]["eod"] == pytest.approx(closing, abs=1e-4)
            for tenth, value in enumerate(record["tenths"][side]):
                expected = [loss for at, loss in enumerate(losses) if at * 10 // num == tenth and 0 < at < num - 1]
                assert value == pytest.approx(sum(expected), abs=1e-4)
                assert record["tenths"]["tokens"][tenth] == len(expected)
            for name, places in (("from_start", range(1, num + 1)), ("from_end", range(num, 0, -1))):
                for group, value in enumerate(record[name][side]):
                    expected = [
                        loss
                        for at, loss in zip(places, losses, strict=True)
                        if 2**group <= at < 2 ** (group + 1) and 1 < at < num
                    ]
                    assert value == pytest.approx(sum(expected), abs=1e-4)
                    assert record[name]["tokens"][group] == len(expected)


@pytest.mark.parametrize("context", [2, 3, 4, 7, 10, 64])
def test_windows_score_each_token_once_with_half_a_context_before_it(context: int) -> None:
    for length in range(2, 40):
        spans = windows(list(range(length)), 1, context)
        assert [token for span in spans for token in span.tokens[span.num_context :]] == list(range(1, length))
        assert all(len(span.tokens) <= context for span in spans)
        assert all(span.num_context >= (context + 1) // 2 for span in spans[1:])


def test_a_context_beyond_the_models_positions_is_refused(models: tuple[ForwardLM, ReverseLM]) -> None:
    for context in (1, 513):
        with pytest.raises(UsageError, match=r"at most the model's 512 positions"):
            document_losses(models[0], [[5, 6]], context=context, batch_size=1)


def test_a_model_compared_with_itself_differs_by_exactly_nothing(models: tuple[ForwardLM, ReverseLM]) -> None:
    summary = summarize(document_records(models[0], models[0], documents(8), SETTINGS), SETTINGS)
    assert summary["all"]["per_inner_token"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert summary["all"]["reverse_above_forward"]["difference"] == 0.0
    assert summary["all"]["whole_documents"]["bits_per_byte"]["difference"] == 0.0
    assert all(row["difference"] == 0.0 for name in ("tenths", "from_start", "from_end") for row in summary[name])


def test_domains_and_positions_add_up_to_all(models: tuple[ForwardLM, ReverseLM]) -> None:
    records = document_records(*models, [*documents(9), Document("", "empty")], SETTINGS)
    summary = summarize(records, SETTINGS)
    whole, domains = summary["all"], summary["domains"]
    assert summary["documents_without_tokens"] == 1
    assert sorted(domains) == ["part 0", "part 1", "part 2"]
    for side in ("forward", "reverse"):
        for key in ("tokens", "loss"):
            assert sum(found[side][key] for found in domains.values()) == pytest.approx(whole[side][key])
        for name in ("tenths", "from_start", "from_end"):
            assert sum(row["tokens"] for row in summary[name]) == whole["inner_tokens"] == whole[side]["tokens"] - 2 * 9
            inner = sum(row["tokens"] * row[side] for row in summary[name])
            assert inner == pytest.approx(whole[side]["loss_per_inner_token"] * whole["inner_tokens"])
            ends = 9 * (whole[side]["mean_first"] + whole[side]["mean_last"])
            assert inner + ends == pytest.approx(whole[side]["loss"])
    losses = [whole[side]["loss_per_inner_token"] for side in ("forward", "reverse")]
    gap = losses[0] - losses[1]
    assert whole["per_inner_token"]["difference"] == pytest.approx(gap)
    low, high = whole["per_inner_token"]["interval"]
    assert low < gap < high
    assert whole["reverse_above_forward"]["difference"] == pytest.approx(losses[1] / losses[0] - 1)
    bits = whole["forward"]["bits_per_byte"] - whole["reverse"]["bits_per_byte"]
    assert whole["whole_documents"]["bits_per_byte"]["difference"] == pytest.approx(bits)


def test_documents_of_any_number_of_tokens_pass_the_check_of_a_resume(models: tuple[ForwardLM, ReverseLM]) -> None:
    texts = ["", "a", "x", "ab", *("the cat sat on the mat. " * num for num in (1, 2, 3, 40))]
    all_documents = [Document(text, where=str(number)) for number, text in enumerate(texts, 1)]
    records = json.loads(json.dumps(numbered(0, document_records(*models, all_documents, SETTINGS))))
    assert {0, 1, 2} <= {record["forward"]["tokens"] for record in records}
    check = document_check(all_documents, with_positions=True)
    for number, record in enumerate(records):
        check(number, record)


def test_documents_of_one_and_two_tokens_have_no_inner_ones(models: tuple[ForwardLM, ReverseLM]) -> None:
    records = document_records(*models, [Document("a"), Document("x"), *documents(2)], SETTINGS)
    assert [record["forward"]["tokens"] for record in records[:2]] == [1, 2]
    assert [record["forward"]["inner"] for record in records[:2]] == [0.0, 0.0]
    summary = summarize(records, SETTINGS)
    assert summary["all"]["inner_tokens"] == sum(row["tokens"] for row in summary["tenths"])
    alone = summarize(records[:2], SETTINGS)
    assert alone["all"]["per_inner_token"]["difference"] is None
    assert "nothing can be compared" in sentence(alone)


def test_the_interval_of_a_ratio_draws_whole_documents() -> None:
    """With one long document among short ones, some resamples lack it, so the interval includes the short ones' value."""
    import numpy as np

    values, weights = np.array([0.0] * 9 + [100.0]), np.array([1.0] * 9 + [10.0])
    low, high = bootstrap_interval(values, weights, level=0.95, num_resamples=2000, seed=1)
    assert low == 0.0
    assert 5 < high < 10
    assert bootstrap_interval(values[9:], weights[9:], level=0.95, num_resamples=10, seed=1) == [10.0, 10.0]


def write_data(folder: Path, num: int = 7) -> str:
    path = folder / "held_out.jsonl"
    rows = [{"text": document.text, "domain": document.domain} for document in documents(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_tool_writes_a_report_and_a_killed_run_resumes_with_the_same_bytes(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss_comparison, "WINDOW_DOCUMENTS", 3)
    options = [folders["forward"], folders["reverse"], "--data", write_data(tmp_path), "--domain-key", "domain"]
    output = tmp_path / "out"
    assert run_tool(monkeypatch, "compare_losses", *options, "--output", str(output)) == 0, capsys.readouterr().err
    names = ("losses.jsonl", "report.json", "report.md", "report.html")
    whole = {name: (output / name).read_bytes() for name in names}
    lines = whole["losses.jsonl"].splitlines(keepends=True)
    assert len(lines) == 7
    (output / "losses.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    sizes = []
    inner = loss_comparison.document_records
    monkeypatch.setattr(loss_comparison, "document_records", lambda *a: sizes.append(len(a[2])) or inner(*a))
    assert run_tool(monkeypatch, "compare_losses", *options, "--output", str(output)) == 0
    assert sizes == [3, 1]
    assert {name: (output / name).read_bytes() for name in names} == whole
    assert run_tool(monkeypatch, "compare_losses", *options, "--output", str(output), "--context", "64") == 1
    printed = capsys.readouterr()
    assert "context was 512 and is 64" in printed.err
    report = json.loads(whole["report.json"])
    assert report["all"]["documents"] == 7
    assert report["about"]["forward"]["model"] == folders["forward"]
    page = whole["report.html"].decode()
    assert (
        len(re.findall(r'<source srcset="data:image/png', page)) == 4
    )  # three by position, one by domain; each for dark pages, too
    assert "http" not in re.sub(r'src(set)?="data:[^"]*"', "", page)
    for text in (page, whole["report.md"].decode()):
        assert "forward, bits a byte" in text
        assert f"{report['all']['forward']['bits_per_byte']:.4f}" in text
        assert "part 2" in text
        assert f"{report['all']['per_inner_token']['difference']:+.4f}" in text
        assert "begins after eod" in text


@pytest.fixture(scope="module")
def compared(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and a finished comparison of it."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_tool(monkeypatch, "compare_losses", *compare_options(folders, root)) == 0
    return root


def compare_options(folders: dict[str, str], root: Path) -> list[str]:
    options = [folders["forward"], folders["reverse"], "--data", str(root / "held_out.jsonl")]
    return [*options, "--output", str(root / "out")]


def refused(
    line: str, compared: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> Path:
    """Return the path of a losses.jsonl whose second line is `line`. The command must refuse it."""
    root = shutil.copytree(compared, tmp_path / "copy")
    path = root / "out/losses.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:], ""]))
    assert run_tool(monkeypatch, "compare_losses", *compare_options(folders, root), *options) == 1
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([('"loss": ', '"loss": 1')], "forward.loss is "),
        ([('"loss": ', '"loss": NaN, "x": ')], "is damaged (NaN is not a finite number)"),
        ([('"eod": ', '"eod": 1e999, "x": ')], "is damaged (1e999 is not a finite number)"),
        ([('"eod": ', '"eod": "2'), ("}, ", '"}, ')], "forward.eod is "),
        ([('"eod": ', '"eod": -')], "forward.eod is -"),
        ([('"tokens": ', '"tokens": 1')], "reverse.tokens is "),
        ([('"item": 1', '"item": 0')], "is of item 0, expected item 1"),
        ([('"item": 1, ', "")], "has no number under 'item'"),
        ([('"domain": ""', '"domain": "web"')], 'domain is "web", expected ""'),
        ([('"where": "2"', '"where": "1"')], 'where is "1", expected "2"'),
        ([('"bytes": ', '"bytes": 1')], "bytes is "),
        ([('"tenths": {"tokens": [', '"tenths": {"tokens": [0, ')], "tenths.tokens is "),
        ([('"from_end": {"tokens": [', '"from_end": {"tokens": [1')], "the sum of from_end.tokens is "),
        ([('"tenths": {"tokens"', '"tenth": {"tokens"')], "the line has no field 'tenths'"),
    ],
)
def test_a_line_that_the_command_cannot_have_written_is_not_resumed(
    changes: list[tuple[str, str]],
    message: str,
    compared: Path,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = (compared / "out/losses.jsonl").read_text().splitlines()[1]
    for old, new in changes:
        assert old in line
        line = line.replace(old, new, 1)
    path = refused(line, compared, folders, tmp_path, monkeypatch)
    error = capsys.readouterr().err
    assert f"{path}:2" in error
    assert message in error


@pytest.mark.parametrize("line", ["{}", '{"item": 1}', "[]", "null", "[" * 100_000, '"text"'])
def test_a_line_without_losses_is_refused_with_file_and_line(
    line: str,
    compared: Path,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = refused(line, compared, folders, tmp_path, monkeypatch)
    assert f"{path}:2" in capsys.readouterr().err


def test_a_copy_of_the_first_line_instead_of_the_second_is_refused(
    compared: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (compared / "out/losses.jsonl").read_text().splitlines()[0]
    path = refused(line, compared, folders, tmp_path, monkeypatch)
    assert f"{path}:2 is of item 0, expected item 1" in capsys.readouterr().err


def test_a_smaller_limit_reads_the_first_lines_and_refuses_later_ones_out_of_order(
    compared: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (compared / "out/losses.jsonl").read_text().splitlines()
    root = shutil.copytree(compared, tmp_path / "smaller")
    assert run_tool(monkeypatch, "compare_losses", *compare_options(folders, root), "--limit", "3") == 0
    assert (root / "out/losses.jsonl").read_text().splitlines() == lines
    assert json.loads((root / "out/report.json").read_text())["all"]["documents"] == 3
    path = refused(lines[0], compared, folders, tmp_path, monkeypatch, "--limit", "1")
    assert f"{path}:2 is of item 0, expected item 1" in capsys.readouterr().err


def test_different_tokenizers_are_refused_and_then_compared_by_byte_only(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [folders["forward"], folders["other"], "--data", write_data(tmp_path), "--output", str(tmp_path / "out")]
    assert run_tool(monkeypatch, "compare_losses", *options) == 1
    assert "have different tokenizers" in capsys.readouterr().err
    assert run_tool(monkeypatch, "compare_losses", *options, "--different-tokenizers") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert run_tool(monkeypatch, "compare_losses", *options, "--different-tokenizers") == 0  # all lines are resumed
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert "tenths" not in report
    assert "per_inner_token" not in report["all"]
    assert report["all"]["compared"] == "whole documents"
    assert report["all"]["forward"]["tokens"] != report["all"]["reverse"]["tokens"]
    sides = [report["all"][side]["loss"] / math.log(2) / report["all"]["bytes"] for side in ("forward", "reverse")]
    assert report["all"]["whole_documents"]["bits_per_byte"]["difference"] == pytest.approx(sides[0] - sides[1])


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"--data": "nowhere.jsonl"}, 2, "nowhere.jsonl is not a file"),
        ({"--text-key": "content"}, 1, ":1 has no text under 'content'; found the keys text, domain"),
        ({"--domain-key": "source"}, 1, "no text under 'source'"),
        ({"--limit": "0"}, 2, "--limit 0 must be at least 1"),
        ({"--context": "600"}, 2, "at most the model's 512 positions"),
        ({"--batch-size": "0"}, 2, "batch_size=0"),
        ({"--eod-id": "3"}, 2, "remove it"),
    ],
)
def test_bad_input_has_its_message_and_exit_code(
    changed: dict[str, str],
    code: int,
    message: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"--data": write_data(tmp_path), "--output": str(tmp_path / "out"), **changed}
    arguments = [word for pair in options.items() for word in pair]
    assert run_tool(monkeypatch, "compare_losses", folders["forward"], folders["reverse"], *arguments) == code
    assert message in capsys.readouterr().err


def test_swapped_folders_are_refused(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", write_data(tmp_path), "--output", str(tmp_path / "out")]
    assert run_tool(monkeypatch, "compare_losses", folders["reverse"], folders["forward"], *options) == 1
    assert "records the direction reverse" in capsys.readouterr().err
