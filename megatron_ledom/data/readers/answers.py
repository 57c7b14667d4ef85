"""Check the answers of web servers to requests for byte ranges: the clients take any answer with a good status for the range."""

import re
from collections.abc import Mapping

from megatron_ledom.data.readers.remote import BrokenOffError, UnusableAnswerError

CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
MUST_REPEAT = ("ETag", "Content-MD5")
"""Headers that an answer must have if the listing had them. A date may be missing in a range."""
Headers = Mapping[str, str]


def check_range(status: int, headers: Headers, start: int, end: int, size: int) -> None:
    """Raise UnusableAnswerError if an answer is not bytes [start, end) of a file of `size` bytes."""
    found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    is_range = status == 206 and found is not None and int(found[1]) == start and found[3] in ("*", str(size))
    is_whole = status == 200 and (start, end) == (0, size) and headers.get("Content-Length") == str(size)
    if not is_range and not is_whole:
        length = headers.get("Content-Length", "an unknown number of")
        raise UnusableAnswerError(
            f"asked for bytes {start:,} to {end:,} of {size:,}, the server sent status {status} with"
            f" {headers.get('Content-Range', 'no Content-Range')} and {length} bytes; it must answer requests for ranges"
        )
    if (encoding := headers.get("Content-Encoding", "")) not in ("", "identity"):
        raise UnusableAnswerError(f"asked for the bytes of the file, the server sent them with Content-Encoding {encoding}")


def check_header(name: str, listed: str, headers: Headers) -> None:
    """Raise UnusableAnswerError if the header that names the version of a file is not that of the listing."""
    found = headers.get(name, "")
    if (found or name in MUST_REPEAT) and plain_tag(found) != plain_tag(listed):
        raise UnusableAnswerError(f"the answer has {name} {found or 'missing'}, the listing had {listed}")


def plain_tag(etag: str) -> str:
    """Return an ETag without the mark of a weak one, which proxies add and omit."""
    return etag.removeprefix("W/")


def completed(content: bytes | bytearray, num_bytes: int, error: Exception | None = None) -> bytes:
    """Return the bytes of a checked answer. Raises BrokenOffError with them if they are too few, UnusableAnswerError if too many."""
    if error is not None:
        raise BrokenOffError(
            f"the connection broke after {len(content):,} of {num_bytes:,} bytes: {error}", bytes(content)
        ) from None
    if len(content) < num_bytes:
        raise BrokenOffError(f"the answer has {len(content):,} of {num_bytes:,} bytes", bytes(content))
    if len(content) > num_bytes:
        raise UnusableAnswerError(f"asked for {num_bytes:,} bytes, the answer has more")
    return bytes(content)
