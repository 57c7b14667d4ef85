"""Exports of a package that are imported at their first use, so that importing the package is fast."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of a package; `exports` lists the names of each module."""

    def load(name: str) -> Any:
        """Import one export."""
        for module, names in exports.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
