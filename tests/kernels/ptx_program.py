"""Reads one kernel from a PTX file: parameters, registers, shared memory, instructions."""

import re
from dataclasses import dataclass, field

SIZES = {kind + str(8 * size): size for kind in "bsuf" for size in (1, 2, 4, 8)} | {"pred": 1}
"""Number of bytes of each PTX type."""


class PtxError(RuntimeError):
    """The program does a forbidden or unsupported operation."""


@dataclass(frozen=True)
class Instruction:
    guard: str | None
    """The predicate register that must be true for the instruction to run."""
    is_negated: bool
    opcode: tuple[str, ...]
    """The mnemonic, split at its dots."""
    operands: tuple[str, ...]
    text: str

    @property
    def kind(self) -> str:
        """The type of the result, or of the moved value."""
        return self.opcode[-1]


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Program:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    """Type of each register."""
    shared: dict[str, int] = field(default_factory=dict)
    """Offsets of shared variables."""
    shared_bytes: int = 0
    parameter_bytes: int = 0


def align(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to


def read_parameters(program: Program, text: str) -> None:
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?"
    for alignment, kind, name, count in re.findall(pattern, text):
        offset = align(program.parameter_bytes, int(alignment or SIZES[kind]))
        size = SIZES[kind] * int(count or 1)
        program.parameters.append(Parameter(name, offset, size))
        program.parameter_bytes = offset + size


def declare_registers(program: Program, statement: str) -> None:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
    assert match is not None, statement
    for name in re.split(r"[\s,]+", match[2].strip()):
        many = re.fullmatch(r"(%\w+)<(\d+)>", name)
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
        program.registers.update(dict.fromkeys(names, match[1]))


def declare_shared(program: Program, statement: str) -> None:
    match = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+(\w+)(?:\[(\d+)\])?", statement)
    if match is None:
        raise PtxError(f"a shared variable that this reader does not support: {statement}")
    offset = align(program.shared_bytes, int(match[1]))
    program.shared[match[3]] = offset
    program.shared_bytes = offset + SIZES[match[2]] * int(match[4] or 1)


def read_instruction(statement: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
    if match is None:
        raise PtxError(f"not an instruction: {statement}")
    operands = tuple(o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[4]))
    return Instruction(match[2], match[1] == "!", tuple(match[3].split(".")), operands, " ".join(statement.split()))


def read_program(text: str, name: str) -> Program:
    """Return the kernel of this mangled name. Raises PtxError if there is none."""
    start = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)", text, re.S)
    if start is None:
        raise PtxError(f"no kernel {name}")
    end = text.index("\n}\n", start.end())
    program = Program(name)
    read_parameters(program, start[1])
    body = re.sub(r"//[^\n]*", "", text[text.index("{", start.end()) : end])
    for piece in re.split(r"(\$L__\w+:)|;", body):
        statement = (piece or "").lstrip("{} \t\n").rstrip()
        if re.fullmatch(r"\$L__\w+:", statement):
            program.labels[statement[:-1]] = len(program.code)
        elif statement.startswith(".reg"):
            declare_registers(program, statement)
        elif statement.startswith(".shared"):
            declare_shared(program, statement)
        elif statement.startswith(".") and not statement.startswith((".pragma", ".loc")):
            raise PtxError(f"a declaration that this reader does not support: {statement}")
        elif statement and not statement.startswith("."):
            program.code.append(read_instruction(statement))
    return program
