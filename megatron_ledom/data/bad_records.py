"""Records that cannot be used: why, as a name in the counts and as a sentence."""


class BadRecordError(Exception):
    """One record that cannot be used; `reason` is its name in the counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def too_large(size: int, limit: int) -> BadRecordError:
    """Return the error of a record above the limit of bytes."""
    message = f"a record of {size:,} bytes, more than the limit of {limit:,} (--max-record-bytes)"
    return BadRecordError("too_large", message)
