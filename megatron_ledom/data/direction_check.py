"""Which way the ids of a shard really stand: decoded in text order and encoded again, only the right order gives them back."""

from dataclasses import dataclass

import numpy as np

from megatron_ledom.data.shard import ShardReader
from megatron_ledom.data.tokenizer import Tokenizer
from megatron_ledom.direction import Direction, to_text_order

SAMPLE_DOCUMENTS = 64
LONGEST_IDS = 20_000  # longer documents are not looked at, so that the check takes seconds
CLEAR = 3
"""How many times as many documents must speak for one order as for the other."""
OTHER = {Direction.REVERSE: Direction.FORWARD, Direction.FORWARD: Direction.REVERSE}


@dataclass(frozen=True, slots=True)
class DirectionCheck:
    """Of a sample of documents, how many keep their ids in one order only; a document of whole words keeps them in both."""

    stated: Direction
    sampled: int
    only_as_stated: int
    only_as_other: int

    @property
    def is_wrong(self) -> bool:
        """The ids clearly stand in the other order."""
        return self.only_as_other > CLEAR * self.only_as_stated

    @property
    def is_right(self) -> bool:
        """The ids clearly stand in the stated order."""
        return self.only_as_stated > CLEAR * self.only_as_other

    def describe(self) -> str:
        """One sentence."""
        found = (
            f"of {self.sampled} documents decoded and encoded again, {self.only_as_stated} keep their ids only if the shard is"
            f" {self.stated}, {self.only_as_other} only if it is {OTHER[self.stated]}"
        )
        if self.is_wrong:
            return f"the manifest says {self.stated}, but the ids are {OTHER[self.stated]}: {found}"
        return f"{self.stated} is right: {found}" if self.is_right else f"cannot be told from the ids: {found}"


def check_direction(reader: ShardReader, tokenizer: Tokenizer) -> DirectionCheck:
    """Look at documents spread evenly over the shard. The index and the range of ids must be sound."""
    stated = reader.manifest.direction
    sampled = only_as_stated = only_as_other = 0
    for index in np.unique(np.linspace(0, len(reader) - 1, min(SAMPLE_DOCUMENTS, len(reader))).astype(np.int64)).tolist():
        stored = reader.document(index)[:-1]
        if len(stored) > LONGEST_IDS:
            continue
        sampled += 1
        as_stated = _comes_back(tokenizer, to_text_order(stored, stated).tolist())
        as_other = _comes_back(tokenizer, to_text_order(stored, OTHER[stated]).tolist())
        only_as_stated += as_stated and not as_other
        only_as_other += as_other and not as_stated
    return DirectionCheck(stated, sampled, only_as_stated, only_as_other)


def _comes_back(tokenizer: Tokenizer, text_ids: list[int]) -> bool:
    return bool(tokenizer.encode_batch([tokenizer.decode(text_ids)])[0].tolist() == text_ids)
