"""Equality of JSON values up to the rounding of their numbers."""

from typing import Any

import pytest


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Return True if all numbers of two JSON values are equal up to the tolerance, and all else exactly."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected, [tolerance] * len(found)))
    if isinstance(expected, float):
        return isinstance(found, float) and found == pytest.approx(expected, abs=tolerance)
    return bool(found == expected)
