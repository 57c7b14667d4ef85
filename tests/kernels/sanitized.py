"""Replays cases of an op under gcc's address, undefined-behaviour and thread sanitizers (sanitizer_main.cpp)."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from tests.kernels.build import CSRC, EMULATED_FLAGS, cache_folder, compiled
from tests.kernels.cases import Case, c_arguments, pointers
from tests.kernels.interface import functions
from tests.support.paths import ROOT

SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def dispatcher(op: str, csrc: Path) -> str:
    """Return the C++ of `call_function`, which calls a function of the op's header by its name."""
    members = {ctypes.c_void_p: "pointer", ctypes.c_float: "real", ctypes.c_double: "real"}
    lines = [
        "#include <string>", "#include <vector>", f'#include "{op}/{op}.h"',
        "struct Argument { void* pointer = nullptr; double real = 0; int64_t integer = 0; };",
        "int call_function(const std::string& name, const std::vector<Argument>& given) {",
    ]  # fmt: skip
    for function in functions(op, csrc).values():
        if function.returns is not ctypes.c_int:
            continue
        values = []
        for i, kind in enumerate(function.parameters.values()):
            member = members.get(kind, "integer")
            cast = {ctypes.c_float: "static_cast<float>", ctypes.c_int: "static_cast<int>"}.get(kind, "")
            values.append(f"{cast}(given[{i}].{member})")
        lines.append(f'  if (name == "{function.name}") return {function.name}({", ".join(values)});')
    return "\n".join([*lines, "  return -1;", "}"]) + "\n"


def sanitized_program(op: str, sanitizer: str, csrc: Path = CSRC) -> Path:
    """Return the program that replays calls; it has only the kernels for bf16."""
    generated = cache_folder() / f"{op}-dispatcher.cpp"
    generated.parent.mkdir(parents=True, exist_ok=True)
    text = dispatcher(op, csrc)
    if not generated.exists() or generated.read_text(encoding="utf-8") != text:
        generated.write_text(text, encoding="utf-8")
    command = [
        "g++",
        *EMULATED_FLAGS,
        "-O1",
        SANITIZERS[sanitizer],
        "-fno-sanitize-recover=all",
        "-DLEDOM_BFLOAT16_ONLY",
        "-x",
        "c++",
    ]
    sources = [csrc / op / f"{op}.cu", csrc / "emulation" / "control.cpp", ROOT / "tests" / "kernels" / "sanitizer_main.cpp"]
    return compiled(f"{op}-{sanitizer}", command, [*sources, generated], csrc)


def write_calls(op: str, cases: Sequence[Case], folder: Path, csrc: Path) -> tuple[Path, Path]:
    """Write the two files that sanitizer_main.cpp reads."""
    lines, data = [], bytearray()
    for case in cases:
        function, tensors = functions(op, csrc)[case.function], pointers(case)
        unique = list({id(tensor): tensor for tensor in tensors.values()}.values())
        for tensor in unique:
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            lines.append(f"tensor {len(raw)}")
            data += raw
        places = {name: [id(t) for t in unique].index(id(tensor)) for name, tensor in tensors.items()}
        lines.append(f"call {function.name} {len(function.parameters)}")
        for name, value in zip(function.parameters, c_arguments(function, case, places), strict=True):
            kind = (
                "tensor" if name in tensors else "null" if value is None else "real" if isinstance(value, float) else "integer"
            )
            lines.append(f"{kind} {0 if value is None else value!r}")
    calls, bytes_file = folder / "calls.txt", folder / "data.bin"
    calls.write_text("\n".join(lines) + "\n", encoding="utf-8")
    bytes_file.write_bytes(data)
    return calls, bytes_file


@cache
def fixed_addresses() -> tuple[str, ...]:
    """Return a command prefix for addresses that are not random: some thread sanitizers need it, some containers forbid it."""
    command = ("setarch", "-R")
    is_allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if is_allowed else ()


def run_sanitized(op: str, cases: Sequence[Case], sanitizer: str, schedule: int, folder: Path, csrc: Path = CSRC) -> str:
    """Return the sanitizer's report; empty if the calls are clean. The cases are of bf16."""
    files = write_calls(op, cases, folder, csrc)
    command = [*fixed_addresses(), str(sanitized_program(op, sanitizer, csrc)), *map(str, files), str(schedule)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS})
    is_clean = done.returncode == 0 and done.stdout == f"{len(cases)} calls\n"
    return "" if is_clean else f"exit {done.returncode}\n{done.stdout}{done.stderr}"
