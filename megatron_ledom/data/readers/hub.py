"""Inputs in repositories of the Hugging Face hub: hf://datasets/ORG/NAME[@REVISION]/PATH.

A revision is replaced by its commit before anything is listed, so that all tasks, manifests and later runs name the same files.
"""

import logging
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from megatron_ledom.data.readers.answers import check_range, completed
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.remote import (
    OFFLINE,
    changed,
    described,
    is_refusal,
    remote_file_system,
    repeated,
)
from megatron_ledom.errors import LedomError, UsageError

logger = logging.getLogger(__name__)
PREFIXES = {"dataset": "datasets/", "space": "spaces/", "model": ""}
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
EXAMPLE = "hf://datasets/ORG/NAME@REVISION/PATH"
TIMEOUT_SECONDS = 30
"""Longest silence of the hub."""
MOST_NAMED = 8
"""Limit on the revisions that a message names."""


class Commits:
    """The commits of the revisions that the addresses of one command name; each is asked for once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], str] = {}

    def pinned(self, pattern: str) -> str:
        """Return an address or glob with the commit in place of its revision.

        Raises UsageError for a bucket, and for a repository or revision that is missing or may not be read.
        """
        if pattern.removeprefix("hf://").split("/")[0] == "buckets":
            raise UsageError(
                f"input {pattern} is in a bucket, which has no commits, so no manifest could name what was read; give a dataset"
                f" ({EXAMPLE}), or download the files"
            )
        explain = _explainer(pattern)
        place = repeated(lambda: remote_file_system(pattern).resolve_path(pattern), pattern, explain=explain)
        key = (place.repo_type, place.repo_id, place.revision)
        name = f"hf://{PREFIXES.get(place.repo_type, f'{place.repo_type}s/')}{place.repo_id}"
        if key not in self._found:
            commit = self._found[key] = repeated(lambda: _commit_of(*key), pattern, explain=explain)
            if commit != place.revision:
                logger.info(
                    "%s: %s is commit %s, and these files are read; to name them later: %s@%s",
                    *(name, place.revision, commit, name, commit),
                )
        return f"{name}@{self._found[key]}/{place.path_in_repo}".rstrip("/")


def _commit_of(repo_type: str, repo_id: str, revision: str) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=TIMEOUT_SECONDS).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise UsageError(f"the hub names no commit for revision {revision} of {repo_id} (found {commit!r}); check HF_ENDPOINT")
    return str(commit)


def check_readable(source: InputPath) -> None:
    """Read a byte of a file. Raises UsageError if the token does not permit it: a gated repository lists its files to everyone."""
    if source.num_bytes:
        repeated(lambda: open_file(source).read(1), source.path, explain=_explainer(source.path))


def _explainer(pattern: str) -> Callable[[BaseException], LedomError | None]:
    """Return the function that changes a lasting error of the client into one for the user."""
    return lambda error: (
        error if isinstance(error, LedomError) else UsageError(f"input {pattern}: {_explained(pattern, error)}")
    )


def _explained(pattern: str, error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    names = {base.__name__ for base in type(cause).__mro__}
    repo = unquote(pattern).removeprefix("hf://").split("@")[0]
    repo = "/".join(repo.split("/")[: 3 if repo.startswith(("datasets/", "spaces/")) else 2])
    if "GatedRepoError" in names:
        return (
            f"{repo} is gated, and {_token_found()} has no access to it; ask for access on its page {_endpoint()}/{repo}, then give"
            " the token of that account in HF_TOKEN or by `hf auth login`"
        )
    if "RevisionNotFoundError" in names:
        return f"{repo} has no such revision; it has {_revisions(repo)}; check the part after @"
    if "RepositoryNotFoundError" in names:
        return (
            f"{_endpoint()} has no repository {repo}, or it is private and {_token_found()} may not see it; check the name"
            f" ({EXAMPLE} for a dataset), or give a token with access in HF_TOKEN or by `hf auth login`"
        )
    if OFFLINE in names:
        return "the hub cannot be asked in offline mode; unset HF_HUB_OFFLINE, or give the path of a downloaded copy"
    if is_refusal(cause):
        return (
            f"the hub refuses {_token_found()} ({described(cause)}); make a new token on {_endpoint()}/settings/tokens and give it in"
            " HF_TOKEN or by `hf auth login`"
        )
    if isinstance(cause, FileNotFoundError):
        return f"there is no such file ({described(cause)}); check the path"
    if isinstance(cause, ValueError | NotImplementedError) or "HFValidationError" in names:
        return f"not an address of a repository ({described(cause)}); expected {EXAMPLE}"
    return f"cannot be listed ({described(cause)}); check the address, HF_ENDPOINT and the token"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _token_found() -> str:
    """Return words for the token that the client sends."""
    from huggingface_hub import get_token

    if not get_token():
        return "this command, without a token,"
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"


def _revisions(repo: str) -> str:
    """Return the names of the branches and tags of a repository."""
    from huggingface_hub import HfApi

    kind = {"datasets": "dataset", "spaces": "space"}.get(repo.split("/")[0], "model")
    try:
        refs = HfApi().list_repo_refs("/".join(repo.split("/")[-2:]), repo_type=kind)
    except Exception as error:
        return f"names that could not be listed ({described(error)})"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return ", ".join(names[:MOST_NAMED]) + f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED)


def open_file(source: InputPath) -> Any:
    """Open a file of the hub. Each read is one request, and checks that each answer is the range that was asked for, of the listed version."""
    from huggingface_hub.hf_file_system import HfFileSystemFile
    from huggingface_hub.utils import get_session, hf_raise_for_status

    class CheckedFile(HfFileSystemFile):  # type: ignore[misc]
        """A file of the hub; the client itself takes any answer with a good status for the range."""

        def _fetch_range(self, start: int, end: int) -> bytes:
            end = min(end, source.num_bytes)
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity", **self.fs._api._build_hf_headers()}
            options = {"headers": headers, "timeout": TIMEOUT_SECONDS, "follow_redirects": True}
            with get_session().stream("GET", self.url(), **options) as answer:
                if answer.status_code >= 400:
                    answer.read()
                hf_raise_for_status(answer)
                _check_version(source, answer)
                check_range(answer.status_code, answer.headers, start, end, source.num_bytes)
                return _content(answer, end - start)

    return CheckedFile(remote_file_system(source.path), source.path, cache_type="none", size=source.num_bytes)


def _content(answer: Any, num_bytes: int) -> bytes:
    """Return the bytes of an answer. Raises BrokenOffError with those that came if the connection breaks or there are fewer."""
    content = bytearray()
    try:
        for block in answer.iter_bytes():
            content += block
    except Exception as error:
        return completed(content, num_bytes, error)
    return completed(content, num_bytes)


def _check_version(source: InputPath, answer: Any) -> None:
    """Raise DataError if the hub names another hash than that of the listing."""
    for step in (*answer.history, answer):
        name = "X-Linked-Etag" if "X-Linked-Etag" in step.headers else "ETag"
        etag = step.headers.get(name, "").removeprefix("W/").strip('"')
        if (name == "X-Linked-Etag" or "X-Repo-Commit" in step.headers) and HASH.fullmatch(etag):
            if HASH.fullmatch(source.version) and len(etag) == len(source.version) and etag != source.version:
                raise changed(source, f"has another hash ({etag}) than when this run began ({source.version})")
            return
