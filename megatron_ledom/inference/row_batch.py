"""One call of the stock `generate` for rows with settings of their own. All ways to write a batch of texts use it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_choice import RowChoice, RowSettings
from megatron_ledom.inference.scoring import naming_text, no_room

IsDone = Callable[[RowChoice, int], bool]
"""Returns True if a row is done after its newest token."""


def must_divide(model: LanguageModel, prompts: Sequence[Sequence[int]], rows: Sequence[RowSettings]) -> bool:
    """Return True if a batch exceeds the positions of the model, although each of its rows may fit.

    The longest row and the row with most to write may differ.
    """
    most = max(row.limit for row in rows)
    return len(rows) > 1 and no_room(_num_given(prompts, rows), most, model.num_positions, model.direction) is not None


def write_batch(
    model: LanguageModel,
    prompts: list[list[int]],
    rows: Sequence[RowSettings],
    cache: DynamicCache | None,
    is_done: IsDone,
) -> tuple[RowChoice, Any]:
    """Continue prompts (ids in model order) until each row is done; return what was chosen, and the keys and values.

    cache: the keys and values of all tokens but the last of each prompt; None if the model has to read them.
    Raises UsageError if a row has no room.
    """
    writer, most = model.writer, max(row.limit for row in rows)
    writer.check_length(_num_given(prompts, rows), most)
    choice = RowChoice(writer, rows, max(map(len, prompts)))
    with naming_text(model.tokenizer, model.direction):
        output = model.model.generate(
            **writer.padded(prompts),
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=most + _num_trimmed(rows),  # a token spells at least one byte
                eos_token_id=model.stop_ids,
                pad_token_id=model.stop_ids[0],
                do_sample=False,
                use_cache=True,
                return_dict_in_generate=True,
            ),
            logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList([_DoneRows(choice, is_done)]),
        )
    return choice, output.past_key_values


def _num_trimmed(rows: Sequence[RowSettings]) -> int:
    return max(len(row.trimmed) for row in rows)


def _num_given(prompts: Sequence[Sequence[int]], rows: Sequence[RowSettings]) -> int:
    return max(map(len, prompts)) + _num_trimmed(rows)


class _DoneRows(StoppingCriteria):  # type: ignore[misc]
    """Ends each row when it is done, and the call when all are."""

    def __init__(self, choice: RowChoice, is_done: IsDone) -> None:
        self._choice, self._is_done = choice, is_done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return [B] booleans, True for each row that is done."""
        done = self._choice.is_done
        for row, was_done in enumerate(done):
            done[row] = was_done or self._is_done(self._choice, row)
        return torch.tensor(done, device=input_ids.device)
