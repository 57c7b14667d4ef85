"""`ledom infill`: exact seams, scores of both models, overlap or not, two-way folders, resume after a kill, and refusals."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.infilling.command import Infill, load_models
from megatron_ledom.inference.infilling.infiller import Gap, Infiller, InfillModel, InfillSettings
from megatron_ledom.inference.line_output import UnfinishedOutput, Window, write_line_file
from tests.support.tiny_models import (
    byte_level_json,
    chain_model,
    forward_and_reverse,
    random_model_folder,
    save_model_folder,
)
from tests.support.tool_runs import run_tool

GAPS = [
    ("The capital of", " Paris is nice."),
    ("def area(width", "    return width"),
    ("Once", "The end."),
    ("漢字 and", "é."),
    ("a", "b"),
]
SETTINGS = InfillSettings(sampling=Sampling(max_new_tokens=16, temperature=0.8, num_return_sequences=4), overlap_tokens=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return forward_and_reverse(tmp_path_factory.mktemp("twins"), "sentencepiece", "sentencepiece")


@pytest.fixture(scope="module")
def infiller(folders: tuple[Path, Path]) -> Infiller:
    return Infiller(*load_models(*folders, 4))


def gaps(settings: InfillSettings = SETTINGS) -> list[Gap]:
    return [Gap(prefix, suffix, f"0/{number}", settings) for number, (prefix, suffix) in enumerate(GAPS)]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_scored_by_both_models_and_those_that_met_come_first(infiller: Infiller, folders: tuple[Path, Path]) -> None:
    forward, reverse = ForwardLM.from_pretrained(folders[0]), ReverseLM.from_pretrained(folders[1])
    found = infiller.fill(gaps())
    assert {one.writer for filled in found for one in filled.infillings} == {"both", "forward", "reverse"}
    for gap, filled in zip(gaps(), found, strict=True):
        order = [(not one.met, -one.score) for one in filled.infillings]
        assert order == sorted(order)
        for one in filled.infillings:
            onward = forward.log_likelihood(gap.prefix, one.middle + gap.suffix).logprob
            back = reverse.log_likelihood(gap.prefix + one.middle, gap.suffix).logprob
            assert (one.forward_logprob, one.reverse_logprob) == (pytest.approx(onward), pytest.approx(back))
            assert one.score == one.forward_logprob + one.reverse_logprob


def test_a_gap_gets_the_same_texts_alone_as_with_others(infiller: Infiller) -> None:
    together = infiller.fill(gaps())
    for gap, filled in zip(gaps(), together, strict=True):
        (alone,) = infiller.fill([gap])
        assert [(one.middle, one.writer) for one in alone.infillings] == [(one.middle, one.writer) for one in filled.infillings]


def test_no_text_contains_a_stop_string(infiller: Infiller) -> None:
    stopped = replace(SETTINGS, sampling=replace(SETTINGS.sampling, stop_strings=["a", " "], num_return_sequences=6))
    texts = [one.middle for filled in infiller.fill(gaps(stopped)) for one in filled.infillings]
    assert texts
    assert not [text for text in texts if "a" in text or " " in text]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twins that memorized one text, each in its direction."""
    root, text = tmp_path_factory.mktemp("chains"), "The capital of Germany is Berlin, and"
    tokenizer = Tokenizer.from_str(byte_level_json())
    ids = tokenizer.encode(text).ids
    assert len(set(ids)) == len(ids)
    size = tokenizer.get_vocab_size()
    onward, back = dict(pairwise(ids)), {other: one for one, other in pairwise(ids)}
    folders = [
        save_model_folder(root / name, chain_model(size, next_of), byte_level_json(), name)
        for name, next_of in (("forward", onward), ("reverse", back))
    ]
    return folders[0], folders[1]


def test_models_that_agree_meet_and_write_exactly_the_missing_text(chains: tuple[Path, Path], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"id": 7, "prompt": "The capital of", "suffix": " Berlin, and", "middle": "old"})
    output = tmp_path / "out.jsonl"
    options = {"max_new_tokens": 12}
    job = Infill(lambda: load_models(*chains, 2), InfillSettings(sampling=Sampling(**options)))
    assert write_line_file(job, source, output, {}, overwrite=False) == 1
    (line,) = read(output)
    assert (line["id"], line["middle"], line["met"]) == (7, " Germany is", True)
    assert line["infillings"][0]["writer"] == "both"
    usage = json.loads((tmp_path / "out.jsonl.spent.json").read_text())
    assert (usage["num_lines"], usage["num_met"], usage["num_skipped"]) == (1, 1, 0)
    assert min(usage["forward_tokens"], usage["reverse_tokens"]) > 12


def test_models_that_do_not_meet_report_it_and_give_the_best_text_of_one_of_them(chains: tuple[Path, Path]) -> None:
    infiller = Infiller(*load_models(*chains, 2))
    (filled,) = infiller.fill(
        [Gap("The capital", " dog", "0", InfillSettings(sampling=Sampling(max_new_tokens=4), overlap_tokens=9))]
    )
    assert [one.met for one in filled.infillings] == [False] * len(filled.infillings)
    assert filled.infillings[0].score == max(one.score for one in filled.infillings)
    assert " of Germany" in {one.middle[:11] for one in filled.infillings if one.writer == "forward"}


