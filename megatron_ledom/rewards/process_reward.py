"""Rewards of the steps of an answer, as searches with a process reward model ask for them."""

from collections.abc import Sequence

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.engines.engine import StepDelimiter
from megatron_ledom.rewards.reward_function import ReverseRewardFunction


class ProcessReward:
    """Scores each output after each of its steps, as the `PRM` of search-and-learn does.

    function: its settings must not include eod (`include_ends`), because an output may be unfinished. delimiter: the end of a step; search-and-learn
    ends steps at an empty line. separator: the end of the prompt, between a question and an output.
    """

    def __init__(
        self, function: ReverseRewardFunction, *, delimiter: StepDelimiter | str = r"\n\n", separator: str = "\n"
    ) -> None:
        self.delimiter = StepDelimiter(delimiter) if isinstance(delimiter, str) else delimiter
        if self.delimiter.pattern is None:
            raise UsageError("outputs are texts, so token ids end no step; pass a StepDelimiter with a pattern")
        if function.settings.include_ends:
            raise UsageError("include_ends=True scores the end of an answer, but outputs may be unfinished; set it to False")
        self.function, self.separator = function, separator

    def score(self, questions: Sequence[str], outputs: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Return for each output of each question the reward of its text up to the end of each step; an empty output has one step.

        The last number of an output is the reward of the whole output. All numbers are logarithms of a probability: compare the
        last ones or the smallest ones, and do not multiply them.
        """
        if len(questions) != len(outputs):
            raise DataError(
                f"{len(questions)} questions and {len(outputs)} lists of outputs were given; pass one list for each question"
            )
        begun = [[self._begun(output) for output in row] for row in outputs]
        asked = [
            (question + self.separator, [text for texts in row for text in texts])
            for question, row in zip(questions, begun, strict=True)
        ]
        rewards = iter([reward for found in self.function.rewards(asked) for reward in found])
        return [[[next(rewards) for _ in texts] for texts in row] for row in begun]

    def _begun(self, output: str) -> list[str]:
        """Return the text of an output up to the end of each step."""
        if not isinstance(output, str):
            raise DataError(f"an output is a {type(output).__name__}, expected a text; pass a list of texts for each question")
        steps = self.delimiter.steps_of(output) or [""]
        return ["".join(steps[: end + 1]) for end in range(len(steps))]
