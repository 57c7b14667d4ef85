"""Differences between two records of an inventory, each named with both values."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]

CLOSE = 1e-7
"""Absolute tolerance on another kind of machine, if there is a relative one."""
DIFFERENCES, CLOSE_DIFFERENCES = "prior_removed", 2e-6
"""Scores that are differences of two log-probabilities. In fp32 those from 4 to 8 are rounded to 5e-7, so their difference can change
by a few such units, however small it is."""
MOST = 8
"""Largest number of differences to report for one artifact."""
FLOAT = re.compile(r"[+-]?\d[\d,]*\.\d+(?:[eE][+-]?\d+)?")
HASH = re.compile(r"\b(?:[0-9a-f]{64}|[0-9a-f]{12})\b")


def differences(expected: Record, found: Record, *, tolerance: float) -> list[str]:
    """Return lines that name the differences of a step: exit code, missing or new artifacts, values.

    tolerance: relative, for floats and printed floats; with 0 every byte counts.
    """
    lines = []
    if expected["code"] != found["code"]:
        lines.append(f"exit code: {expected['code']} in the reference, now {found['code']}\n{found.get('stderr', '')}")
    ours, theirs = expected["artifacts"], found["artifacts"]
    lines += [f"{name}: in the reference, now missing" for name in ours if name not in theirs]
    lines += [f"{name}: not in the reference" for name in theirs if name not in ours]
    for name in ours:
        if name in theirs:
            lines += [f"{name}: {line}" for line in artifact_differences(ours[name], theirs[name], tolerance)]
    return lines


def artifact_differences(expected: Record, found: Record, tolerance: float) -> list[str]:
    """Return lines for one artifact. With a tolerance, hashes of computed floats do not count."""
    lines = list(walk(expected, found, "", tolerance))
    named = [line for line in lines if not line.startswith("sha256:")]
    if lines and not named:
        has_values = bool({"lines", "values"} & expected.keys())
        named = [f"{'the values are equal, the bytes are not (layout, order of keys): ' if has_values else ''}{lines[0]}"]
    more = [f"... and {len(named) - MOST} more"] if len(named) > MOST else []
    return named[:MOST] + more


def walk(expected: Any, found: Any, where: str, tolerance: float) -> Iterator[str]:
    """Yield a line for each leaf in which two JSON values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            place = f"{where}.{key}" if where else key
            if key not in expected or key not in found:
                yield f"{place}: {'not in the reference' if key not in expected else 'now missing'}"
            elif (
                not tolerance
                or key != "sha256"
                or ("lines" not in expected and "values" not in expected and "norm" not in expected)
            ):
                yield from walk(expected[key], found[key], place, tolerance)
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            yield f"{where}: {len(expected)} entries in the reference, now {len(found)}"
        for number, (ours, theirs) in enumerate(zip(expected, found, strict=False)):
            yield from walk(ours, theirs, f"{where}[{number}]", tolerance)
    elif not (
        is_close(expected, found, tolerance, CLOSE_DIFFERENCES if DIFFERENCES in where else CLOSE)
        if tolerance
        else json.dumps(expected) == json.dumps(found)
    ):
        yield f"{where}: {expected!r} in the reference, now {found!r}"


def is_close(expected: Any, found: Any, tolerance: float, absolute: float = CLOSE) -> bool:
    """Return True for floats within the tolerance, and for texts that differ only in such floats or in hashes."""
    if isinstance(expected, str) and isinstance(found, str):
        if FLOAT.sub("", HASH.sub("", expected)) != FLOAT.sub("", HASH.sub("", found)):
            return False
        ours, theirs = FLOAT.findall(HASH.sub("", expected)), FLOAT.findall(HASH.sub("", found))
        return len(ours) == len(theirs) and all(
            is_close_printed(one, other, tolerance) for one, other in zip(ours, theirs, strict=True)
        )
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=tolerance, abs_tol=absolute) or (
            math.isnan(expected) and math.isnan(found)
        )
    return bool(expected == found)


def is_close_printed(expected: str, found: str, tolerance: float) -> bool:
    """Return True for printed numbers within the tolerance, or within one unit of the last printed digit."""
    unit = 10.0 ** -len(re.split("[eE]", expected.partition(".")[2])[0])
    ours, theirs = (float(text.replace(",", "")) for text in (expected, found))
    return math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=1.01 * unit)