def test_the_command_fills_a_file_and_is_complete_when_run_again(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": prefix, "suffix": suffix} for prefix, suffix in GAPS))
    output = tmp_path / "new" / "out.jsonl"
    command = ["--forward", str(folders[0]), "--reverse", str(folders[1]), "--input", str(source), "--output", str(output)]
    command += [
        "--max-new-tokens",
        "6",
        "--num-samples",
        "2",
        "--temperature",
        "1",
        "--overlap-tokens",
        "1",
        "--batch-size",
        "3",
    ]
    assert run_tool(monkeypatch, "infill", *command) == 0
    assert f"{output}: lines: 5, met: {sum(line['met'] for line in read(output))}, " in capsys.readouterr().err
    before = output.read_bytes()
    assert run_tool(monkeypatch, "infill", *command) == 0
    assert "is complete; nothing to do" in capsys.readouterr().err
    assert run_tool(monkeypatch, "infill", *command, "--seed", "3") == 2
    assert "settings.sampling.seed was 0 and is 3" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_stopped_run_resumes_to_the_identical_file(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": prefix, "suffix": suffix} for prefix, suffix in GAPS))
    monkeypatch.setattr("megatron_ledom.inference.infilling.command.WINDOW_TEXTS", 16)
    job = Infill(lambda: load_models(*folders, 4), SETTINGS)
    write_line_file(job, source, tmp_path / "whole.jsonl", {}, overwrite=False)
    plain = UnfinishedOutput.append

    def stop(self: UnfinishedOutput[Any], window: Window) -> None:
        plain(self, window)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(UnfinishedOutput, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            write_line_file(job, source, tmp_path / "out.jsonl", {}, overwrite=False)
    assert len(read(tmp_path / "out.jsonl.part")) == 2
    write_line_file(job, source, tmp_path / "out.jsonl", {}, overwrite=False)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_two_way_folder_is_loaded_once_and_reads_both_ways(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "model", "byte_level", "forward")
    config = json.loads((folder / "config.json").read_text())
    readings = [{"direction": d, "unit": "token", "marker_id": n} for n, d in enumerate(("forward", "reverse"), 1)]
    (folder / "config.json").write_text(json.dumps({**config, "direction": "both", "readings": readings}))
    forward, reverse = load_models(folder, folder, 4)
    assert forward.engine._lm.model is reverse.engine._lm.model  # type: ignore[attr-defined]
    assert (forward.rows.leading_ids, reverse.rows.leading_ids) == ([1], [2])
    own = ReverseLM.from_pretrained(folder).log_likelihood("The cat", " sat.").logprob
    assert reverse.engine.score([("The cat", " sat.")])[0].logprob == pytest.approx(own)
    assert all(filled.infillings for filled in Infiller(forward, reverse).fill(gaps()))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a"}, 'in.jsonl:2: expected an object with a text that is not empty under "suffix"'),
        ({"prompt": "", "suffix": "b"}, 'under "prompt"'),
        (
            {"prompt": "a b " * 300, "suffix": "b"},
            "in.jsonl:2: .*512 positions of the forward model; shorten it, lower --max-new-tokens",
        ),
        ({"prompt": "a", "suffix": "\ud800"}, "in.jsonl:2: .*half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(folders: tuple[Path, Path], tmp_path: Path, line: dict[str, Any], says: str) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "suffix": "b"}, line)
    job = Infill(lambda: load_models(*folders, 4), SETTINGS)
    with pytest.raises(DataError, match=says):
        write_line_file(job, source, tmp_path / "out.jsonl", {}, overwrite=False)
    assert not list(tmp_path.glob("out.jsonl*.part"))


def test_lines_that_are_too_long_are_skipped_on_request(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a b " * 300, "suffix": "b"}, {"prompt": "a", "suffix": "b"})
    write_line_file(
        Infill(lambda: load_models(*folders, 4), SETTINGS, "skip"), source, tmp_path / "out.jsonl", {}, overwrite=False
    )
    first, second = read(tmp_path / "out.jsonl")
    assert (first["middle"], first["met"], first["infillings"]) == (None, False, [])
    assert "512 positions" in first["skipped"]
    assert isinstance(second["middle"], str)


def test_models_that_cannot_meet_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, reverse = (
        InfillModel.of(model) for model in (ForwardLM.from_pretrained(folders[0]), ReverseLM.from_pretrained(folders[1]))
    )
    with pytest.raises(UsageError, match="exchange them"):
        Infiller(reverse, forward)
    other = InfillModel.of(ReverseLM.from_pretrained(random_model_folder(tmp_path / "other", "byte_level", "reverse")))
    with pytest.raises(MismatchError, match="different tokenizers"):
        Infiller(forward, other)
    with pytest.raises(UsageError, match="at least 1 token"):
        InfillSettings(overlap_tokens=0)
    paths = [
        "--input",
        str(write(tmp_path / "in.jsonl", {"prompt": "a", "suffix": "b"})),
        "--output",
        str(tmp_path / "out.jsonl"),
    ]
    assert run_tool(monkeypatch, "infill", "--forward", str(folders[0]), *paths) == 2
    assert (
        "found --forward of the models; pass --forward and --reverse, or a two-way model as --model" in capsys.readouterr().err
    )
    assert run_tool(monkeypatch, "infill", "--model", str(folders[0]), *paths) == 1
    assert "records the direction forward, ReverseLM needs a reverse model" in capsys.readouterr().err
