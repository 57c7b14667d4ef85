"""Jobs that go on after a kill: what was asked is kept beside what is finished, and only the same request goes on from there.

A `WorkFolder` holds finished units as files; lines that grow are in `storage.lines`. Every request is compared by
`differences`, and refused by `check_same_request`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from megatron_ledom.errors import LedomError, MismatchError, UsageError, cannot_write
from megatron_ledom.storage.files import PART_SUFFIX, write_whole
from megatron_ledom.storage.locks import LOCK_SUFFIX, output_folder_lock

Request = Mapping[str, Any]
"""Everything that decides the content of a result, as JSON holds it: options, tokenizer, input files with size and version."""
INPUT, PLAN = "input", "plan.json"
LONGEST = 60
"""Characters of a value that a difference shows."""


def differences(before: Request, now: Request, prefix: str = "") -> list[str]:
    """Return what differs between two requests, each as `section.key was A and is B`.

    Of the key `input`, a list of (path, size, version), the first file that differs is named.
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
    """Raise `error` where `what`, a result or unfinished work, was made by another request than `now`."""
    if changed := differences(before, now):
        raise error(f"{what} was made otherwise ({'; '.join(changed)}); {advice}")


def _input_difference(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> str:
    old, new = {item[0]: list(item[1:]) for item in before}, {item[0]: list(item[1:]) for item in now}
    for path in [*old, *new]:
        if path not in new:
            return f"the input {path} is not among the inputs any more"
        if path not in old:
            return f"the input {path} is new"
        if old[path] != new[path]:
            then, size = old[path][0], new[path][0]
            how = f"{then:,} bytes then, {size:,} now" if then != size else "same size, written anew"
            return f"the input {path} has changed since ({how})"
    return "the order of the inputs has changed"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


class WorkFolder:
    """OUTPUT.work, the finished units of a job, held by one process. Use as a context manager; `remove` it when the job is done.

    A unit is finished when its record (.json) is there, which `finish_unit` writes last; its other files are the job's affair.
    `plan.json` says what was asked: work of another request is refused, or thrown away with `start_over`; that of the same
    request is always gone on with.
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
        """serves: (before, now) -> the request nearest to `now` that units of `before` serve. option: the user's name of OUTPUT."""
        self.folder = Path(f"{output}.work")
        self.request: Request = json.loads(json.dumps(request, allow_nan=False))
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()][1:]
        self._lock = ExitStack()
        self._lock.enter_context(output_folder_lock(self.folder, option))
        try:
            self._take_up(start_over, serves)
        except OSError as error:
            self.__exit__(OSError, error, None)
            raise cannot_write(error, str(self.folder / PLAN)) from error
        except BaseException:
            self._lock.close()
            raise

    def _take_up(self, start_over: bool, serves: Callable[[Request, Request], Request]) -> None:
        plan = self.folder / PLAN
        planned = self._read_plan(plan, start_over)
        served = serves(planned, self.request) if planned else {}
        if planned and not start_over:
            advice = "give the same options to resume, or start again with --overwrite"
            check_same_request(f"the unfinished work in {self.folder}", served, self.request, advice, UsageError)
        if planned and not differences(served, self.request):
            if planned != self.request:  # from now on units may be what the earlier request did not allow
                write_whole(plan, json.dumps(self.request).encode())
            return
        for path in self.folder.iterdir():
            if path.name != LOCK_SUFFIX:
                path.unlink()
        write_whole(plan, json.dumps(self.request).encode())

    def _read_plan(self, plan: Path, start_over: bool) -> Request:
        """Return the request of the work that is there; an empty one without any, or where it is damaged and to be replaced."""
        try:
            planned = json.loads(plan.read_bytes())
            if not isinstance(planned, dict):
                raise ValueError(f"it holds a {type(planned).__name__}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            if start_over:
                return {}
            raise UsageError(
                f"{plan} is damaged ({error}), so nobody knows what made the work beside it; start again with --overwrite"
            ) from error
        return planned

    def path(self, unit: str) -> str:
        """Return where the files of a unit are, without ending."""
        return str(self.folder / unit)

    def finished(self, unit: str) -> dict[str, Any] | None:
        """Return the record of a unit, None if it is not finished."""
        try:
            return dict(json.loads(Path(f"{self.path(unit)}.json").read_bytes()))
        except (FileNotFoundError, ValueError):  # a power failure may have left it empty
            return None

    def forget(self, unit: str) -> None:
        """Make a finished unit one that is not."""
        os.unlink(f"{self.path(unit)}.json")

    def num_finished(self) -> int:
        """Return how many units are finished."""
        return sum(1 for path in self.folder.glob("*.json") if path.name != PLAN)

    def remove(self) -> None:
        """Remove all of it: the job is done, or nothing of it is."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self.num_finished():
            self.remove()  # nothing to go on from
            for folder in self._made:
                with contextlib.suppress(OSError):  # another task's files may be in it
                    folder.rmdir()
        self._lock.close()


def finish_unit(path: str, record: Mapping[str, Any]) -> None:
    """Write the record of the unit whose files are at `path`, which makes it finished. Raise OSError.

    Neither the record nor the files are forced to the disk, which would write every result twice: a job whose units a power failure
    could take keeps their hashes in the record, and makes those again that have others.
    """
    part = f"{path}.json{PART_SUFFIX}"
    Path(part).write_bytes(json.dumps(record).encode())
    os.replace(part, f"{path}.json")
