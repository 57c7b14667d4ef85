"""The lines of a reranked file, with each field checked. Errors name the line and the field."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.json_fields import long_integers
from megatron_ledom.inference.reverse_reward.reward import CandidateScore
from megatron_ledom.storage.hashes import sha256_of

ADVICE = "give an output of ledom rerank"
LOGPROBS = ("forward_logprob", "reverse_logprob", "reward", "language_model_logprob")
COUNTS = ("forward_tokens", "reverse_tokens")
MAY_BE_NULL = ("reverse_logprob", "reward", "language_model_logprob", "forward_tokens")
"""Fields that may be null. In a candidate with `skipped` (the reason), all values are null."""
MOST_TOKENS = 2**53
"""Limit of a number of tokens: a float represents every smaller integer exactly."""


@dataclass(frozen=True, slots=True)
class Reranked:
    """One line of a ranked file.

    where: its file and number. greedy: None if the line has no such field. skipped: the reason why the prompt has no candidates;
    None if it has some.
    """

    where: str
    prompt: str
    gold: str
    texts: list[str]
    scores: list[CandidateScore]
    greedy: str | None
    skipped: str | None = None


def read_reranked(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a reranked file, one for each line; see `reranked_lines`."""
    return [record for _, record in reranked_lines(path)]


def reranked_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line of a reranked file. Raises DataError with the line.

    Only a newline byte ends a line; texts may contain U+2028, U+2029 and U+0085.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                with long_integers():
                    record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not a line of JSON in UTF-8 ({error}); repair or remove the line") from error
            if not isinstance(record, dict) or "scores" not in record:
                raise DataError(f"{path}:{number}: has no scores; {ADVICE}")
            yield f"{path}:{number}", record


def checked(record: dict[str, Any], where: str, gold_key: str) -> Reranked:
    """Return the checked texts, scores and right answer of a line. Raises DataError with the field and the expected value."""
    skipped = skipped_prompt(record)
    texts = candidate_texts(record, where) if skipped is None else []
    scores = _field(record, where, "scores", list, "a list with the scores of each candidate")
    if len(scores) != len(texts):
        raise DataError(f"{where}: scores has {len(scores)} entries for {len(texts)} candidates; {ADVICE}")
    greedy = _field(record, where, "greedy", str, "a text; remove the field if there is none") if "greedy" in record else None
    return Reranked(
        where=where,
        prompt=_field(record, where, "prompt", str, "a text"),
        gold=_gold(record, where, gold_key),
        texts=texts,
        scores=[_score(score, f"{where}: scores[{index}]") for index, score in enumerate(scores)],
        greedy=greedy,
        skipped=skipped,
    )


def skipped_prompt(record: dict[str, Any]) -> str | None:
    """Return the reason if a reranking wrote no candidates for the line's prompt; None for every other line."""
    reason = record.get("skipped")
    return reason if isinstance(reason, str) and record.get("candidates") == [] else None


def chosen_text(record: dict[str, Any], where: str) -> str:
    """Return the line's best answer; an empty one, which is never right, if the prompt or all its candidates were skipped."""
    best = record.get("best")
    if isinstance(best, str):
        return best
    scores = record["scores"] if isinstance(record.get("scores"), list) else []
    any_skipped = any(isinstance(score, dict) and isinstance(score.get("skipped"), str) for score in scores)
    if "best" in record and best is None and (any_skipped or skipped_prompt(record) is not None):
        return ""
    raise DataError(f"{where}: best is not a text; give an output of ledom rerank --beam")


def candidate_texts(record: dict[str, Any], where: str) -> list[str]:
    """Return the texts of a line's candidates. Raises DataError if there are none."""
    candidates = _field(record, where, "candidates", list, "a list of texts")
    if not candidates:
        if (reason := skipped_prompt(record)) is not None:
            raise DataError(f"{where}: the prompt was skipped and has no candidates ({reason}); name another line")
        raise DataError(f"{where}: candidates is empty; remove the line, or sample answers for it")
    texts = []
    for index, candidate in enumerate(candidates):
        text = candidate.get("text") if isinstance(candidate, dict) else candidate
        if not isinstance(text, str):
            raise DataError(f"{where}: candidates[{index}] is {_shown(candidate)}, expected a text; {ADVICE}")
        texts.append(text)
    return texts


def ranked_candidates(record: dict[str, Any], where: str) -> tuple[list[str], list[float | None], list[str | None]]:
    """Return the texts, the rewards and the reasons of skipped candidates of a line. Raises DataError for an invalid field."""
    texts = candidate_texts(record, where)
    _field(record, where, "prompt", str, "a text")
    scores = _field(record, where, "scores", list, "a list with the scores of each candidate")
    ranking = _field(record, where, "ranking", list, "the order of the candidates")
    is_order = all(type(place) is int for place in ranking) and sorted(ranking) == list(range(len(texts)))
    if len(scores) != len(texts) or not is_order:
        raise DataError(
            f"{where}: {len(texts)} candidates have {len(scores)} scores and the ranking {_shown(ranking)}; {ADVICE}"
        )
    places = [f"{where}: scores[{index}]" for index in range(len(scores))]
    entries = [_object(score, place) for score, place in zip(scores, places, strict=True)]
    rewards = [_logprob(entry, place, "reward") for entry, place in zip(entries, places, strict=True)]
    return texts, rewards, [_skipped(entry, place) for entry, place in zip(entries, places, strict=True)]


