"""An interpreter of nvcc's PTX in NumPy, with one array element per CUDA thread.

Threads at the lowest program counter run first, so that branches join again. Every memory access is checked for bounds (of the
tensors that the caller names) and alignment. A shuffle or vote needs all lanes of its mask, a barrier the whole block. It is a race if
two threads access a word of shared memory without a barrier between them and one of them writes. Bytes of global memory are counted
per warp and instruction, each address once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.kernels import ptx_arithmetic as arithmetic
from tests.kernels.ptx_arithmetic import Array, numpy_type
from tests.kernels.ptx_program import SIZES, Instruction, Program, PtxError

END = 1 << 40
NOBODY, MANY = -1, 1 << 30
LANES = 32
Dimensions = tuple[int, int, int]


@dataclass
class Region:
    """Global memory that the kernel may access."""

    address: int
    memory: NDArray[np.uint8]


@dataclass
class Traffic:
    """Number of bytes of global memory."""

    read: int = 0
    written: int = 0


def coordinates(index: NDArray[np.int64], size: Dimensions) -> list[NDArray[np.uint32]]:
    x, y, _ = size
    return [(index % x).astype(np.uint32), (index // x % y).astype(np.uint32), (index // (x * y)).astype(np.uint32)]


class Machine:
    """Some blocks of a launch, executed together."""

    def __init__(
        self, program: Program, blocks: range, grid: Dimensions, size: Dimensions, parameters: bytes, regions: Sequence[Region]
    ) -> None:
        threads = size[0] * size[1] * size[2]
        count = len(blocks) * threads
        self.program, self.regions, self.traffic = program, regions, Traffic()
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.thread = np.tile(np.arange(threads), len(blocks))
        self.lane = self.thread % LANES
        self.warp_start = np.arange(count) - self.lane
        self.warp_end = self.block * threads + np.minimum(threads, self.thread - self.lane + LANES)
        self.parameters = np.frombuffer(parameters + bytes(16), np.uint8)
        self.registers: dict[str, Array] = {
            name: np.zeros(count, np.bool_ if kind == "pred" else f"u{SIZES[kind]}") for name, kind in program.registers.items()
        }
        self.special: dict[str, Array] = {"%laneid": self.lane.astype(np.uint32)}
        of_block = np.repeat(np.array(blocks), threads)
        for name, values in (("%tid", coordinates(self.thread, size)), ("%ctaid", coordinates(of_block, grid))):
            self.special |= {f"{name}.{axis}": v for axis, v in zip("xyz", values, strict=True)}
        for name, values in (("%ntid", size), ("%nctaid", grid)):
            self.special |= {f"{name}.{axis}": np.full(count, v, np.uint32) for axis, v in zip("xyz", values, strict=True)}
        self.shared = np.full((len(blocks), align_words(program.shared_bytes) * 4), 0xFF, np.uint8)
        self.writer = np.full((len(blocks), align_words(program.shared_bytes)), NOBODY)
        self.reader = self.writer.copy()
        self.counter = np.zeros(count, np.int64)
        self.is_waiting = np.zeros(count, np.bool_)

    def run(self) -> None:
        """Run all threads to their ends. Raises PtxError for a forbidden operation."""
        with np.errstate(all="ignore"):
            while True:
                ready = ~self.is_waiting & (self.counter < END)
                if ready.any():
                    self.step(ready)
                elif self.is_waiting.any():
                    self.open_barriers()
                else:
                    return

    def open_barriers(self) -> None:
        for block in np.unique(self.block[self.is_waiting]):
            members = self.block == block
            if not self.is_waiting[members].all() or len(np.unique(self.counter[members])) != 1:
                raise PtxError("a barrier is not reached by the whole block")
        self.counter[self.is_waiting] += 1
        self.is_waiting[:] = False
        self.writer[:], self.reader[:] = NOBODY, NOBODY

    def step(self, ready: NDArray[np.bool_]) -> None:
        current = int(self.counter[ready].min())
        here = np.nonzero(ready & (self.counter == current))[0]
        instruction = self.program.code[current]
        acting = here
        if instruction.guard:
            acting = here[self.registers[instruction.guard][here] ^ instruction.is_negated]
        name = instruction.opcode[0]
        if name in ("bar", "barrier"):
            self.is_waiting[here] = True
            return
        self.counter[here] = current + 1
        if name == "bra":
            self.counter[acting] = self.program.labels[instruction.operands[0]]
        elif name in ("ret", "exit"):
            self.counter[acting] = END
        elif len(acting):
            self.execute(instruction, acting)

    def get(self, operand: str, kind: str, at: NDArray[np.int64]) -> Array:
        """Return an operand's value in each acting thread."""
        wanted = numpy_type(kind)
        if operand in self.registers or operand in self.special:
            found = (self.registers if operand in self.registers else self.special)[operand][at]
            return (
                found.view(wanted)
                if found.dtype.itemsize == wanted.itemsize
                else found.astype(f"u{wanted.itemsize}").view(wanted)
            )
        if operand.startswith("0f"):
            return np.full(len(at), int(operand[2:], 16), np.uint32).view(np.float32)
        if operand in self.program.shared:
            return np.full(len(at), self.program.shared[operand], wanted)
        number = int(operand.rstrip("U"), 0) & ((1 << 8 * wanted.itemsize) - 1)
        return np.full(len(at), number, f"u{wanted.itemsize}").view(wanted)

    def put(self, operand: str, value: Array, at: NDArray[np.int64]) -> None:
        if operand == "_":
            return
        register = self.registers[operand]
        if value.dtype != register.dtype:
            same_size = value.dtype.itemsize == register.dtype.itemsize
            value = np.ascontiguousarray(value).view(register.dtype) if same_size else value.astype(register.dtype)
        register[at] = value

    def execute(self, instruction: Instruction, at: NDArray[np.int64]) -> None:
        name, operands, kind = instruction.opcode[0], instruction.operands, instruction.kind
        if name in ("ld", "st"):
            self.access(instruction, at)
        elif name in ("shfl", "vote"):
            self.exchange(instruction, at)
        elif name == "mov":
            self.move(instruction, at)
        elif name == "cvt":
            self.convert(instruction, at)
        elif name == "cvta":
            self.put(operands[0], self.get(operands[1], kind, at), at)
        elif name == "setp":
            self.put(operands[0], arithmetic.compared(instruction, *(self.get(o, kind, at) for o in operands[1:3])), at)
        elif name == "selp":
            chosen = np.where(self.registers[operands[3]][at], self.get(operands[1], kind, at), self.get(operands[2], kind, at))
            self.put(operands[0], chosen, at)
        else:
            self.put(operands[0], self.computed(instruction, at), at)

    def computed(self, instruction: Instruction, at: NDArray[np.int64]) -> Array:
        name, kind = instruction.opcode[0], instruction.kind
        if name in ("shl", "shr"):
            value, by = self.get(instruction.operands[1], kind, at), self.get(instruction.operands[2], "u32", at)
            return arithmetic.shifted(value, by, name == "shl")
        wide = kind[0] + str(16 * SIZES[kind]) if "wide" in instruction.opcode else kind
        kinds = (kind, kind, wide)
        a, *rest = (self.get(o, k, at) for o, k in zip(instruction.operands[1:], kinds, strict=False))
        if name == "prmt":
            return arithmetic.permuted(a, *rest)
        if name in arithmetic.UNARY:
            return arithmetic.UNARY[name](a)
        if name in arithmetic.APPROXIMATE:
            return arithmetic.APPROXIMATE[name](a.astype(np.float64)).astype(np.float32)
        if name in arithmetic.BINARY:
            return arithmetic.BINARY[name](a, rest[0])
        if name in ("min", "max"):
            return arithmetic.smallest_or_largest(a, rest[0], name)
        if name in ("mul", "mad", "fma"):
            return arithmetic.product(instruction, a, rest[0], rest[1] if len(rest) > 1 else None)
        if name in ("div", "rem"):
            return (arithmetic.divided if name == "div" else arithmetic.remainder)(a, rest[0], kind)
        raise PtxError(f"an instruction that this interpreter does not support: {instruction.text}")

    def move(self, instruction: Instruction, at: NDArray[np.int64]) -> None:
        """Move a value, or split or join a register: {low, high}."""
        target, source, kind = *instruction.operands, instruction.kind
        if target.startswith("{"):
            parts = members(target)
            width = SIZES[kind] // len(parts)
            split = np.ascontiguousarray(self.get(source, kind, at)).view(f"u{width}").reshape(len(at), -1)
            for i, part in enumerate(parts):
                self.put(part, np.ascontiguousarray(split[:, i]), at)
        elif source.startswith("{"):
            parts = members(source)
            columns = [self.get(part, f"b{8 * SIZES[kind] // len(parts)}", at) for part in parts]
            self.put(target, np.stack(columns, 1).view(numpy_type(kind))[:, 0], at)
        else:
            self.put(target, self.get(source, kind, at), at)

    def convert(self, instruction: Instruction, at: NDArray[np.int64]) -> None:
        target, source = instruction.opcode[-2], instruction.opcode[-1]
        if target.endswith("x2"):  # two floats to a pair, the first to the upper half
            high, low = (self.get(o, "f32", at) for o in instruction.operands[1:3])
            narrow: Callable[[Array], Array] = (
                arithmetic.to_bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            )
            self.put(instruction.operands[0], narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low), at)
            return
        value = self.get(instruction.operands[1], "b16" if source == "bf16" else source, at)
        self.put(instruction.operands[0], arithmetic.converted(instruction, value), at)

    def exchange(self, instruction: Instruction, at: NDArray[np.int64]) -> None:
        """Execute shfl and vote."""
        operands = instruction.operands
        mask = self.get(operands[-1], "u32", at)
        is_here = np.zeros(len(self.lane) + 1, np.bool_)
        is_here[at] = True
        for lane in range(LANES):
            needed = (mask >> np.uint32(lane) & np.uint32(1)) == 1
            place = self.warp_start[at] + lane
            is_there = (place < self.warp_end[at]) & is_here[np.minimum(place, len(self.lane))]
            if not is_there[needed].all():
                raise PtxError(f"not all lanes of the mask are here: {instruction.text}")
        if instruction.opcode[0] == "vote":
            votes = np.zeros(len(self.lane), np.uint32)
            np.bitwise_or.at(
                votes, self.warp_start[at], self.registers[operands[1]][at].astype(np.uint32) << self.lane[at].astype(np.uint32)
            )
            self.put(operands[0], votes[self.warp_start[at]], at)
            return
        target, _, predicate = operands[0].partition("|")
        by, clamp = (self.get(o, "u32", at).astype(np.int64) for o in operands[2:4])
        lane, segment = self.lane[at], clamp >> 8 & 31
        last, first = (lane & segment) | (clamp & 31 & ~segment), lane & segment
        source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": first | (by & 31 & ~segment)}[
            instruction.opcode[2]
        ]
        is_inside = source >= last if instruction.opcode[2] == "up" else source <= last
        values = np.zeros(len(self.lane), np.uint32)
        values[at] = self.get(operands[1], "b32", at)
        self.put(target, values[self.warp_start[at] + np.where(is_inside, source, lane)], at)
        if predicate:
            self.put(predicate, is_inside, at)

    def address(self, operand: str, at: NDArray[np.int64]) -> NDArray[np.uint64]:
        match = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand)
        assert match is not None, operand
        base, offset = match[1], int(match[2] or 0)
        for parameter in self.program.parameters:
            if parameter.name == base:
                return np.full(len(at), parameter.offset + offset, np.uint64)
        kind = "u32" if base in self.program.shared or self.registers[base].dtype.itemsize == 4 else "u64"
        return self.get(base, kind, at).astype(np.uint64) + np.uint64(offset & (2**64 - 1))

    def access(self, instruction: Instruction, at: NDArray[np.int64]) -> None:
        is_load, space = instruction.opcode[0] == "ld", instruction.opcode[1]
        target, source = instruction.operands
        parts, width = members(target if is_load else source), SIZES[instruction.kind]
        size = width * len(parts)
        address = self.address(source if is_load else target, at)
        if space == "shared":
            found = self.shared_memory(instruction, address.astype(np.int64), size, at)
        elif space == "param":
            found = [(self.parameters, address.astype(np.int64), np.arange(len(at)))]
        elif space == "global":
            found = self.global_memory(instruction, address, size, at)
        else:
            raise PtxError(f"memory that a kernel should not use: {instruction.text}")
        for memory, offsets, chosen in found:
            for i, part in enumerate(parts):
                columns = offsets[:, None] + np.arange(i * width, (i + 1) * width)
                if is_load:
                    self.put(part, np.ascontiguousarray(memory[columns]).view(numpy_type(instruction.kind))[:, 0], at[chosen])
                else:
                    value = np.ascontiguousarray(self.get(part, instruction.kind, at[chosen]))
                    memory[columns] = value.view(np.uint8).reshape(-1, width)

    def global_memory(
        self, instruction: Instruction, address: NDArray[np.uint64], size: int, at: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield memory, offset and threads of each accessed region."""
        if (address % np.uint64(size)).any():
            raise PtxError(f"a misaligned access of {size} bytes: {instruction.text}")
        asked = len(np.unique(np.stack((self.warp_start[at].astype(np.uint64), address)), axis=1).T) * size
        if instruction.opcode[0] == "ld":
            self.traffic.read += asked
        else:
            self.traffic.written += asked
        outside, found = np.ones(len(at), np.bool_), []
        for region in self.regions:
            end = region.address + region.memory.nbytes
            inside = outside & (address >= np.uint64(region.address)) & (address + np.uint64(size) <= np.uint64(end))
            if inside.any():
                found.append(
                    (region.memory, (address[inside] - np.uint64(region.address)).astype(np.int64), np.nonzero(inside)[0])
                )
                outside &= ~inside
        if outside.any():
            raise PtxError(f"an access outside all tensors by {int(outside.sum())} threads: {instruction.text}")
        return found

    def shared_memory(
        self, instruction: Instruction, offset: NDArray[np.int64], size: int, at: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        if (offset % size).any() or (offset < 0).any() or (offset + size > self.program.shared_bytes).any():
            raise PtxError(f"an access that is misaligned or outside shared memory: {instruction.text}")
        block, thread = self.block[at], self.thread[at]
        for word in range(max(size // 4, 1)):
            place = (block, offset // 4 + word)
            writer, reader = self.writer[place], self.reader[place]
            if ((writer != NOBODY) & (writer != thread)).any():
                raise PtxError(f"a race in shared memory, after another thread's write: {instruction.text}")
            if instruction.opcode[0] == "ld":
                self.reader[place] = np.where((reader != NOBODY) & (reader != thread), MANY, thread)
                continue
            if ((reader != NOBODY) & (reader != thread)).any():
                raise PtxError(f"a race in shared memory, after another thread's read: {instruction.text}")
            if len(np.unique(np.stack((block, place[1])), axis=1).T) != len(at):
                raise PtxError(f"a race in shared memory, two threads write: {instruction.text}")
            self.writer[place] = thread
        return [(self.shared.reshape(-1), block * self.shared.shape[1] + offset, np.arange(len(at)))]


def align_words(size: int) -> int:
    return (size + 3) // 4 + 1


def members(operand: str) -> list[str]:
    """Return the registers of a vector, or the single one."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def run_grid(
    program: Program, grid: Dimensions, size: Dimensions, parameters: bytes, regions: Sequence[Region], at_once: int = 64
) -> Traffic:
    """Run a whole launch, `at_once` blocks together. Returns the bytes of global memory that it moved."""
    total, blocks = Traffic(), grid[0] * grid[1] * grid[2]
    for begin in range(0, blocks, at_once):
        machine = Machine(program, range(begin, min(blocks, begin + at_once)), grid, size, parameters, regions)
        machine.run()
        total.read += machine.traffic.read
        total.written += machine.traffic.written
    return total
