"""Which `apex` is importable: NVIDIA's with its CUDA kernels, or something else of that name."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Apex:
    """Whether megatron-core may take kernels from apex, and a line for the log."""

    usable: bool
    state: str


def find_apex() -> Apex:
    """Look for apex without importing it. The package called apex on PyPI is a web framework, and never usable."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return Apex(False, "apex not installed")
    where = found.origin or ", ".join(found.submodule_search_locations or [])
    if importlib.util.find_spec("amp_C") is None:  # NVIDIA's kernels are a module of their own
        return Apex(False, f"apex at {where} ignored: it is not NVIDIA's, or was built without its CUDA kernels")
    return Apex(True, "apex of NVIDIA installed")
