"""The kernels themselves, over the memory of tensors: arrays, BF16 as int16.

All of them are in one file, with every function that they call: Numba keeps compiled code as long as the file of a
kernel stays as it is, and looks at no other.

T rows or tokens; other letters as in the files that call them.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

ONE = np.float32(1)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2.0**23)
"""Added and taken away again, it rounds a small FP32 number to a whole one."""
TILE = 128
INFINITY, NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)
"""Their bits."""
E4M3_LARGEST, SMALLEST_SCALE = np.float32(448), np.float32(2.0**-126)
SUBNORMAL_ROUNDER = np.float32(2.0**14)
"""Added, it rounds a number below 2^-6 to multiples of 2^-9, which are then the last bits."""

EXACT: set[str] = set()
"""Every operation rounds as written."""
FUSED = {"contract"}
"""A product may be fused with the sum that follows."""
SUMS = {"contract", "reassoc", "nsz"}
"""And a loop may add in the order that its vectors want."""

helper = numba.njit(fastmath=FUSED, error_model="numpy")
"""A function that kernels call. It keeps the order of its sums whatever the kernel may do with its own."""
exact_helper = numba.njit(error_model="numpy")


def kernel(*signatures: str, may: set[str] = FUSED) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for this CPU, once for each machine: the code is kept beside the source, or in the user's cache."""
    options: dict[str, Any] = {"nogil": True, "fastmath": may or False, "error_model": "numpy"}

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(list(signatures), cache=True, **options)(function)
        except Exception:
            # Nothing to keep it in, no room, or a damaged file: compile in each process. What is wrong with the
            # function itself is raised again.
            return numba.njit(list(signatures), **options)(function)

    return compiled


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


@helper
def widened(x, y):
    for i in range(len(y)):
        y[i] = wide(x[i])


@helper
def narrowed(x, y):
    for i in range(len(y)):
        y[i] = narrow(x[i])


@helper
def turned(x, turn, y):
    """Pairs of BF16, each turned and rounded to BF16, in FP32; ``turn`` has a cosine and a sine for each."""
    for p in range(len(turn)):
        a, b = wide(x[2 * p]), wide(x[2 * p + 1])
        y[2 * p] = wide(narrow(a * turn[p, 0] - b * turn[p, 1]))
        y[2 * p + 1] = wide(narrow(a * turn[p, 1] + b * turn[p, 0]))


@helper
def turned_back(x, turn, y):
    """Pairs of FP32, turned the other way, in BF16."""
    for p in range(len(turn)):
        a, b = x[2 * p], x[2 * p + 1]
        y[2 * p] = narrow(a * turn[p, 0] + b * turn[p, 1])
        y[2 * p + 1] = narrow(b * turn[p, 0] - a * turn[p, 1])


@kernel(
    "void(int16[:,::1], float32[::1], int16[:,::1])",
    "void(float32[:,::1], float32[::1], float32[:,::1])",
)
def swiglu_forward(x_T2F, weights_T, y_TF):
    rows, width = y_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        for f in range(width):
            gate, up = load(x_T2F[t, f]), load(x_T2F[t, width + f])
            y_TF[t, f] = rounded(gate / (ONE + exp(-gate)) * up * weight, y_TF[t, f])


@kernel(
    "void(int16[:,::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])",
    "void(float32[:,::1], float32[::1], float32[:,::1], int16[:,::1], float32[::1])",
    may=SUMS,
)
def swiglu_backward(x_T2F, weights_T, gy_TF, gx_T2F, gweights_T):
    rows, width = gy_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        gweight = np.float32(0)
        for f in range(width):
            gate, up, gy = load(x_T2F[t, f]), load(x_T2F[t, width + f]), load(gy_TF[t, f])
            sigmoid = ONE / (ONE + exp(-gate))
            silu = gate * sigmoid
            gweight += silu * (gy * up)
            gx_T2F[t, f] = narrow(gy * up * weight * sigmoid * (ONE + gate * (ONE - sigmoid)))
            gx_T2F[t, width + f] = narrow(silu * weight * gy)
        if weighted:
            gweights_T[t] = gweight


