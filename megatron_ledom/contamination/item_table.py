"""Items as arrays, which a search reads in place, also from a mapped file: a text becomes a `str` when somebody asks for it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]
QUESTION_AND_ANSWER = 2
"""Texts of an item before its other choices."""


class ItemTable(Sequence[EvaluationItem]):
    """Items in arrays. Text `firsts[k]` is the question of item k, then come its answer and its other choices.

    sets: names in order of their first item. arrays: `sets` [items], number of the set; `numbers` [items]; `firsts` [items + 1];
    `offsets` [texts + 1]: bytes before each text; `bytes`: the UTF-8 of all texts.
    """

    def __init__(self, sets: Sequence[str], arrays: Arrays) -> None:
        self.sets, self.arrays = list(sets), arrays
        self._firsts, self._offsets, self._bytes = arrays["firsts"], arrays["offsets"], arrays["bytes"]

    @classmethod
    def of(cls, items: Iterable[EvaluationItem]) -> "ItemTable":
        """Return the table of items. Raises DataError for a text that is not valid Unicode."""
        places: dict[str, int] = {}
        rows, firsts, texts = [], [0], list[bytes]()
        for item in items:
            rows.append((places.setdefault(item.set, len(places)), item.number))
            try:
                texts += [text.encode() for text in (item.question, item.answer, *item.choices)]
            except UnicodeEncodeError as error:
                raise DataError(
                    f"item {item.number} of {item.set} has half of a surrogate pair ({error.object[error.start]!r}), so it is not a"
                    " text; correct its line"
                ) from error
            firsts.append(len(texts))
        columns = np.array(rows, np.int64).reshape(-1, 2)
        arrays: Arrays = {
            "sets": columns[:, 0].astype(np.int32),
            "numbers": columns[:, 1].copy(),
            "firsts": np.array(firsts, np.int64),
            "offsets": np.cumsum([0, *map(len, texts)], dtype=np.int64),
            "bytes": np.frombuffer(b"".join(texts), np.uint8),
        }
        return cls(list(places), arrays)

    @property
    def set_of(self) -> npt.NDArray[np.int32]:
        """Number of the set of each item [items]."""
        return self.arrays["sets"]

    def text(self, number: int) -> str:
        """Return a text by its number."""
        return str(self._bytes[self._offsets[number] : self._offsets[number + 1]].tobytes(), "utf-8")

    def texts(self, numbers: Iterable[int]) -> list[str]:
        """Return texts by their numbers."""
        return [self.text(number) for number in numbers]

    def answer(self, item: int) -> str:
        """Return the answer of an item."""
        return self.text(int(self._firsts[item]) + 1)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of bytes of each text [texts]."""
        return np.diff(self._offsets).astype(np.int64)

    def items_of_texts(self) -> npt.NDArray[np.int32]:
        """Return the number of the item of each text [texts]."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self._firsts))

    def places_in_items(self) -> npt.NDArray[np.int64]:
        """Return the place of each text in its item [texts]: 0 for the question, 1 for the answer, 2 and more for other choices."""
        begins: npt.NDArray[np.int64] = np.repeat(self._firsts[:-1], np.diff(self._firsts))
        return np.arange(len(begins), dtype=np.int64) - begins

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @overload
    def __getitem__(self, number: int) -> EvaluationItem: ...
    @overload
    def __getitem__(self, number: slice) -> list[EvaluationItem]: ...
    def __getitem__(self, number: int | slice) -> EvaluationItem | list[EvaluationItem]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} items, and none has the number {number}")
        number %= len(self)
        question, answer, *choices = self.texts(range(int(self._firsts[number]), int(self._firsts[number + 1])))
        return EvaluationItem(
            set=self.sets[int(self.set_of[number])],
            number=int(self.arrays["numbers"][number]),
            question=question,
            answer=answer,
            choices=tuple(choices),
        )

    def __iter__(self) -> Iterator[EvaluationItem]:
        return (self[number] for number in range(len(self)))
