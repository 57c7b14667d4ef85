"""Files in object stores, on web servers and in the Hugging Face hub: their file systems, versions and repeated requests.

The libraries differ in what they repeat: fsspec's HTTP client nothing, `s3fs` for two seconds, `huggingface_hub` five times for some
requests, as long as Retry-After says, but neither a refused token nor a wrong range. So `repeated` is around all requests, and reads of the
hub do not use the client's own loop. No message contains credentials, see `without_secrets`.
"""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.errors import DataError, LedomError, TransientError, UsageError

logger = logging.getLogger(__name__)
WAITS_SECONDS: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 60, 60)
"""Waits between the tries of one request: after the last one, 3 minutes have passed without an answer."""
MOST_REFUSALS = 5
"""Limit on the tries after a refused token, which may be replaced in the meantime, but usually is not."""
LONGEST_WAIT_SECONDS = 900.0
"""The longest Retry-After that is obeyed."""
BUSY = (408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524)
"""Statuses of a server that may answer later."""
REFUSED = (401, 403)
TRANSPORT = {
    *("TransportError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ResponseParserError"),
    *("IncompleteRead", "IncompleteReadError", "ConnectionError", "TimeoutError", "UnusableAnswerError", "BrokenOffError"),
}
"""Names of the base classes of broken connections, in httpx, aiohttp, botocore and here."""
OFFLINE = "OfflineModeIsEnabled"
"""Name of the error of huggingface_hub in offline mode."""
LASTING_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotImplementedError)
LASTING = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
OTHER_DATES = ("last_modified", "last_write_time", "updated", "created")
VERSIONS = ("ETag", "etag", "Content-MD5", "Digest", "mtime", "LastModified", "Last-Modified", *OTHER_DATES)
"""Keys of an entry of fsspec that change with the content, the best first."""
USER = re.compile(r"(\w+)://([^/?#\s'\"]*)@")
QUERY = re.compile(r"(https?://[^\s?#'\"<>]+|\w+://[^\s?'\"<>]+(?=\?[^\s'\"<>]*=))[?#][^\s'\"<>]*")
"""A query of a web server; in other addresses `?` without `=` is a glob."""
TOKEN = re.compile(r"\b(hf_|api_org_|Bearer\s+|Basic\s+)[\w.~+/=-]+")
LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")
"""The header RateLimit of a used-up limit, with the seconds until the next request."""
SECRET_WORDS = r"sig|token|key|cred|passw|secret|auth|policy|expires|cookie"
SECRET_NAMES = re.compile(rf"(?i)[?&#;][^=&]*({SECRET_WORDS})[^=&]*=")
HARMLESS = {"branch", "dl", "download", "file", "filename", "format", "name", "path", "raw", "ref", "revision", "version"}
"""Names of the parts of a query that say which file is meant."""
ANY_USER = ("http", "https", "s3", "ftp")
"""Protocols of which a user without a password is a token or an access key."""
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
SHORTEST_SECRET = 6
"""Characters of a secret that is found by its value; a shorter one would hide parts of words."""
Result = TypeVar("Result")


class UnusableAnswerError(OSError):
    """A server sent other bytes than those that were asked for."""


class BrokenOffError(OSError):
    """A connection broke after the bytes `content` of an answer."""

    def __init__(self, message: str, content: bytes) -> None:
        super().__init__(message)
        self.content = content


def is_remote(path: str) -> bool:
    """Return True if a path is in an object store or another file system of fsspec."""
    return "://" in path


def protocol_of(path: str) -> str:
    """Return the protocol of an address, such as `hf`."""
    return path.split("://")[0]


def remote_file_system(path: str) -> Any:
    """Return the fsspec file system of an address. Raises UsageError if its package is missing."""
    import fsspec

    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # at INFO they log each address, with the signature of a redirect
    try:
        if protocol_of(path) == "hf":
            from huggingface_hub.utils import logging as hub_logging

            hub_logging.disable_propagation()  # it prints its warnings itself
        return fsspec.filesystem(protocol_of(path))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"input {without_secrets(path)}: {error}; for s3:// install s3fs (pip install 'megatron-ledom[s3]')"
        ) from error