@kernel("void(int16[:,::1], float32[::1], float32, int16[:,::1], float32[::1])", may=SUMS)
def norm_forward(x_TD, weight_D, eps, y_TD, scale_T):
    rows, width = x_TD.shape
    for t in range(rows):
        total = np.float32(0)
        for d in range(width):
            total += wide(x_TD[t, d]) * wide(x_TD[t, d])
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for d in range(width):
            y_TD[t, d] = narrow(scaled(wide(x_TD[t, d]), scale, weight_D[d]))
        scale_T[t] = scale


@kernel("void(int16[:,::1], float32[::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])", may=SUMS)
def norm_backward(x_TD, weight_D, scale_T, gy_TD, gx_TD, gweight_D):
    """gx = scale · (gy w - x · scale² · mean(gy w x)), gw += sum over rows of gy x · scale."""
    rows, width = x_TD.shape
    for t in range(rows):
        scale, total = scale_T[t], np.float32(0)
        for d in range(width):
            product = wide(gy_TD[t, d]) * wide(x_TD[t, d])
            total += product * weight_D[d]
            gweight_D[d] += product * scale
        mean = total / np.float32(width) * scale * scale * scale
        for d in range(width):
            gx_TD[t, d] = narrow(wide(gy_TD[t, d]) * weight_D[d] * scale - wide(x_TD[t, d]) * mean)


@kernel(
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,::1], float32[:,:,::1], int64, int64,"
    " float32[:,:,::1], float32[:,:,::1], float32[:,:,::1])"
)
def core_inputs_forward(query_THK, keys_values_THX, rope_TR, turns, first, nope, q_THK, k_THK, v_THW):
    tokens, heads, width = query_THK.shape
    values, rope = keys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        turned(rope_TR[t], turn, rope)
        for h in range(heads):
            widened(query_THK[t, h, :nope], q_THK[t, h, :nope])
            widened(keys_values_THX[t, h, :nope], k_THK[t, h, :nope])
            turned(query_THK[t, h, nope:], turn, q_THK[t, h, nope:])
            k_THK[t, h, nope:] = rope
            widened(keys_values_THX[t, h, nope:], v_THW[t, h, :values])
            v_THW[t, h, values:] = 0


@kernel(
    "void(float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])"
)
def core_inputs_backward(gq_THK, gk_THK, gv_THW, turns, first, nope, gquery_THK, gkeys_values_THX, grope_TR):
    tokens, heads, width = gq_THK.shape
    values, total = gkeys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        total[:] = 0
        for h in range(heads):
            narrowed(gq_THK[t, h, :nope], gquery_THK[t, h, :nope])
            narrowed(gk_THK[t, h, :nope], gkeys_values_THX[t, h, :nope])
            narrowed(gv_THW[t, h, :values], gkeys_values_THX[t, h, nope:])
            turned_back(gq_THK[t, h, nope:], turn, gquery_THK[t, h, nope:])
            gk = gk_THK[t, h, nope:]
            for r in range(len(gk)):
                total[r] += gk[r]
        turned_back(total, turn, grope_TR[t])


@exact_helper
def magnitude(x: np.float32) -> np.uint32:
    """The bits of |x|, in whose order numbers, infinity and NaN follow each other."""
    return as_bits(x) & np.uint32(0x7FFFFFFF)


@exact_helper
def tile_scale(largest: np.uint32, power_of_two: bool) -> np.float32:
    """``model.fp8.quantise.scale_of`` of a tile in E4M3; the bits of the largest magnitude."""
    amax = as_float(largest)
    scale = max(amax / E4M3_LARGEST, SMALLEST_SCALE)
    if power_of_two:
        scale = as_float((as_bits(scale) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000))
    return scale if largest < INFINITY else as_float(NAN)


