"""What engines outside of this process need here: the tokenizer, the direction and the stop ids of a model folder, no weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.inference.engine import Path as AnswerPath
from megatron_ledom.inference.engine import StepDelimiter
from megatron_ledom.inference.joint import JointTokenizer
from megatron_ledom.inference.language_model import load_tokenizer, read_model_config, span_tokens
from megatron_ledom.inference.scoring import Span


@dataclass(frozen=True, slots=True)
class RemoteText:
    """Turns texts into the ids that an engine is sent, and what it answers into scores and paths. Ids go in model order."""

    tokenizer: JointTokenizer
    direction: Direction
    stop_ids: list[int]
    leading_ids: list[int]

    @classmethod
    def from_pretrained(cls, folder: str | Path, direction: Direction) -> Self:
        """Of the folder that the engine serves; MismatchError where it records another direction."""
        folder = Path(folder)
        recorded = read_model_config(folder).get("direction")
        if recorded not in (None, str(direction)) or (recorded is None and direction is Direction.REVERSE):
            raise MismatchError(f"{folder}/config.json records the direction {recorded!r}, asked for was {str(direction)!r}")
        tokenizer, stop_ids = load_tokenizer(folder)
        return cls(tokenizer, direction, stop_ids, [] if recorded else tokenizer.leading_ids)

    def span(self, pair: tuple[str, str], include_end: bool) -> Span:
        """The ids of a (preceding, following) and how many of them are given."""
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self.leading_ids, self.stop_ids)
        return Span([*tokens, *(self.stop_ids[:1] if include_end else [])], num_given)

    def prompt_ids(self, path: AnswerPath) -> list[int]:
        """What a forward engine goes on from: the prompt and the answer so far, encoded as one text."""
        if self.direction is not Direction.FORWARD:
            raise UsageError("a reverse model writes what precedes a text, not answers; give the forward model to sample from")
        return [*self.leading_ids, *self.tokenizer.encode(path.prompt + path.text)]

    def grown(self, path: AnswerPath, written: str, num_tokens: int, delimiter: StepDelimiter | None) -> AnswerPath:
        """The path with what the engine wrote until eod or the token limit; with a delimiter, with one step of it.

        num_tokens: of `written`; of a step that was cut out of it, what the step encodes to. What lies beyond is given up.
        """
        end = delimiter.end_of_step(written) if delimiter else None
        finished = end is None or end == len(written)
        kept = written[:end]
        num_kept = num_tokens if finished else len(self.tokenizer.encode(kept))
        return replace(
            path, text=path.text + kept, num_tokens=path.num_tokens + num_kept, finished=finished, forward_logprob=None
        )


def seed_of(path: AnswerPath) -> int:
    """A seed of 31 bits for the path's own random numbers."""
    return int(path.draw(path.num_tokens) * 2**31)


def check_delimiter(delimiter: StepDelimiter) -> None:
    """Refuse token ids, which an engine that answers with text does not tell."""
    if delimiter.token_ids:
        raise UsageError("this engine answers with text, so a step ends at a pattern; give regex:PATTERN instead of ids")
