"""Pairs of different lengths side by side in packs of one length, none of them cut."""

from collections.abc import Iterator

from megatron_ledom.finetune.pairs import EncodedPair

MOST_OPEN = 64
"""Packs that are filled at the same time; with so many, the pairs of GSM8K leave 3 % of packs of 1,024 tokens empty."""

Pack = list[EncodedPair]


class Packer:
    """Puts each pair into the open pack that it fills best. What comes out depends on the order of the pairs alone."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._open: list[tuple[int, Pack]] = []
        """(room left, pairs), oldest first."""

    def add(self, pair: EncodedPair) -> Iterator[Pack]:
        """The pair, of at most `length` tokens; yields the packs that are full enough."""
        size = len(pair.tokens)
        fitting = [(room, number) for number, (room, _) in enumerate(self._open) if room >= size]
        if fitting:
            room, number = min(fitting)
            pack = self._open.pop(number)[1]
            pack.append(pair)
        else:
            room, pack = self.length, [pair]
        if room == size:
            yield pack
        else:
            self._open.append((room - size, pack))
        if len(self._open) > MOST_OPEN:
            _, number = min((room, number) for number, (room, _) in enumerate(self._open))
            yield self._open.pop(number)[1]

    def finish(self) -> Iterator[Pack]:
        """The packs that are still open."""
        yield from (pack for _, pack in self._open)
        self._open = []
