"""Reranking with problems: too long texts, an existing output, values that JSON lacks, a long run."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, TransientError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.completions_engine import CompletionsEngine
from megatron_ledom.inference.engines.engine import StepDelimiter, empty_answer
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.line_output import SUMS
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings
from megatron_ledom.inference.reverse_reward.command import skip_warning, summary_of
from megatron_ledom.inference.reverse_reward.input_lines import RANKED
from megatron_ledom.inference.reverse_reward.ranked_lines import read_reranked
from megatron_ledom.inference.reverse_reward.reranking import RerankSettings, rerank_file
from megatron_ledom.inference.reverse_reward.reward import Candidate, RewardSettings, rank, score_questions
from megatron_ledom.inference.scoring import SpanScore
from tests.support.tiny_models import random_model_folder

PROMPT = "The capital of France is "
NULLS = {"forward_logprob": None, "reverse_logprob": None, "forward_tokens": None, "reverse_tokens": None, "reward": None}
LONG = "the " * 70
"""Too long for the reverse model; `LONG * 4` is also too long for the forward model."""
SAMPLING = Sampling(num_return_sequences=6, temperature=1.5, max_new_tokens=40, seed=1)


def model_folder(folder: Path, direction: str, num_positions: int) -> Path:
    random_model_folder(folder, "byte_level" if direction == "forward" else "sentencepiece", direction)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": num_positions}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ForwardLM, ReverseLM]:
    """Return a forward model of 160 positions and a reverse model of 64."""
    folder = tmp_path_factory.mktemp("models")
    forward = ForwardLM.from_pretrained(model_folder(folder / "forward", "forward", 160), device="cpu")
    return forward, ReverseLM.from_pretrained(model_folder(folder / "reverse", "reverse", 64), device="cpu")


def engines_of(models: tuple[ForwardLM, ReverseLM]) -> tuple[TransformersEngine, TransformersEngine]:
    return TransformersEngine(models[0], 4), TransformersEngine(models[1], 4)


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines, from a reader that refuses NaN."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().decode("utf-8").split("\n") if line]


def never() -> tuple[TransformersEngine, TransformersEngine]:
    pytest.fail("a model was loaded")


def test_texts_too_long_for_either_model_are_refused_before_anything_is_scored(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    engines = engines_of(models)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"prompt": PROMPT, "candidates": ["Paris", "Rome"]}
    for candidate, num_positions, model in (
        (LONG * 4, 160, "forward"),
        ({"text": LONG, "forward_logprob": -1.0}, 64, "reverse"),
    ):
        write_lines(source, good, {"prompt": PROMPT, "candidates": ["Nice", candidate, candidate]})
        message = rf"a text of \d+ tokens exceeds the {num_positions} positions of the {model} model \(and 1 more\); "
        with pytest.raises(DataError, match=rf"in\.jsonl:2: candidate 1: {message}.*--too-long skip"):
            rerank_file(lambda: engines, source, output, RerankSettings(window_candidates=1))
    assert [engine.usage.tokens for engine in engines] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_skipped_candidates_are_named_counted_and_last(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": PROMPT, "candidates": [LONG * 4, "Paris", "", "Rome"], "num_skipped": 7},
        {"prompt": PROMPT, "candidates": ["Paris", "Rome"], "num_skipped": 7},
        {"prompt": LONG, "candidates": ["Paris"]},
    )
    rerank_file(lambda: engines_of(models), source, tmp_path / "out.jsonl", RerankSettings(too_long="skip", token_values=True))
    mixed, whole, none = read_lines(tmp_path / "out.jsonl")
    alone = score_questions(*engines_of(models), [(PROMPT, [Candidate("Paris")])], RewardSettings())[0][0]
    assert mixed["scores"][1]["reward"] == pytest.approx(alone.reward, abs=1e-4)
    assert {**mixed["scores"][0], **NULLS} == mixed["scores"][0]
    assert "exceeds the 160 positions of the forward model" in mixed["scores"][0]["skipped"]
    assert mixed["ranking"][2:] == [0, 2]  # candidates without a reward are last, in their order
    assert (mixed["num_skipped"], "num_skipped" in whole, none["num_skipped"]) == (1, False, 1)
    assert (none["ranking"], none["best"]) == ([0], None)
    errors = capsys.readouterr().err
    assert f"skipped: {source}:1: candidate 0: a text of" in errors
    assert f"skipped: {source}:3: candidate 0: a text of" in errors
    sentence = summary_of(tmp_path / "out.jsonl")
    assert (
        "weight 0.5 (0 forward only, 1 reverse only); lines: 3, candidates: 7, skipped as too long: 2 candidates, " in sentence
    )


def test_sampling_is_refused_at_the_start_where_its_answers_may_not_fit_the_reverse_model(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    engines = engines_of(models)
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": PROMPT * 6})
    with pytest.raises(DataError, match=r"in\.jsonl:2: .* exceed the 64 positions of the reverse model; .*--max-new-tokens"):
        rerank_file(lambda: engines, source, tmp_path / "out.jsonl", RerankSettings(sampling=SAMPLING))
    write_lines(source, {"prompt": LONG * 4})
    with pytest.raises(DataError, match=r"in\.jsonl:1: .* exceed the 160 positions of the forward model"):
        rerank_file(lambda: engines, source, tmp_path / "out.jsonl", RerankSettings(sampling=SAMPLING))
    assert [engine.usage.tokens for engine in engines] == [0, 0]


@pytest.mark.parametrize("beam", [None, BeamSettings(num_beams=3, num_expansions=2, delimiter=StepDelimiter("[aeiou]"))])
def test_sampled_answers_that_are_too_long_get_no_score_and_end_no_run(
    beam: BeamSettings | None, models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    """One of two prompts has no room for an answer; the answers of the other are too long for the reverse model."""
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT * 2}, {"prompt": LONG * 4, "id": 3})
    settings = RerankSettings(sampling=SAMPLING, beam=beam, too_long="skip")
    rerank_file(lambda: engines_of(models), source, tmp_path / "out.jsonl", settings)
    first, second = read_lines(tmp_path / "out.jsonl")
    skipped = [index for index, score in enumerate(first["scores"]) if "skipped" in score]
    assert 0 < len(skipped) == first["num_skipped"]
    assert first["ranking"][-len(skipped) :] == skipped
    assert all(score["reward"] is not None for index, score in enumerate(first["scores"]) if index not in skipped)
    assert first["best"] == (None if first["ranking"][0] in skipped else first["candidates"][first["ranking"][0]])
    assert (second["id"], second["candidates"], second["scores"], second["ranking"], second["best"]) == (3, [], [], [], None)
    assert "exceed the 160 positions of the forward model" in second["skipped"]
    spent = json.loads((tmp_path / "out.jsonl.spent.json").read_text())
    assert (spent["num_lines"], spent["num_skipped"], spent["num_skipped_prompts"]) == (2, len(skipped), 1)


def test_an_answer_that_is_longer_when_it_is_scored_ends_no_run(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    """Random bytes become U+FFFD, of three bytes each, so a sampled answer has more tokens when it is scored."""
    sampling = Sampling(num_return_sequences=8, temperature=3.0, max_new_tokens=50, seed=5)
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT})
    rerank_file(lambda: engines_of(models), source, tmp_path / "out.jsonl", RerankSettings(sampling=sampling))
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert line["num_skipped"] > 0
    warning = skip_warning(tmp_path / "out.jsonl")
    assert warning is not None
    assert f"warning: {line['num_skipped']} of 8 candidates ({12.5 * line['num_skipped']:.1f} %) have no score" in warning
    assert "so --too-long refuse did not catch them; lower --max-new-tokens" in warning


def test_a_batch_is_divided_if_its_rows_fit_only_separately(models: tuple[ForwardLM, ReverseLM]) -> None:
    """The longest answer needs few more tokens, the shortest many: together they would exceed the positions."""
    forward = engines_of(models)[0]
    prompt = "the " * 20
    num_new = 160 - len(models[0].tokenizer.encode(prompt))
    sampling = Sampling(temperature=1.0, max_new_tokens=num_new, seed=2)
    assert forward.growth_problem(prompt, num_new) is None
    delimiter = StepDelimiter("[a-z]")
    (paths,) = forward.expand([empty_answer(prompt, sampling)], 1, delimiter, sampling)
    long = paths[0]
    while not long.finished and long.num_tokens < num_new // 2:
        ((long,),) = forward.expand([long], 1, delimiter, sampling)
    grown = forward.expand([empty_answer(prompt, sampling, 1), long], 1, delimiter, sampling)
    alone = [forward.expand([path], 1, delimiter, sampling)[0][0].text for path in (empty_answer(prompt, sampling, 1), long)]
    assert not long.finished
    assert [row[0].text for row in grown] == alone


def test_remote_engines_compute_the_same_lengths(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "reverse", "reverse", 64)
    remote = CompletionsEngine("http://localhost:1/v1", "reverse", folder, Direction.REVERSE)
    engine = engines_of(models)[1]
    for answer in ("Paris", "the " * 25, LONG):
        assert remote.score_problem((PROMPT, answer), include_end=True) == engine.score_problem(
            (PROMPT, answer), include_end=True
        )
        assert (remote.growth_problem(answer, 30) is None) == (engine.growth_problem(answer, 30) is None)


def test_an_output_of_other_settings_is_not_overwritten_unless_asked(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT, "candidates": ["Paris", "Rome"]})
    output, other = tmp_path / "new" / "out.jsonl", RerankSettings(reward=RewardSettings(weight=1.0))
    rerank_file(lambda: engines_of(models), source, output, RerankSettings())
    before = output.read_bytes()
    with pytest.raises(
        UsageError,
        match=r"was made with different settings \(settings\.reward\.weight was 0\.5 and is 1\.0\); pass --overwrite",
    ):
        rerank_file(never, source, output, other)
    assert rerank_file(never, source, output, RerankSettings()) == 1
    assert "is complete; nothing to do" in capsys.readouterr().err
    assert output.read_bytes() == before
    write_lines(source, {"prompt": PROMPT, "candidates": ["Paris", "Nice"]})
    with pytest.raises(UsageError, match="was made from another input; pass --overwrite"):
        rerank_file(never, source, output, RerankSettings())
    write_lines(source, {"prompt": PROMPT, "candidates": ["Paris", "Rome"]}, {"prompt": PROMPT, "candidates": ["Paris"]})
    with pytest.raises(UsageError, match="was made from another input; pass --overwrite"):
        rerank_file(never, source, output, RerankSettings())
    assert output.read_bytes() == before
    rerank_file(lambda: engines_of(models), source, output, other, overwrite=True)
    assert len(read_lines(output)) == 2
    (output.parent / "out.jsonl.spent.json").unlink()
    with pytest.raises(UsageError, match=r"no out\.jsonl\.spent\.json records how it was made; pass --overwrite"):
        rerank_file(never, source, output, other)


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("score", "NaN", None),
        ("score", '{"mean": [1, -Infinity], "n": 2}', {"mean": [1, None], "n": 2}),
        ("grüße", "1e999", None),
        ("candidates", '[{"text": "y", "p": NaN}]', [{"text": "y", "p": None}]),
    ],
)
def test_a_number_that_json_lacks_becomes_null_in_an_unused_field(
    name: str, value: str, written: Any, models: tuple[ForwardLM, ReverseLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"prompt": '"x y"', "candidates": '["y"]', name: value}
    source = write_lines(tmp_path / "in.jsonl", "{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}")
    output = tmp_path / "out.jsonl"
    rerank_file(lambda: engines_of(models), source, output, RerankSettings())
    assert read_lines(output)[0][name] == written
    assert f"{source}:1: the field {name!a} contains NaN or Infinity" in caplog.text
    assert rerank_file(never, source, output, RerankSettings()) == 1  # and it counts as the same input


def test_an_integer_of_any_length_in_an_unused_field_is_written_as_it_was(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    """Python's own limit is 4,300 digits."""
    digits = "7" * 5000
    line = '{"prompt": "x y", "candidates": ["y"], "id": ' + digits + ', "more": [-' + digits + ", NaN]}"
    source, output = write_lines(tmp_path / "in.jsonl", line), tmp_path / "out.jsonl"
    limit = sys.get_int_max_str_digits()
    rerank_file(lambda: engines_of(models), source, output, RerankSettings())
    assert f'"id": {digits}, "more": [-{digits}, null]'.encode() in output.read_bytes()
    assert rerank_file(never, source, output, RerankSettings()) == 1
    assert len(read_reranked(output)) == 1
    assert sys.get_int_max_str_digits() == limit


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ('"id": ' + "[" * 500 + "NaN" + "]" * 500, "the field 'id' is nested too deep"),
        ('"id": ' + '{"a": ' * 500 + "NaN" + "}" * 500, "the field 'id' is nested too deep"),
        ('"id": ' + "1" * 100_001, "not a line of JSON in UTF-8 .*100000 digits"),
        ('"candidates": [{"text": "y", "forward_logprob": 1%s}]' % ("0" * 5000), "forward_logprob=10+ is not the logarithm"),
        (
            '"candidates": [{"text": "y", "forward_logprob": -1, "forward_tokens": 1%s}]' % ("0" * 5000),
            "forward_tokens=10+ is not a number",
        ),
    ],
)
def test_a_number_that_cannot_be_kept_is_refused_with_its_line_before_a_model_is_loaded(
    field: str, words: str, tmp_path: Path
) -> None:
    candidates = "" if "candidates" in field else '"candidates": ["y"], '
    source = write_lines(tmp_path / "in.jsonl", '{"prompt": "x", ' + candidates + field + "}")
    with pytest.raises(DataError, match=rf"in\.jsonl:1: .*{words}"):
        rerank_file(never, source, tmp_path / "out.jsonl", RerankSettings())


