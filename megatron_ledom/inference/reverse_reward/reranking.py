"""Rank the candidates of each line of a file: JSON lines in, the same with scores and a ranking out, resumed after a kill.

Lines are scored in windows, so that batches are full although a line has few candidates. Windows are cut by the input and the
settings alone: a run that was killed repeats its unfinished window from the same first line, and ends with the same bytes.

Texts that are too long for a model are found before anything is computed, then refused or skipped. A skipped candidate has the
reason under "skipped" in its scores, null for every value, and ranks last; the line counts them in "num_skipped", and "best" is
null where none is left.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.errors import DataError, LedomError, TransientError, UsageError
from megatron_ledom.inference.engines.engine import Engine, UsageMeter, empty_answer
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings, beam_search
from megatron_ledom.inference.reverse_reward.input_lines import Record, read_records
from megatron_ledom.inference.reverse_reward.rerank_part import UnfinishedOutput, Window
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    RewardSettings,
    candidate_problems,
    ranked_fields,
    score_questions,
)
from megatron_ledom.storage.files import real_path
from megatron_ledom.storage.locks import output_file_lock

REFUSE, SKIP = "refuse", "skip"
NUM_NAMED = 20
"""Skipped texts that are named on stderr; further ones are counted alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankSettings:
    """How each line is ranked. Without `sampling` the candidates are the line's own; `beam` needs `sampling` as well."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    sampling: Sampling | None = None
    beam: BeamSettings | None = None
    greedy: bool = False
    """The forward model also writes its likeliest answer, under "greedy": a baseline, not a candidate."""
    token_values: bool = False
    """Scores hold the ids and log-probabilities of single tokens, too."""
    window_candidates: int = 512
    """A window is closed by the line that brings it to this many candidates: what a kill can lose at most."""
    too_long: str = REFUSE
    """`refuse`: nothing is begun if the input has texts that are too long for a model, or answers might be. `skip`: they get no
    score. An answer that comes out too long although max_new_tokens has room gets none in any case."""

    def __post_init__(self) -> None:
        """Refuse a search without a way to sample, and an unknown way to deal with texts that are too long."""
        if self.too_long not in (REFUSE, SKIP):
            raise UsageError(f"too_long={self.too_long!r} is unknown; it can be {REFUSE} or {SKIP}")
        if (self.beam or self.greedy) and self.sampling is None:
            raise UsageError("a beam search and a greedy answer are written by the forward model: set how to sample as well")


def rerank_file(
    engines: Callable[[], tuple[Engine, Engine]],
    input_path: str | Path,
    output_path: str | Path,
    settings: RerankSettings,
    *,
    made_by: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Rank the candidates of each line, or write them first; returns the number of lines.

    engines: gives the forward and the reverse engine, once the whole input is known to be well formed. made_by: what else the
    output depends on, such as the models' folders and the batch size; a resumed run must say the same. overwrite: an output or
    unfinished work that was made otherwise may be replaced; one that is complete is left alone without it.

    What is finished is kept in `<output>.part` with `<output>.part.notes`, which holds the settings and what was spent; the
    same call goes on from there. At the end the output gets its name, and `<output>.spent.json` tells the cost. Where the
    output is a link, all of these lie beside the file behind it. Raises DataError
    with the line for a bad one, and MismatchError where the part was made from another input or otherwise.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    _check_paths(input_path, output_path)
    real_path(output_path)  # refuses a link that leads nowhere before models are loaded
    records = list(read_records(input_path, sampled=settings.sampling is not None))
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with output_file_lock(output_path):
        _rerank_into(Path(real_path(output_path)), engines, records, settings, made_by or {}, overwrite=overwrite)
    return len(records)


def _rerank_into(
    output_path: Path,
    engines: Callable[[], tuple[Engine, Engine]],
    records: list[Record],
    settings: RerankSettings,
    made_by: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Write the output window by window; resumes what is there. Nobody else writes it."""
    part = UnfinishedOutput(output_path, {"settings": asdict(settings), **made_by})
    if part.is_complete(records, overwrite=overwrite):
        print(f"{output_path} is complete; nothing to do", file=sys.stderr)
        return
    windows = list(_windows(records, settings))
    num_done = part.resume(windows, overwrite=overwrite)
    forward, reverse = engines()
    skips = SkipLog()
    windows = [*windows[:num_done], *with_problems(windows[num_done:], forward, reverse, settings, skips)]
    with tqdm(total=len(records), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(sum(map(len, windows[:num_done])))
        for window in windows[num_done:]:
            part.append(_rank_and_measure(forward, reverse, window, settings, skips))
            bar.update(len(window))
    part.finish()


def _check_paths(input_path: Path, output_path: Path) -> None:
    """Refuse, before any model is loaded, an input that is no file and an output that cannot be written."""
    if not input_path.is_file():
        raise UsageError(f"{input_path} is no file; pass JSON lines with a prompt each")
    for folder in output_path.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is no folder, so the output {output_path} cannot lie in it; name another place")
    if output_path.is_dir() or output_path.resolve() == input_path.resolve():
        raise UsageError(f"the output {output_path} is a folder or the input itself; name another file")


def _windows(records: list[Record], settings: RerankSettings) -> Iterator[list[Record]]:
    """Consecutive lines with at least `window_candidates` together; one line where each is a search of its own."""
    sampled = settings.sampling.num_return_sequences if settings.sampling else 0
    window: list[Record] = []
    num_candidates = 0
    for record in records:
        window.append(record)
        num_candidates += len(record.candidates or []) or sampled
        if settings.beam or num_candidates >= settings.window_candidates:
            yield window
            window, num_candidates = [], 0
    if window:
        yield window


class SkipLog:
    """Names skipped texts on stderr, the first ones of many."""

    def __init__(self) -> None:
        self._num = 0

    def add(self, where: str, problems: Sequence[str | None], item: str = "candidate") -> None:
        """Name those of a line's candidates, or its prompt, that have a problem."""
        for index, problem in enumerate(problems):
            if problem is None:
                continue
            self._num += 1
            name = f"{where}: {item} {index}" if len(problems) > 1 or item == "candidate" else f"{where}: {item}"
            if self._num <= NUM_NAMED:
                tqdm.write(f"skipped: {name}: {problem}", file=sys.stderr)
            elif self._num == NUM_NAMED + 1:
                tqdm.write('further skipped texts are counted only; the output has "skipped" where they are', file=sys.stderr)


def with_problems(
    windows: list[list[Record]], forward: Engine, reverse: Engine, settings: RerankSettings, skips: SkipLog
) -> list[list[Record]]:
    """Return the records, each with what of it is too long for a model; refuse or name these, as the settings say.

    DataError names the first of them with its line. A text that cannot be tokenised is refused in any case.
    """
    refused: list[str] = []
    found = []
    for window in windows:
        checked = [_checked(record, forward, reverse, settings) for record in window]
        for record in checked:
            if settings.too_long == SKIP or record.was_skipped:
                skips.add(record.where, record.problems)
                skips.add(record.where, [record.prompt_problem], "prompt")
                continue
            refused += [f"{record.where}: candidate {i}: {problem}" for i, problem in enumerate(record.problems) if problem]
            refused += [f"{record.where}: {record.prompt_problem}"] if record.prompt_problem else []
        found.append(checked)
    if refused:
        remedy = "shorten it" if settings.sampling is None else "shorten the prompt, lower --max-new-tokens"
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise DataError(f"{refused[0]}{more}; {remedy}, or pass --too-long skip")
    return found


def _checked(record: Record, forward: Engine, reverse: Engine, settings: RerankSettings) -> Record:
    try:
        if record.was_skipped:
            return record
        if record.candidates is not None:
            problems = candidate_problems(forward, reverse, record.prompt, record.candidates, settings.reward)
            return replace(record, problems=tuple(problems))
        return replace(record, prompt_problem=_prompt_problem(record.prompt, forward, reverse, settings))
    except LedomError as error:
        raise type(error)(f"{record.where}: {error}") from error


def _prompt_problem(prompt: str, forward: Engine, reverse: Engine, settings: RerankSettings) -> str | None:
    """Return why no answer can be written, or where such are refused, why one of `max_new_tokens` could not be scored."""
    if settings.sampling is None:
        return None
    num_new = settings.sampling.max_new_tokens
    if settings.too_long == SKIP:
        return forward.growth_problem(prompt, num_new)
    num_new += settings.reward.include_ends
    return forward.growth_problem(prompt, num_new) or reverse.growth_problem(prompt, num_new)


def _rank_and_measure(
    forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings, skips: SkipLog
) -> Window:
    """The window's output with what it cost; written answers that are skipped are named."""
    meter = UsageMeter(forward, reverse)
    lines = _rank_naming_lines(forward, reverse, window, settings)
    usage = meter.usage()
    if settings.sampling is not None:
        for record, line in zip(window, lines, strict=True):
            skips.add(record.where, [score.get("skipped") for score in line["scores"]])
    return Window(lines, usage)


def _rank_naming_lines(
    forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings
) -> list[dict[str, Any]]:
    """The window's output; an error names the line that causes it, which is found by trying each line alone."""
    try:
        return _rank_window(forward, reverse, window, settings)
    except TransientError:  # not caused by a line
        raise
    except LedomError as whole:
        for record in window:
            try:
                _rank_window(forward, reverse, [record], settings)
            except LedomError as error:
                raise type(error)(f"{record.where}: {error}") from error
        raise whole


def _rank_window(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """The output object of each line."""
    kept = [record for record in window if record.prompt_problem is None]
    made = iter(_score_answers(forward, reverse, kept, settings, _write_answers(forward, reverse, kept, settings)))
    return [next(made) if record.prompt_problem is None else _skipped_output(record) for record in window]


def _skipped_output(record: Record) -> dict[str, Any]:
    """The output of a prompt that leaves no room for an answer."""
    return {
        **record.own_fields(),
        "candidates": [],
        "scores": [],
        "ranking": [],
        "best": None,
        "skipped": record.prompt_problem,
    }


def _write_answers(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """The fields of each line, with what the forward model writes for it."""
    written = [record.own_fields() for record in window]
    if settings.sampling is None:
        return written
    starts = [empty_answer(record.prompt, settings.sampling, record.number) for record in window]
    if settings.greedy:
        likeliest = Sampling(max_new_tokens=settings.sampling.max_new_tokens)
        for fields, (answer,) in zip(written, forward.sample(starts, likeliest), strict=True):
            fields["greedy"] = answer.text
    if settings.beam is None:
        for fields, answers in zip(written, forward.sample(starts, settings.sampling), strict=True):
            fields["candidates"] = [answer.text for answer in answers]
        return written
    for fields, start in zip(written, starts, strict=True):
        found = beam_search(forward, reverse, start, settings.beam, settings.sampling, settings.reward)
        fields |= found.as_fields(token_values=settings.token_values)
    return written


def _score_answers(
    forward: Engine, reverse: Engine, records: list[Record], settings: RerankSettings, written: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The fields of each line with scores and ranking; those of a search have them already."""
    if settings.beam is not None:
        return written
    candidates = [
        record.candidates or [Candidate(text) for text in fields["candidates"]]
        for record, fields in zip(records, written, strict=True)
    ]
    problems = [
        record.problems or candidate_problems(forward, reverse, record.prompt, own, settings.reward, is_written=True)
        for record, own in zip(records, candidates, strict=True)
    ]
    questions = [(record.prompt, own) for record, own in zip(records, candidates, strict=True)]
    scored = score_questions(forward, reverse, questions, settings.reward, problems)
    return [
        {**fields, **ranked_fields(own, scores, token_values=settings.token_values)}
        for fields, own, scores in zip(written, candidates, scored, strict=True)
    ]
