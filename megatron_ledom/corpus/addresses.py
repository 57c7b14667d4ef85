"""Addresses of sources: a hub repository, an object store, a local folder, or the text of the installed packages."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

HUB = "hf://datasets/"
INSTALLED = "installed-packages"
"""Address of the text that every machine with this package has: see `installed_text`."""
INSTALLED_FILES = ("prose.jsonl", "code.jsonl")
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"hf://datasets/[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_address(address: str, files: Sequence[str], revision: str | None) -> str | None:
    """Return the problem of an address with its files and revision, as `key=found; expected`; None if there is none."""
    if address == INSTALLED:
        wrong = [name for name in files if name not in INSTALLED_FILES]
        return f"files has {wrong[0]!r}; of installed-packages there are {', '.join(INSTALLED_FILES)}" if wrong else None
    if close := get_close_matches(address, [INSTALLED], 1, 0.8):
        return f"address={address!r} is not known; did you mean {close[0]}?"
    if not address:
        return "address is empty; give hf://datasets/OWNER/NAME, s3://BUCKET/FOLDER, a local folder, or installed-packages"
    if address.startswith("hf://") and REPOSITORY.fullmatch(address) is None:
        return (
            f"address={address!r} is not a dataset of the hub; expected hf://datasets/OWNER/NAME, the commit in `revision` and"
            " folders in `files`"
        )
    if revision is not None and not is_hub(address):
        return f"revision={revision!r} is of no use with {address}: only a hub repository has revisions; set it to null"
    for name in files:
        if not name or name.startswith("/") or "://" in name or ".." in name.split("/"):
            return f"files has {name!r}; expected patterns below the address, such as 'data/**/*.parquet'"
    return None


def is_hub(address: str) -> bool:
    """Return True for a repository of the hub."""
    return address.startswith(HUB)


def repository_of(address: str) -> str:
    """Return OWNER/NAME of a hub address."""
    return address.removeprefix(HUB)


def is_commit(revision: str | None) -> bool:
    """Return True for a full commit hash: a branch or tag can move."""
    return revision is not None and COMMIT.fullmatch(revision) is not None


def root_of(address: str, revision: str | None) -> str:
    """Return the address with its revision and a closing slash, which every path of the source begins with."""
    return f"{address.rstrip('/')}@{revision}/" if is_hub(address) and revision else f"{address.rstrip('/')}/"