def test_a_killed_ranking_of_a_field_that_is_nan_resumes(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    sound = '{"prompt": "x y", "candidates": ["y"], "score": NaN}'
    source, output = (
        write_lines(tmp_path / "in.jsonl", sound, {"prompt": "x", "candidates": ["y" * 4000]}),
        tmp_path / "out.jsonl",
    )
    settings = RerankSettings(window_candidates=1)
    with pytest.raises(DataError, match=r"in\.jsonl:2"):
        rerank_file(lambda: engines_of(models), source, output, settings)
    write_lines(source, sound, {"prompt": "x", "candidates": ["y"]})
    assert rerank_file(lambda: engines_of(models), source, output, settings) == 2
    assert [line.get("score", "none") for line in read_lines(output)] == [None, "none"]


def test_a_duplicate_key_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", '{"prompt": "x", "candidates": ["y"], "prompt": "z"}')
    with pytest.raises(DataError, match=r"in\.jsonl:1: .*the key 'prompt' is twice"):
        rerank_file(never, source, tmp_path / "out.jsonl", RerankSettings())


def test_brackets_without_end_are_named(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl", '{"prompt": "x", "candidates": ["y"], "d": ' + "[" * 100_000 + "]" * 100_000 + "}"
    )
    with pytest.raises(DataError, match=r"in\.jsonl:1: not a line of JSON"):
        rerank_file(never, source, tmp_path / "out.jsonl", RerankSettings())


