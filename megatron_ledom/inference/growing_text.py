"""The pieces of a text that grows: what was shown once never changes, and each piece stands before (reverse) or after the shown text."""

from collections.abc import Sequence

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError


class GrowingText:
    """Cuts the text of a row, as it grows, into pieces that are safe to show.

    An edge that later tokens may remove is held back: the beginning of a stop string (its end, for a reverse model), and the space
    at the beginning that may be the dummy prefix of a whole text. Incomplete characters are not in the text so far.
    """

    def __init__(self, direction: Direction, stop_strings: Sequence[str], *, may_begin_with_prefix: bool) -> None:
        self._reverse = direction is Direction.REVERSE
        self._stops = list(stop_strings)
        self._may_begin_with_prefix = may_begin_with_prefix and self._reverse
        self.shown = ""

    def grow(self, written: str) -> str:
        """Return the next piece of the text that was written so far; an empty text if there is none to show."""
        return self._piece(self._safe(written))

    def finish(self, written: str) -> str:
        """Return the last piece of the whole text."""
        return self._piece(written)

    def _piece(self, text: str) -> str:
        if len(text) <= len(self.shown):
            return ""
        known = text.endswith(self.shown) if self._reverse else text.startswith(self.shown)
        if not known:
            raise DataError("the tokenizer changes text that was already written, so it cannot be streamed; request it whole")
        num_new = len(text) - len(self.shown)
        self.shown = text
        return text[:num_new] if self._reverse else text[-num_new:]

    def _safe(self, written: str) -> str:
        held = max((self._overlap(written, stop) for stop in self._stops), default=0)
        if self._may_begin_with_prefix and written.startswith(" "):
            held = max(held, 1)
        return written[held:] if self._reverse else written[: len(written) - held]

    def _overlap(self, written: str, stop: str) -> int:
        """Return the number of characters at the growing edge that may be a part of the stop string."""
        for length in range(min(len(stop) - 1, len(written)), 0, -1):
            if written.startswith(stop[-length:]) if self._reverse else written.endswith(stop[:length]):
                return length
        return 0
