"""Jobs that resume after a kill: the request is stored with the finished units, and only the same request resumes.

A `WorkFolder` contains finished units as files; `storage.lines` has files that grow line by line. `differences` compares two
requests; `check_same_request` raises if they differ.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from megatron_ledom.errors import LedomError, MismatchError, UsageError, cannot_write
from megatron_ledom.storage.files import PART_SUFFIX, write_whole
from megatron_ledom.storage.locks import LOCK_SUFFIX, output_folder_lock

Request = Mapping[str, Any]
"""All values that determine a result, as JSON: options, tokenizer, input files with size and version."""
INPUT, REQUEST_FILE = "input", "plan.json"
PINNED = re.compile(r"(hf://[^@]+)@([0-9a-f]{40})(?:/|$)")
LONGEST = 60
"""Longest value that a message shows, in characters."""


def differences(before: Request, now: Request, prefix: str = "") -> list[str]:
    """Return the differences between two requests, each as `section.key was A and is B`.

    For the key `input`, a list of (path, size, version), only the first file that differs is named.
    """
    found = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif name == INPUT:
            found.append(_input_difference(old or [], new or []))
        else:
            found.append(f"{prefix}{name} was {_short(old)} and is {_short(new)}")
    return found


def check_same_request(
    what: object, before: Request, now: Request, advice: str, error: type[LedomError] = MismatchError
) -> None:
    """Raise `error` if the request `before` differs from `now`. what: the result, or unfinished work, of `before`."""
    if changed := differences(before, now):
        raise error(f"{what} was made with different settings ({'; '.join(changed)}); {advice}")


def moved_commit(before: Iterable[str], now: Iterable[str]) -> str:
    """Return how a repository of the Hugging Face hub is at another commit in the input paths `now`; empty if none is.

    The input paths of a hub contain the commit: hf://datasets/org/name@COMMIT/PATH.
    """
    found = {match[1]: match[2] for path in before if (match := PINNED.match(path))}
    for repo, commit in {match[1]: match[2] for path in now if (match := PINNED.match(path))}.items():
        if (earlier := found.get(repo, commit)) != commit:
            return f"{repo} was at commit {earlier} and is at {commit}: to resume with those files, write @{earlier} after the name"
    return ""


def _input_difference(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> str:
    old, new = {item[0]: list(item[1:]) for item in before}, {item[0]: list(item[1:]) for item in now}
    if moved := moved_commit(old, new):
        return moved
    for path in [*old, *new]:
        if path not in new:
            return f"the input {path} is no longer among the inputs"
        if path not in old:
            return f"the input {path} is new"
        if old[path] != new[path]:
            then, size = old[path][0], new[path][0]
            how = f"{then:,} bytes then, {size:,} now" if then != size else "same size, written again"
            return f"the input {path} has changed since ({how})"
    return "the order of the inputs has changed"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


class WorkFolder:
    """The folder OUTPUT.work with the finished units of a job, locked by one process.

    Use it as a context manager, and call `remove` when the job is done. A unit is finished when its record (.json) exists, which
    `finish_unit` writes last; the job chooses the unit's other files. `plan.json` contains the request. The same request always
    resumes; another one raises UsageError, or removes the work if `start_over` is set.
    """

    def __init__(
        self,
        output: str,
        request: Request,
        *,
        start_over: bool,
        serves: Callable[[Request, Request], Request] = lambda before, now: before,
        option: str = "--output-prefix",
    ) -> None:
        """Lock and check the folder; raise UsageError if it is in use or was made by another request.

        serves: (before, now) -> the request nearest to `now` for which units of `before` are valid.
        option: the user's name for OUTPUT.
        """
        self.folder = Path(f"{output}.work")
        self.request: Request = json.loads(json.dumps(request, allow_nan=False))
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()][1:]
        self._lock = ExitStack()
        self._lock.enter_context(output_folder_lock(self.folder, option))
        try:
            self._resume_or_start(start_over, serves)
        except OSError as error:
            self.__exit__(OSError, error, None)
            raise cannot_write(error, str(self.folder / REQUEST_FILE)) from error
        except BaseException:
            self._lock.close()
            raise

    def _resume_or_start(self, start_over: bool, serves: Callable[[Request, Request], Request]) -> None:
        file = self.folder / REQUEST_FILE
        stored = self._read_request(file, start_over)
        served = serves(stored, self.request) if stored else {}
        if stored and not start_over:
            advice = "give the same options to resume, or start again with --overwrite"
            check_same_request(f"the unfinished work in {self.folder}", served, self.request, advice, UsageError)
        if stored and not differences(served, self.request):
            if stored != self.request:  # new units may be valid for this request only
                write_whole(file, json.dumps(self.request).encode())
            return
        for path in self.folder.iterdir():
            if path.name != LOCK_SUFFIX:
                path.unlink()
        write_whole(file, json.dumps(self.request).encode())

    def _read_request(self, file: Path, start_over: bool) -> Request:
        """Return the stored request; an empty one if there is none, or if it is damaged and `start_over` is set."""
        try:
            stored = json.loads(file.read_bytes())
            if not isinstance(stored, dict):
                raise ValueError(f"it contains a {type(stored).__name__}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            if start_over:
                return {}
            raise UsageError(
                f"{file} is damaged ({error}), so the settings of the unfinished work are unknown; start again with --overwrite"
            ) from error
        return stored

    def path(self, unit: str) -> str:
        """Return the path of a unit's files, without extension."""
        return str(self.folder / unit)

    def finished(self, unit: str) -> dict[str, Any] | None:
        """Return the record of a unit, or None if the unit is not finished."""
        try:
            return dict(json.loads(Path(f"{self.path(unit)}.json").read_bytes()))
        except (FileNotFoundError, ValueError):  # a power failure may have left it empty
            return None

    def forget(self, unit: str) -> None:
        """Remove the record of a finished unit, so that it counts as unfinished."""
        os.unlink(f"{self.path(unit)}.json")

    def num_finished(self) -> int:
        """Return the number of finished units."""
        return sum(1 for path in self.folder.glob("*.json") if path.name != REQUEST_FILE)

    def remove(self) -> None:
        """Remove the folder, once the job is done or if no unit is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self.num_finished():
            self.remove()  # nothing to resume from
            for folder in self._made:
                with contextlib.suppress(OSError):  # another task's files may be in it
                    folder.rmdir()
        self._lock.close()


def finish_unit(path: str, record: Mapping[str, Any]) -> None:
    """Write the record of the unit whose files are at `path`; the unit is then finished. Raise OSError.

    Neither the record nor the files are forced to the disk, because that would write every result to the disk twice. A job that
    must survive a power failure stores the hashes of a unit's files in the record, and repeats the unit if a hash differs.
    """
    part = f"{path}.json{PART_SUFFIX}"
    Path(part).write_bytes(json.dumps(record).encode())
    os.replace(part, f"{path}.json")