def test_half_of_a_surrogate_pair_in_another_field_is_kept(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    records = [{"prompt": "x é", "candidates": ["y"], "note": "\ud83d", "\udc80": 1}, {"prompt": "u", "candidates": ["v"]}]
    source, output = write_lines(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl"
    rerank_file(lambda: engines_of(models), source, output, RerankSettings())
    for line, record in zip(read_lines(output), records, strict=True):
        assert {key: line[key] for key in record} == record
    assert rerank_file(never, source, output, RerankSettings()) == 2  # and it counts as the same input


def test_a_report_without_a_field_is_named_and_does_not_count_as_a_complete_run(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]}), tmp_path / "out.jsonl"
    rerank_file(lambda: engines_of(models), source, output, RerankSettings())
    report = tmp_path / "out.jsonl.spent.json"
    whole = json.loads(report.read_text())
    for name in (*SUMS, *RANKED.counts):
        for broken in ({**whole, name: None}, {key: value for key, value in whole.items() if key != name}, [], {"made_by": 1}):
            report.write_text(json.dumps(broken))
            with pytest.raises(UsageError, match=r"spent\.json is damaged .*pass --overwrite"):
                rerank_file(never, source, output, RerankSettings())


def no_model() -> tuple[TransformersEngine, TransformersEngine]:
    raise UsageError("no model")


