"""Reads the C interfaces of csrc/ from their headers, so that tests use the same argument names."""

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.kernels.build import CSRC

C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
"""LEDOM_BFLOAT16 and LEDOM_FLOAT16 of csrc/common/interface.h."""


@dataclass(frozen=True)
class Function:
    name: str
    returns: type
    parameters: dict[str, type]
    """ctypes type of each parameter, in order; every pointer is a c_void_p."""
    readable: frozenset[str]
    """Pointers to const: the function must not write there."""


def c_type(text: str) -> type:
    """Return the ctypes type for a type in a header."""
    return ctypes.c_void_p if "*" in text else C_TYPES[text.strip()]


@cache
def functions(op: str, csrc: Path = CSRC) -> dict[str, Function]:
    """Return all functions that the op's header declares."""
    text = re.sub(r"//.*", "", (csrc / op / f"{op}.h").read_text(encoding="utf-8"))
    found = {}
    for returns, name, parameters in re.findall(r"LEDOM_API\s+(\w+)\s+(\w+)\(([^)]*)\)\s*;", text):
        pairs = [re.fullmatch(r"\s*(.*?[\s*])(\w+)\s*", parameter) for parameter in parameters.split(",")]
        assert all(pairs), f"{name}: a parameter that this reader does not support"
        types = {pair[2]: c_type(pair[1]) for pair in pairs if pair}
        const = frozenset(pair[2] for pair in pairs if pair and "const" in pair[1])
        found[name] = Function(name, c_type(returns), types, const)
    return found


def load(library: Path, op: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """Load the library and set the types of the op's functions."""
    loaded = ctypes.CDLL(str(library))
    for function in functions(op, csrc).values():
        symbol = getattr(loaded, function.name)
        symbol.argtypes, symbol.restype = list(function.parameters.values()), function.returns
    return loaded