def without_secrets(text: object) -> str:
    """Return a text without the tokens, passwords and queries of the addresses in it, and without those that this process sends."""
    found = str(text)
    for secret in sorted(_sent_secrets(), key=len, reverse=True):
        found = found.replace(secret, "***")
    return TOKEN.sub(r"\1***", QUERY.sub(r"\1?***", USER.sub(r"\1://***@", found)))


def _sent_secrets() -> set[str]:
    """Return the credentials that the clients of this process know. A server may repeat them in an answer."""
    sent = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    if (hub := sys.modules.get("huggingface_hub")) is not None:
        sent.add(hub.get_token() or "")
    if (config := sys.modules.get("fsspec.config")) is not None:
        sent.update(_secret_values(config.conf))
    return {secret for secret in sent if len(secret) >= SHORTEST_SECRET}


def _secret_values(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif isinstance(value, str) and re.search(SECRET_WORDS, name, re.IGNORECASE):
            yield value.removeprefix("Bearer ").removeprefix("Basic ").strip()


def check_no_secrets(pattern: str) -> None:
    """Raise UsageError for an address with a password or a query that may be signed: it would be in manifests and logs."""
    users = any(name in ANY_USER or ":" in user for name, user in USER.findall(pattern))
    if users or SECRET_NAMES.search(pattern):
        raise UsageError(
            f"input {without_secrets(pattern)} contains credentials, and the manifest records each address; give the address without"
            " them, and the credentials in ~/.config/fsspec or an environment variable (FSSPEC_HTTPS for https://, AWS_* for s3://)"
        )
    queries = re.findall(r"https?://[^?#]*[?#](.*)", pattern)
    names = {part.split("=")[0].lower() for query in queries for part in re.split("[?#&;]", query)}
    if not names <= HARMLESS:
        raise UsageError(
            f"input {without_secrets(pattern)} has a query that may contain credentials, and the manifest records each address; give"
            f" an address without one, or download the file (permitted in a query: {', '.join(sorted(HARMLESS))})"
        )


def version_of(entry: Mapping[str, Any]) -> str:
    """Return what identifies the content of a listed file: its hash if the store has one, else a date; empty if there is none."""
    lfs = entry.get("lfs")
    hashes = (lfs["sha256"] if lfs else None, entry.get("blob_id"))
    return str(next((value for value in (*hashes, *(entry.get(key) for key in VERSIONS)) if value), ""))


def described(error: BaseException) -> str:
    """Return what went wrong in one line, without secrets."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and status_of(cause) is not None:
        error = cause  # fsspec's HTTP client only names the address
    status = status_of(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = without_secrets(": ".join(dict.fromkeys(lines[:1] + lines[-1:])) or type(error).__name__)
    return text if status is None or str(status) in text else f"HTTP status {status}: {text}"


def root_of(error: BaseException) -> BaseException:
    """Return the error that caused a FileNotFoundError: fsspec's HTTP client raises one for every failure to get a size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and status_of(cause) not in (404, 410):
        return cause if status_of(cause) is not None or may_succeed_later(cause) else error
    return error


def is_missing(error: BaseException) -> bool:
    """Return True if the store says that there is no such file."""
    return isinstance(root_of(error), FileNotFoundError)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, if it has one."""
    answer: Any = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    return status if isinstance(status, int) else None


def is_refusal(error: BaseException) -> bool:
    """Return True if the server knows the file and does not accept the credentials."""
    return status_of(error) in REFUSED or isinstance(error, PermissionError)


def may_succeed_later(error: BaseException) -> bool:
    """Return True if the same request may succeed later."""
    status = status_of(error)
    if status is not None:
        return status in BUSY
    if isinstance(error, (LedomError, *LASTING_ERRORS)) or is_refusal(error):
        return False
    names = {base.__name__ for base in type(error).__mro__}
    if OFFLINE in names:
        return False
    return bool(names & TRANSPORT) or (isinstance(error, OSError) and type(error) is OSError and error.errno not in LASTING)


def _asked_seconds(error: BaseException) -> float:
    """Return the seconds that a busy server asks to wait, by Retry-After or by the hub's limit of requests; else 0."""
    answer: Any = getattr(error, "response", None)
    headers = getattr(error, "headers", None) or getattr(answer, "headers", None) or {}
    value = str(headers.get("Retry-After", "")) if isinstance(headers, Mapping) else ""
    limit = LIMIT.search(headers.get("RateLimit", "")) if isinstance(headers, Mapping) and status_of(error) == 429 else None
    return max(float(value) if value.isdigit() else 0.0, 1.0 + int(limit[1]) if limit else 0.0)


def repeated(
    attempt: Callable[[], Result],
    path: str,
    *,
    waits: Sequence[float] | None = None,
    refusals: int = 0,
    explain: Callable[[BaseException], LedomError | None],
) -> Result:
    """Return the result of `attempt`, which is called again after failures that may pass, with longer and longer waits.

    waits: between the tries, in seconds; default: WAITS_SECONDS. refusals: further tries after a refused token. explain: error -> the
    error for the user if the failure lasts; None passes it on.
    Raises TransientError after the last try.
    """
    started, path = time.monotonic(), without_secrets(path)
    waits = WAITS_SECONDS if waits is None else waits
    for number, wait in enumerate([*waits, None], 1):
        try:
            return attempt()
        except Exception as raised:
            error = root_of(raised)
            refusals -= is_refusal(error)
            is_passing = may_succeed_later(error) or (is_refusal(error) and refusals >= 0)
            asked = _asked_seconds(error)
            if is_passing and wait is not None and asked <= LONGEST_WAIT_SECONDS:
                seconds = max(wait, asked)
                logger.warning("%s: %s; try %d of %d in %.0f s", path, described(error), number + 1, len(waits) + 1, seconds)
                time.sleep(seconds)
                continue
            if may_succeed_later(error):
                seconds = time.monotonic() - started
                raise TransientError(
                    f"{path} cannot be read: {described(error)} ({number} tries in {seconds:.0f} s); run the same command again"
                    " later: finished work is kept"
                ) from None
            if (explained := explain(error)) is not None:
                raise explained from None
            raise
    raise AssertionError("unreachable")


def check_same(source: InputPath, entry: Mapping[str, Any]) -> None:
    """Raise DataError if the entry of a file is not that of the file that was listed."""
    size, version = entry.get("size"), version_of(entry)
    if size is not None and size != source.num_bytes:
        raise changed(source, f"has {size:,} bytes, it had {source.num_bytes:,} when this run began")
    if version and source.version and version.removeprefix("W/") != source.version.removeprefix("W/"):
        raise changed(source, f"has another version ({version}) than when this run began ({source.version})")


def changed(source: InputPath, found: str) -> DataError:
    """Return the error for a file that was replaced, because the corpus would mix its old and its new content."""
    return DataError(
        f"{without_secrets(source.path)} {found}: another program changes it; wait until it is complete, then start over with --overwrite"
    )


def is_http(source: InputPath) -> bool:
    """Return True if a file is on a web server."""
    return protocol_of(source.path) in ("http", "https")


def check_hash(source: InputPath, num_bytes: int, sha256: str) -> None:
    """Raise DataError if a file of the hub that was read as a whole has another hash than the hub names. num_bytes: bytes read."""
    is_named = protocol_of(source.path) == "hf" and len(source.version) == len(sha256)
    if is_named and num_bytes == source.num_bytes and source.version != sha256:
        raise DataError(
            f"{without_secrets(source.path)} arrived with the SHA-256 {sha256}, the hub names {source.version}: the transfer damaged it, or a proxy"
            " stored an old copy; run the same command again, or download the file and check it"
        )
