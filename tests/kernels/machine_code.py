"""Registers, stacks and memory instructions of a kernel's machine code, from the assembler's report and nvdisasm."""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from tests.kernels.build import CSRC, cubin

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_REGISTERS = 168
"""Three blocks of 128 threads per multiprocessor."""


@dataclass
class Kernel:
    stack_bytes: int = 0
    spilled_bytes: int = 0
    registers: int = 0
    narrow: list[str] = field(default_factory=list)
    """Global accesses of fewer than 128 bits."""
    wide: int = 0
    local: list[str] = field(default_factory=list)
    """Accesses to local memory."""


def disassembler() -> str | None:
    """Return nvdisasm of the test extra, or of a toolkit."""
    packaged = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin", "nvdisasm")
    return str(packaged) if packaged.exists() else shutil.which("nvdisasm")


def short_name(symbol: str) -> str:
    """Return the kernel's name in a mangled one: the identifier after the namespaces."""
    found, at = "", symbol.find("N") + 1
    while (match := re.compile(r"(\d+)").match(symbol, at)) is not None:
        start = match.end()
        found, at = symbol[start : start + int(match[1])], start + int(match[1])
    return found


def kernels(op: str, architecture: str, csrc: Path = CSRC) -> dict[str, Kernel]:
    """Return the report of each kernel, by mangled name."""
    binary = cubin(op, architecture, csrc)
    account = binary.with_name(binary.name + ".log").read_text(encoding="utf-8")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = {}
    for name, stack, stores, loads, registers in re.findall(pattern, account, re.S):
        found[name] = Kernel(int(stack), int(stores) + int(loads), int(registers))
    tool = disassembler()
    assert tool is not None, "no nvdisasm"
    text = subprocess.run([tool, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        kernel = found[re.match(r"\w+", section)[0]]  # type: ignore[index]
        for instruction in re.findall(r"\b(?:LDG|STG|LDL|STL|LD|ST|ATOMG|RED)\.[\w.]+", section):
            if instruction.startswith(("LDL", "STL")):
                kernel.local.append(instruction)
            elif ".128" in instruction:
                kernel.wide += 1
            else:
                kernel.narrow.append(instruction)
    return found