def check_distinct(runs: Sequence[str | Path]) -> None:
    """Raise UsageError for a file that is given twice, because it would count as two sampling seeds that agree."""
    known: dict[str, str | Path] = {}
    for path in runs:
        digest = sha256_of(path)
        if digest in known:
            raise UsageError(f"{path} is identical to {known[digest]}; name the file of each sampling seed once")
        known[digest] = path


def check_same_questions(runs: Sequence[str | Path], questions: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Raise DataError for files whose prompts or right answers differ from those of the first file, or are in another order."""
    for path, found in zip(runs, questions, strict=True):
        if [prompt for prompt, _ in found] != [prompt for prompt, _ in questions[0]]:
            raise DataError(
                f"{path} has other prompts than {runs[0]}; give files of the same input, one for each sampling seed"
            )
        if found != questions[0]:
            number = next(n for n, (one, other) in enumerate(zip(found, questions[0], strict=True), 1) if one != other)
            raise DataError(f"{path}:{number}: has another right answer than {runs[0]}; give files of the same input")


def _field(record: dict[str, Any], where: str, name: str, kind: type, expected: str) -> Any:
    if name not in record:
        raise DataError(f"{where}: has no field {name!r}, expected {expected}; {ADVICE}")
    if not isinstance(record[name], kind):
        raise DataError(f"{where}: {name} is {_shown(record[name])}, expected {expected}")
    return record[name]


def _gold(record: dict[str, Any], where: str, key: str) -> str:
    """Return the right answer as a text. Raises DataError for a list or an object."""
    if key not in record:
        raise DataError(f"{where}: has no field {key!r} with the right answer; name the right field with --gold-key")
    gold = record[key]
    if not (isinstance(gold, str) or _is_number(gold)):
        raise DataError(f"{where}: {key} is {_shown(gold)}, expected one right answer, a text or a number")
    return str(gold)


def _score(score: Any, where: str) -> CandidateScore:
    score = _object(score, where)
    values: dict[str, Any] = {name: _logprob(score, where, name) for name in LOGPROBS}
    for name in COUNTS:
        number = _known(score, where, name)
        if number is not None and (type(number) is not int or not 0 <= number < MOST_TOKENS):
            raise DataError(f"{where}.{name} is {_shown(number)}, expected a number of tokens; {ADVICE}")
        values[name] = number
    return CandidateScore(**values, skipped=_skipped(score, where))


def _skipped(score: dict[str, Any], where: str) -> str | None:
    """Return the reason if a candidate was skipped, else None. Raises DataError if a skipped candidate has values."""
    reason = score.get("skipped")
    if reason is not None and not isinstance(reason, str):
        raise DataError(f"{where}.skipped is {_shown(reason)}, expected the reason as a text; {ADVICE}")
    given = [name for name in (*LOGPROBS, *COUNTS) if score.get(name) is not None] if reason is not None else []
    if given:
        raise DataError(f"{where}.{given[0]} is {_shown(score[given[0]])} in a skipped candidate, expected null; {ADVICE}")
    return reason


def _is_number(value: Any) -> bool:
    """Return True for a finite number that a float can represent."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_shown(value)}, expected an object; {ADVICE}")
    return value


def _logprob(score: dict[str, Any], where: str, name: str) -> float | None:
    """Return a value of a candidate; -inf (null, listed in `minus_infinity`) is allowed, NaN and inf raise DataError."""
    infinite = score.get("minus_infinity", [])
    if not isinstance(infinite, list) or not all(isinstance(one, str) for one in infinite):
        raise DataError(f"{where}.minus_infinity is {_shown(infinite)}, expected a list of names of values; {ADVICE}")
    if name in infinite:
        if score.get(name) not in (None, -math.inf):
            raise DataError(f"{where}.{name} is {_shown(score[name])}, and minus_infinity names it, expected null; {ADVICE}")
        return -math.inf
    value = _known(score, where, name)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise DataError(f"{where}.{name} is {_shown(value)}, expected a number; {ADVICE}")
    if value is not None and not value <= 1.7e308:  # an int may be too large for a float
        shown = _shown(value) if isinstance(value, int) else value
        raise DataError(f"{where}.{name} is {shown}, which cannot be compared; check the model's weights, then score again")
    return None if value is None else -math.inf if value < -1e308 else float(value)


def _known(score: dict[str, Any], where: str, name: str) -> Any:
    if name not in score and name != "language_model_logprob":
        raise DataError(f"{where} has no field {name!r}; {ADVICE}")
    value = score.get(name)
    if value is None and name not in MAY_BE_NULL and not isinstance(score.get("skipped"), str):
        raise DataError(f"{where}.{name} is null, expected a number; {ADVICE}")
    return value


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=True):.60}"