def test_unfinished_work_of_other_settings_is_replaced_with_overwrite_alone(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = {"prompt": "x", "candidates": ["y"]}, {"prompt": "x", "candidates": ["broken"]}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    other = RerankSettings(window_candidates=1, reward=RewardSettings(weight=1.0))

    class Failing(TransformersEngine):
        """Raises an error for one answer."""

        def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
            if any("broken" in following for _, following in pairs):
                raise DataError("broken weights")
            return super().score(pairs, include_end=include_end)

    def begin() -> None:
        write_lines(source, good, bad)
        with pytest.raises(DataError, match=r"in\.jsonl:2: broken"):
            rerank_file(
                lambda: (TransformersEngine(models[0]), Failing(models[1])), source, output, RerankSettings(window_candidates=1)
            )
        write_lines(source, good, good)

    begin()
    with pytest.raises(
        MismatchError,
        match=r"was made with different settings \(settings\.reward\.weight was 0\.5 and is 1\.0\); .* pass --overwrite",
    ) as caught:
        rerank_file(never, source, output, other)
    assert "notes" not in str(caught.value)
    with pytest.raises(UsageError, match="no model"):
        rerank_file(no_model, source, output, other, overwrite=True)
    assert len(read_lines(tmp_path / "out.jsonl.part")) == 1  # a run that fails at its start removes nothing
    assert rerank_file(lambda: engines_of(models), source, output, other, overwrite=True) == 2
    rerank_file(lambda: engines_of(models), source, tmp_path / "plain.jsonl", other)
    assert output.read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert "was made with different settings" in capsys.readouterr().err
    output.unlink()
    begin()
    write_lines(source, {**good, "prompt": "z"}, good)
    with pytest.raises(MismatchError, match=r"another input than .*pass --overwrite"):
        rerank_file(never, source, output, RerankSettings(window_candidates=1))
    assert rerank_file(lambda: engines_of(models), source, output, RerankSettings(window_candidates=1), overwrite=True) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


@pytest.mark.parametrize("given", [-1e29, -9999.0, -10012.5])
def test_a_given_log_probability_with_a_placeholder_is_refused(given: float, tmp_path: Path) -> None:
    candidates = [{"text": "two words", "forward_logprob": given, "forward_tokens": 2}]
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": candidates})
    with pytest.raises(DataError, match=r"in\.jsonl:1: candidate 0: forward_logprob=.* placeholder for minus infinity"):
        rerank_file(never, source, tmp_path / "out.jsonl", RerankSettings())


@pytest.mark.parametrize("notes", ["{}\n", "[]\n", '{"made_by"\n', '{"made_by": {}}\n{"seconds": 1}\n', '{"made_by": 3}\n'])
def test_damaged_notes_are_named(notes: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]})
    (tmp_path / "out.jsonl.part").write_text("")
    (tmp_path / "out.jsonl.part.notes").write_text(notes)
    with pytest.raises(DataError, match=r"out\.jsonl\.part\.notes is damaged"):
        rerank_file(never, source, tmp_path / "out.jsonl", RerankSettings())


