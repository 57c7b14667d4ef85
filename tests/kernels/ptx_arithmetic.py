"""The arithmetic of PTX instructions on NumPy arrays with one value per thread."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx_program import SIZES, Instruction, PtxError

Array = NDArray[np.generic]
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def numpy_type(kind: str) -> np.dtype[np.generic]:
    """Return NumPy's type for a PTX type; bits are unsigned."""
    if kind == "pred":
        return np.dtype(np.bool_)
    return np.dtype(FLOATS[kind] if kind in FLOATS else f"{'i' if kind[0] == 's' else 'u'}{SIZES[kind]}")


def to_bfloat16(x: Array) -> Array:
    """Return the bits, rounded to the nearest, ties to even."""
    u = x.view(np.uint32).astype(np.uint64)
    rounded = ((u + 0x7FFF + (u >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x.view(np.float32)), np.uint16(0x7FFF), rounded)


def divided(a: Array, b: Array, kind: str) -> Array:
    if kind[0] == "f":
        return np.divide(a, b)
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return (quotient * np.sign(a.astype(object)) * np.sign(b.astype(object))).astype(a.dtype)


def remainder(a: Array, b: Array, kind: str) -> Array:
    return np.fmod(a, b)


def shifted(a: Array, by: Array, is_left: bool) -> Array:
    """Shift; a shift above the width gives 0, or the sign."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(by, bits - 1).astype(a.dtype)
    if is_left:
        return np.where(by >= bits, a.dtype.type(0), np.left_shift(a, amount))
    is_signed = np.issubdtype(a.dtype, np.signedinteger)
    return np.right_shift(a, amount) if is_signed else np.where(by >= bits, a.dtype.type(0), np.right_shift(a, amount))


def fused(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c, rounded once: the product of two fp32 numbers is exact in fp64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def permuted(a: Array, b: Array, selectors: Array) -> Array:
    """Return prmt: the low three bits of a selector choose each of four bytes from the eight of a and b, or copies of its sign."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros(len(a), np.uint32)
    for byte in range(4):
        selector = selectors.astype(np.uint64) >> np.uint64(4 * byte)
        picked = (pool >> (selector & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
        sign = np.where(picked & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        chosen = np.where(selector & np.uint64(8), sign, picked).astype(np.uint32)
        found |= chosen << np.uint32(8 * byte)
    return found


def reversed_bits(a: Array) -> Array:
    v = a.astype(np.uint32)
    for step, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        v = (v >> np.uint32(step) & np.uint32(mask)) | (v & np.uint32(mask)) << np.uint32(step)
    return v


def leading_zeros(a: Array) -> Array:
    """Reverse 32 bits."""
    exponent = np.frexp(a.astype(np.uint32).astype(np.float64))[1]
    return (32 - exponent).astype(np.uint32)


def highest_bit(a: Array) -> Array:
    """Return the shift that moves the highest set bit to the top (bfind.shiftamt); all ones if there is none."""
    return np.where(a == 0, np.uint32(0xFFFFFFFF), leading_zeros(a))


BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "lg2": np.log2, "tanh": np.tanh,
}  # fmt: skip
UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "not": np.invert, "abs": np.abs, "brev": reversed_bits, "bfind": highest_bit, "clz": leading_zeros,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def smallest_or_largest(a: Array, b: Array, name: str) -> Array:
    if np.issubdtype(a.dtype, np.floating):  # NaN is ignored
        return np.fmin(a, b) if name == "min" else np.fmax(a, b)
    return np.minimum(a, b) if name == "min" else np.maximum(a, b)


def product(instruction: Instruction, a: Array, b: Array, c: Array | None) -> Array:
    """Return the result of mul or mad: the low half, the high half, or all bits; floats rounded."""
    opcode = instruction.opcode
    if instruction.kind[0] == "f":
        return np.multiply(a, b) if c is None else fused(a, b, c)
    if "wide" in opcode:
        kind = instruction.kind[0] + str(16 * SIZES[instruction.kind])
        result = a.astype(numpy_type(kind)) * b.astype(numpy_type(kind))
    elif "hi" in opcode:
        bits = 8 * SIZES[instruction.kind]
        result = (a.astype(object) * b.astype(object) >> bits).astype(a.dtype)
    else:
        result = a * b
    return result if c is None else result + c


def compared(instruction: Instruction, a: Array, b: Array) -> Array:
    """Return the result of setp: with NaN, unordered comparisons of floats are true, the others false."""
    name = instruction.opcode[1]
    is_float = instruction.kind[0] == "f"
    unordered = np.isnan(a) | np.isnan(b) if is_float else np.zeros(len(a), np.bool_)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if is_float and name not in COMPARISONS:  # ltu, geu, ...
        return COMPARISONS[name[:2]](a, b) | unordered
    return COMPARISONS[name](a, b) & ~unordered


def converted(instruction: Instruction, x: Array) -> Array:
    """Return the result of cvt of one value; `x` has the source's type, bf16 as bits."""
    target, source = instruction.opcode[-2], instruction.opcode[-1]
    if target == "bf16":
        return to_bfloat16(x)
    if source == "bf16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    rounding = next((ROUNDINGS[part] for part in instruction.opcode if part in ROUNDINGS), None)
    if source[0] == "f" and rounding is not None:
        x = rounding(x)
    if source[0] == "f" and target[0] != "f" and rounding is None:
        raise PtxError(f"a rounding that this interpreter does not support: {instruction.text}")
    return x.astype(numpy_type(target))
