"""Single numbers: what kernels do with each."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from model.kernels.jit import helper

ONE = np.float32(1)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2.0**23)
"""Added and taken away again, it rounds a small FP32 number to a whole one."""


@intrinsic
def as_float(_: Any, bits: Any) -> Any:
    """The FP32 number with these 32 bits."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def as_bits(_: Any, number: Any) -> Any:
    """The 32 bits of an FP32 number."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@helper
def wide(number: np.int16) -> np.float32:
    """BF16 -> FP32: its upper half."""
    return as_float(np.uint32(number) << np.uint32(16))


@helper
def narrow(x: np.float32) -> np.int16:
    """FP32 -> BF16, to nearest, ties to even. NaN stays."""
    bits = as_bits(x)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.int16(rounded) if x == x else np.int16(0x7FC0)


def load(number):
    """An element of an array in FP32 or BF16 -> FP32."""


@overload(load)
def _load(number):
    return (lambda number: wide(number)) if number == types.int16 else lambda number: number


def rounded(x, like):
    """FP32 -> what an array with such elements stores."""


@overload(rounded)
def _rounded(x, like):
    return (lambda x, like: narrow(x)) if like == types.int16 else lambda x, like: x


@helper
def exp(x: np.float32) -> np.float32:
    """e^x within 1e-7 relative, held at e^-87 and infinite beyond e^88: e^x = 2^n e^r, n whole, |r| <= ln 2 / 2, and
    e^r by the polynomial of the Cephes library."""
    infinite, x = x > np.float32(88.0), min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = (x * LOG2_E + ROUNDER) - ROUNDER
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = p * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
    return np.float32(np.inf) if infinite else power


@helper
def scaled(x: np.float32, scale: np.float32, weight: np.float32) -> np.float32:
    """In this order: the product of the last two may leave the range of FP32."""
    return x * scale * weight
