"""Rank the candidates of each line of a JSON Lines file; write the lines with scores and ranking; resume after a kill.

Lines are scored in windows, so that batches are full even if a line has few candidates. Only the input and the settings decide
the windows. So a killed run repeats its unfinished window from the same first line, and ends with the same bytes.

Texts that are too long for a model are found before anything is computed, then refused or skipped. A skipped candidate has the
reason in "skipped" of its scores, null for every value, and ranks last. The line counts skipped candidates in "num_skipped";
"best" is null if all were skipped.
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
"""Number of skipped texts that are named on stderr; further ones are only counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankSettings:
    """Settings of a reranking. Without `sampling` the candidates are those of the line; `beam` also needs `sampling`."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    sampling: Sampling | None = None
    beam: BeamSettings | None = None
    greedy: bool = False
    """The forward model also writes its likeliest answer, as "greedy": a baseline, not a candidate."""
    token_values: bool = False
    """Scores also contain the ids and log-probabilities of single tokens."""
    window_candidates: int = 512
    """A window ends with the line that brings it to this number of candidates; a kill loses at most one window."""
    too_long: str = REFUSE
    """Texts that are too long for a model. `refuse`: raise DataError at the start if the input has such texts, or if answers of
    max_new_tokens would be too long. `skip`: they get no score. A written answer that is too long when it is scored never gets one."""

    def __post_init__(self) -> None:
        """Raise UsageError for a search without sampling settings and for an unknown `too_long`."""
        if self.too_long not in (REFUSE, SKIP):
            raise UsageError(f"too_long={self.too_long!r} is unknown; it can be {REFUSE} or {SKIP}")
        if (self.beam or self.greedy) and self.sampling is None:
            raise UsageError("the forward model writes beams and greedy answers; also set `sampling`")


def rerank_file(
    engines: Callable[[], tuple[Engine, Engine]],
    input_path: str | Path,
    output_path: str | Path,
    settings: RerankSettings,
    *,
    made_by: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Rank the candidates of each line, or first write them; return the number of lines.

    engines: returns the forward and the reverse engine; called after the whole input is checked. made_by: everything else that
    the output depends on, such as model folders and batch size; a resumed run must have the same. overwrite: replace an output or
    unfinished work from another input or other settings; without it they raise an error.

    Finished windows are in `<output>.part`, the settings and the token usage in `<output>.part.notes`; the same call resumes from
    them. At the end the output gets its name, and `<output>.spent.json` records the usage. If the output is a link, all of these
    files are next to its target. Raises DataError with the line for a bad line, and MismatchError if the unfinished work is from
    another input or other settings.
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
    """Write the output window by window, after those of an earlier run. The caller holds the lock of the output."""
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
    """Raise UsageError, before any model is loaded, for an input that is not a file or an output that cannot be written."""
    if not input_path.is_file():
        raise UsageError(f"{input_path} is not a file; pass JSON lines with a prompt each")
    for folder in output_path.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder, so the output {output_path} cannot be in it; name another path")
    if output_path.is_dir() or output_path.resolve() == input_path.resolve():
        raise UsageError(f"the output {output_path} is a folder or the input itself; name another file")


def _windows(records: list[Record], settings: RerankSettings) -> Iterator[list[Record]]:
    """Yield windows: consecutive lines with at least `window_candidates` together, or single lines for a beam search."""
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
    """Names the first skipped texts on stderr."""

    def __init__(self) -> None:
        self._num = 0

    def add(self, where: str, problems: Sequence[str | None], item: str = "candidate") -> None:
        """Print the candidates of a line, or its prompt, that have a problem."""
        for index, problem in enumerate(problems):
            if problem is None:
                continue
            self._num += 1
            name = f"{where}: {item} {index}" if len(problems) > 1 or item == "candidate" else f"{where}: {item}"
            if self._num <= NUM_NAMED:
                tqdm.write(f"skipped: {name}: {problem}", file=sys.stderr)
            elif self._num == NUM_NAMED + 1:
                tqdm.write('further skipped texts are only counted; the output marks each with "skipped"', file=sys.stderr)


def with_problems(
    windows: list[list[Record]], forward: Engine, reverse: Engine, settings: RerankSettings, skips: SkipLog
) -> list[list[Record]]:
    """Return the records with the problems of texts that are too long for a model; refuse or skip these, as set by `too_long`.

    DataError names the first such text with its line. A text that cannot be tokenized always raises DataError.
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
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
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
    """Return the reason if no answer can be written or, with `too_long` refuse, if one of `max_new_tokens` could not be scored."""
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
    """Return the output of a window with its token usage; name the written answers that are skipped."""
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
    """Return the output of a window; after an error, find the line that causes it by ranking each line alone, and name it."""
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
    """Return the output object of each line."""
    kept = [record for record in window if record.prompt_problem is None]
    made = iter(_score_answers(forward, reverse, kept, settings, _write_answers(forward, reverse, kept, settings)))
    return [next(made) if record.prompt_problem is None else _skipped_output(record) for record in window]


def _skipped_output(record: Record) -> dict[str, Any]:
    """Return the output of a prompt that leaves no room for an answer."""
    return {
        **record.own_fields(),
        "candidates": [],
        "scores": [],
        "ranking": [],
        "best": None,
        "skipped": record.prompt_problem,
    }


def _write_answers(forward: Engine, reverse: Engine, window: list[Record], settings: RerankSettings) -> list[dict[str, Any]]:
    """Return the fields of each line, with the answers that the forward model writes for it."""
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
    """Return the fields of each line with scores and ranking; those of a beam search have them already."""
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