def test_a_server_that_is_away_is_not_blamed_on_a_line(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    calls = []

    class Away(TransformersEngine):
        """Raises TransientError for every request."""

        def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
            calls.append(pairs)
            raise TransientError("the server did not answer")

    source = write_lines(tmp_path / "in.jsonl", *[{"prompt": PROMPT, "candidates": ["Paris"]}] * 5)
    with pytest.raises(TransientError, match=r"^the server did not answer$"):
        rerank_file(lambda: (Away(models[0]), TransformersEngine(models[1])), source, tmp_path / "out.jsonl", RerankSettings())
    assert len(calls) == 1


def test_a_reward_that_is_no_number_has_no_rank() -> None:
    with pytest.raises(DataError, match="reward of candidate 1 is not a number"):
        rank([-9.0, math.nan, -1.0])
    assert rank([-9.0, -math.inf, None, -1.0]) == [3, 0, 1, 2]


def test_an_impossible_answer_is_written_as_null_and_named(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    class Impossible(TransformersEngine):
        """Gives the prompt probability 0 after an answer with Rome."""

        def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
            scores = super().score(pairs, include_end=include_end)
            values = [[-math.inf, *score.token_logprobs[1:]] for score in scores]
            return [
                SpanScore(score.text_ids, row) if "Rome" in pair else score
                for score, row, pair in zip(scores, values, [p[1] for p in pairs], strict=True)
            ]

    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT, "candidates": ["Rome", "Paris", ""]})
    engines = (TransformersEngine(models[0]), Impossible(models[1]))
    rerank_file(lambda: engines, source, tmp_path / "out.jsonl", RerankSettings(token_values=True))
    (line,) = read_lines(tmp_path / "out.jsonl")
    impossible = line["scores"][0]
    assert (impossible["reverse_logprob"], impossible["reward"], impossible["reverse_token_logprobs"][0]) == (None, None, None)
    assert impossible["minus_infinity"] == ["reverse_logprob", "reward"]
    assert "minus_infinity" not in line["scores"][1]
    assert line["ranking"] == [1, 0, 2]  # after the possible one, before the one without a reward


def bytes_written() -> int:
    """Return the number of bytes that this process has passed to write calls."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of written bytes")
def test_bytes_written_grow_with_the_lines_and_not_with_their_square(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    written = []
    for num in (40, 320):
        records = [{"prompt": "x", "candidates": [{"text": "y", "forward_logprob": -1.0}]}] * num
        source = write_lines(tmp_path / f"{num}.jsonl", *records)
        before = bytes_written()
        rerank_file(lambda: engines_of(models), source, tmp_path / f"out{num}.jsonl", RerankSettings(window_candidates=1))
        written.append(bytes_written() - before)
    assert written[1] < 8.5 * written[0]
