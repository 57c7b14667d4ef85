"""Rank the candidates of each line of a JSON Lines file; write the lines with scores and ranking; resume after a kill.

Lines are scored in windows, so that batches are full even if a line has few candidates (see `line_output`).

Texts that are too long for a model are found before anything is computed, then refused or skipped. A skipped candidate has the
reason in "skipped" of its scores, null for every value, and ranks last. The line counts skipped candidates in "num_skipped";
"best" is null if all were skipped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.inference.engines.engine import Engine, UsageMeter, empty_answer
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.line_output import LineKind, SkipLog, Window, naming_lines, write_line_file
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings, beam_search
from megatron_ledom.inference.reverse_reward.input_lines import RANKED, Record, read_records
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    RewardSettings,
    candidate_problems,
    ranked_fields,
    score_questions,
)

REFUSE, SKIP = "refuse", "skip"


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

    See `line_output.write_line_file` for the files and the resume. Raises DataError with the line for a bad line.
    """
    job = _Reranking(engines, settings)
    return write_line_file(job, input_path, output_path, {"settings": asdict(settings), **(made_by or {})}, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class _Reranking:
    """The work of `rerank_file`, a LineJob."""

    engines: Callable[[], tuple[Engine, Engine]]
    settings: RerankSettings
    kind: LineKind = RANKED

    def read(self, path: Path) -> list[Record]:
        """Return the checked lines."""
        return list(read_records(path, sampled=self.settings.sampling is not None))

    def windows(self, lines: list[Record]) -> list[list[Record]]:
        """Return the lines in windows."""
        return list(_windows(lines, self.settings))

    def compute(self, windows: list[list[Record]]) -> Iterator[Window]:
        """Load the models, refuse or skip texts that are too long, and yield the output of each window."""
        forward, reverse = self.engines()
        skips = SkipLog()
        for window in with_problems(windows, forward, reverse, self.settings, skips):
            yield _rank_and_measure(forward, reverse, window, self.settings, skips)


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


def _name_skipped(skips: SkipLog, where: str, problems: Sequence[str | None]) -> None:
    """Print the candidates of a line that have a problem."""
    for index, problem in enumerate(problems):
        skips.add(f"{where}: candidate {index}", problem)


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
                _name_skipped(skips, record.where, record.problems)
                skips.add(f"{record.where}: prompt", record.prompt_problem)
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
    lines = naming_lines(window, lambda part: _rank_window(forward, reverse, part, settings))
    usage = meter.usage()
    if settings.sampling is not None:
        for record, line in zip(window, lines, strict=True):
            _name_skipped(skips, record.where, [score.get("skipped") for score in line["scores"]])
    return Window(lines, usage, _counts(lines))


def _counts(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return the counts of RANKED."""
    return {
        "num_lines": len(lines),
        "num_candidates": sum(len(line["scores"]) for line in lines),
        "num_skipped": sum(line.get("num_skipped", 0) for line in lines),
        "num_skipped_prompts": sum("skipped" in line for line in lines),
    }


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
