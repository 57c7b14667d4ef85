"""Runs one check in this process: `python -m megatron_ledom.hardware_check.one_check FUNCTION SETTING OUTCOME_FILE PARENT`.

FUNCTION is `module:function`, SETTING a Setting as JSON, PARENT the process that ends this one when it is killed itself.
"""

import faulthandler
import importlib
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil

from megatron_ledom.errors import LedomError
from megatron_ledom.hardware_check.check import Outcome, Setting, failed
from megatron_ledom.platform.processes import die_with_the_parent
from megatron_ledom.storage.files import write_json

STACKS_SECONDS, STACKS_PART = 3.0, 0.2
"""The stacks of all threads are written to the log these seconds before the kill, or this part of a short limit before it."""


def main(arguments: Sequence[str]) -> None:
    """Run the check and write its outcome. Any error of the check becomes a failed outcome, with the stack in the log."""
    function, setting, outcome_file, parent = arguments
    die_with_the_parent(int(parent))
    given = Setting(**json.loads(setting))
    faulthandler.enable()
    faulthandler.dump_traceback_later(given.seconds - min(STACKS_SECONDS, STACKS_PART * given.seconds))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    outcome = outcome_of(function, given)
    faulthandler.cancel_dump_traceback_later()
    write_json(outcome_file, {**asdict(outcome), "numbers": plain(outcome.numbers)})


def outcome_of(function: str, setting: Setting) -> Outcome:
    """Call `module:function` with the time that is left of its limit, and return its outcome."""
    module, _, name = function.partition(":")
    try:
        check = getattr(importlib.import_module(module), name)
        left = max(0.0, setting.seconds - (time.time() - psutil.Process().create_time()))  # imports count too
        outcome = check(replace(setting, seconds=left))
        if not isinstance(outcome, Outcome):
            raise TypeError(f"{function} returned {type(outcome).__name__}, expected an Outcome")
        return outcome
    except LedomError as error:
        traceback.print_exc()
        return failed(str(error))
    except BaseException as error:  # torch's CheckpointException is no Exception
        traceback.print_exc()
        return failed(f"{type(error).__name__}: {error}")


def plain(value: Any) -> Any:
    """Return numbers as JSON can store them: NaN and infinity become `nan` and `inf`."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


if __name__ == "__main__":
    main(sys.argv[1:])