@exact_helper
def e4m3(x: np.float32) -> np.uint8:
    """The code of the nearest number, ties to even: |x| up to 448 and its rounding, or NaN."""
    bits, sign = magnitude(x), (as_bits(x) >> np.uint32(24)) & np.uint32(0x80)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    normal = ((bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32(120 << 3)
    subnormal = as_bits(as_float(bits) + SUBNORMAL_ROUNDER) - as_bits(SUBNORMAL_ROUNDER)
    code = subnormal if bits < np.uint32(121 << 23) else normal
    return np.uint8(code | sign if bits <= INFINITY else np.uint32(0x7F))


@exact_helper
def from_e4m3(code: np.uint8) -> np.float32:
    """The number; 480 for NaN, which a tile keeps in its scale."""
    bits = np.uint32(code) & np.uint32(0x7F)
    normal = as_float((bits << np.uint32(20)) + np.uint32(120 << 23))
    number = np.float32(np.int32(bits)) * np.float32(2.0**-9) if bits < np.uint32(8) else normal
    return as_float(as_bits(number) | ((np.uint32(code) & np.uint32(0x80)) << np.uint32(24)))


@kernel(
    "void(int16[:,::1], boolean, uint8[:,::1], float32[:,::1])",
    "void(float32[:,::1], boolean, uint8[:,::1], float32[:,::1])",
    may=EXACT,
)
def quantise_rows(x_TD, power_of_two, stored_TD, scales_TY):
    """In tiles of 1 x 128."""
    rows, width = x_TD.shape
    for t in range(rows):
        for tile in range(scales_TY.shape[1]):
            start, stop = tile * TILE, min((tile + 1) * TILE, width)
            x, stored, largest = x_TD[t, start:stop], stored_TD[t, start:stop], np.uint32(0)
            for d in range(len(x)):
                largest = max(largest, magnitude(load(x[d])))
            scale = tile_scale(largest, power_of_two)
            inverse = ONE / scale
            for d in range(len(x)):
                stored[d] = e4m3(load(x[d]) * inverse)
            scales_TY[t, tile] = scale


@kernel(
    "void(int16[:,::1], int64[::1], int64[::1], boolean, uint8[:,::1], float32[:,::1])",
    "void(float32[:,::1], int64[::1], int64[::1], boolean, uint8[:,::1], float32[:,::1])",
    may=EXACT,
)
def quantise_columns(x_TD, start_X, stop_X, power_of_two, stored_TD, scales_XD):
    """In tiles of one column and the rows from ``start_X`` to ``stop_X``."""
    width = x_TD.shape[1]
    largest, inverse = np.empty(width, np.uint32), np.empty(width, np.float32)
    for tile in range(len(start_X)):
        largest[:] = 0
        for t in range(start_X[tile], stop_X[tile]):
            for d in range(width):
                largest[d] = max(largest[d], magnitude(load(x_TD[t, d])))
        for d in range(width):
            scales_XD[tile, d] = tile_scale(largest[d], power_of_two)
            inverse[d] = ONE / scales_XD[tile, d]
        for t in range(start_X[tile], stop_X[tile]):
            for d in range(width):
                stored_TD[t, d] = e4m3(load(x_TD[t, d]) * inverse[d])


@kernel("void(uint8[:,::1], int64[::1], float32[:,::1], float32[:,::1])", may=EXACT)
def widen_rows(stored_TD, tile_T, scales_XY, x_TD):
    """From tiles 128 columns wide; ``tile_T``: the row of tiles in which each row is."""
    rows, width = x_TD.shape
    for t in range(rows):
        for tile in range(scales_XY.shape[1]):
            start, stop, scale = tile * TILE, min((tile + 1) * TILE, width), scales_XY[tile_T[t], tile]
            stored, x = stored_TD[t, start:stop], x_TD[t, start:stop]
            for d in range(len(x)):
                x[d] = from_e4m3(stored[d]) * scale


@kernel("void(uint8[:,::1], int64[::1], float32[:,::1], float32[:,::1])", may=EXACT)
def widen_columns(stored_TD, tile_T, scales_XD, x_TD):
    """From tiles one column wide."""
    rows, width = x_TD.shape
    for t in range(rows):
        tile = tile_T[t]
        for d in range(width):
            x_TD[t, d] = from_e4m3(stored_TD[t, d]) * scales_XD[tile, d]
