"""The registration of a comparison: what is compared, how, and with which settings, fixed before the test part is read.

The first opening of the test part writes a seal with the hash of the registration. After that, a registration that is missing or that
differs is refused, and so are the answers of the test part.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lines import read_lines

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.storage.files import write_file

Content = dict[str, Any]
REMEDY = "run the part again in a new folder (--output), and report both"


class Registration:
    """The registration of a folder, its seal, and the answers of the test part that it guards."""

    def __init__(self, folder: Path) -> None:
        self.path, self.seal, self.answers = folder / "registration.json", folder / "seal.json", folder / "answers.jsonl"

    def write(self, content: Content) -> None:
        """Write the registration. Raises UsageError if another one was there when the test part was opened."""
        digest = digest_of(content)
        sealed = self._sealed()
        if sealed is not None and sealed["sha256"] != digest:
            raise UsageError(
                f"the test part was opened on {sealed['opened']} under the registration {sealed['sha256'][:16]}, and this one is"
                f" {digest[:16]}: its settings, models or choices changed. To compare again under it, {REMEDY}"
            )
        write_file(self.path, json.dumps({"sha256": digest, "content": content}, indent=1))

    def open_test(self) -> None:
        """Check the registration, and seal it if the test part was not opened before."""
        found = self._checked()
        if self._sealed() is None:
            opened = datetime.now(UTC).isoformat(timespec="seconds")
            write_file(self.seal, json.dumps({"sha256": found["sha256"], "opened": opened}))

    def read(self) -> Content:
        """Return the content, its hash and the time of the opening. Raises UsageError unless it is what was sealed."""
        found, sealed = self._checked(), self._sealed()
        if sealed is None:
            raise UsageError(f"{self.seal} does not exist, so the test part was not opened; run the study's steps first")
        return {**found["content"], "sha256": found["sha256"], "opened": sealed["opened"]}

    def read_answers(self, expected: Content) -> dict[str, str]:
        """Return the right answers of the test part by prompt.

        expected: the registration that the current files and settings give. Raises UsageError unless it is the sealed one.
        """
        found = self.read()
        if found["sha256"] != digest_of(expected):
            keys = ", ".join(sorted(_different(found, json.loads(json.dumps(expected)))))
            raise UsageError(
                f"{self.path} does not register what would be evaluated now ({keys} changed), so the answers of the test part are not"
                f" read; undo the change, or {REMEDY}"
            )
        return {record["prompt"]: record["answer"] for record in read_lines(self.answers)}

    def _checked(self) -> Content:
        """Return the file. Raises an error if it is missing, damaged or edited, or not the one that was sealed."""
        if not self.path.is_file():
            raise UsageError(f"{self.path} does not exist; the test part is opened only after the comparison is registered")
        found: Content = json.loads(self.path.read_text(encoding="utf-8"))
        if digest_of(found["content"]) != found["sha256"]:
            raise DataError(f"{self.path} was changed after it was written: its hash differs; {REMEDY}")
        sealed = self._sealed()
        if sealed is not None and sealed["sha256"] != found["sha256"]:
            raise UsageError(
                f"{self.path} has the hash {found['sha256'][:16]}, expected {sealed['sha256'][:16]}, under which the test part was opened"
                f" on {sealed['opened']}; {REMEDY}"
            )
        return found

    def _sealed(self) -> dict[str, str] | None:
        found: dict[str, str] | None = json.loads(self.seal.read_text(encoding="utf-8")) if self.seal.is_file() else None
        return found


def digest_of(content: Content) -> str:
    """Return the sha256 of a registration's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _different(found: Content, expected: Content) -> Iterator[str]:
    yield from (name for name in expected if found.get(name) != expected[name])
