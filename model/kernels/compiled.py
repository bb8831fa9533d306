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
from numba.extending import intrinsic

ONE = np.float32(1)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2.0**23)
"""Added and taken away again, it rounds a small FP32 number to a whole one."""

helper = numba.njit(fastmath={"contract"}, error_model="numpy")
"""A function that kernels call. It keeps the order of its sums whatever the kernel may do with its own."""


def kernel(signature: str, sums: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for this CPU, once for each machine: the code is kept beside the source, or in the user's cache. A
    product may be fused with the sum that follows; ``sums``: a loop may add in the order that its vectors want."""
    allowed = {"contract", "reassoc", "nsz"} if sums else {"contract"}
    options: dict[str, Any] = {"nogil": True, "fastmath": allowed, "error_model": "numpy"}

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cache" not in str(error):
                raise
            return numba.njit(signature, **options)(function)  # no folder to write to: compile in each process

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


@helper
def exp(x: np.float32) -> np.float32:
    """e^x within 1e-7 relative, held at e^-87 and e^88: e^x = 2^n e^r, n whole, |r| <= ln 2 / 2, and e^r by the
    polynomial of the Cephes library."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = (x * LOG2_E + ROUNDER) - ROUNDER
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@helper
def _turn(a: np.float32, b: np.float32, cosine: np.float32, sine: np.float32) -> tuple[np.float32, np.float32]:
    return a * cosine - b * sine, a * sine + b * cosine


@kernel("void(int16[:,::1], float32[::1], int16[:,::1])")
def swiglu_forward(x_T2F, weights_T, y_TF):
    rows, width = y_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        for f in range(width):
            gate, up = wide(x_T2F[t, f]), wide(x_T2F[t, width + f])
            y_TF[t, f] = narrow(gate / (ONE + exp(-gate)) * up * weight)


@kernel("void(int16[:,::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])", sums=True)
def swiglu_backward(x_T2F, weights_T, gy_TF, gx_T2F, gweights_T):
    rows, width = gy_TF.shape
    weighted = len(weights_T) > 0
    for t in range(rows):
        weight = weights_T[t] if weighted else ONE
        gweight = np.float32(0)
        for f in range(width):
            gate, up, gy = wide(x_T2F[t, f]), wide(x_T2F[t, width + f]), wide(gy_TF[t, f])
            sigmoid = ONE / (ONE + exp(-gate))
            silu = gate * sigmoid
            gweight += silu * (gy * up)
            gx_T2F[t, f] = narrow(gy * up * weight * sigmoid * (ONE + gate * (ONE - sigmoid)))
            gx_T2F[t, width + f] = narrow(silu * weight * gy)
        if weighted:
            gweights_T[t] = gweight


@kernel("void(int16[:,::1], float32[::1], float32, int16[:,::1], float32[::1])", sums=True)
def norm_forward(x_TD, weight_D, eps, y_TD, scale_T):
    rows, width = x_TD.shape
    for t in range(rows):
        total = np.float32(0)
        for d in range(width):
            total += wide(x_TD[t, d]) * wide(x_TD[t, d])
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for d in range(width):
            y_TD[t, d] = narrow(wide(x_TD[t, d]) * scale * weight_D[d])
        scale_T[t] = scale


@kernel("void(int16[:,::1], float32[::1], float32[::1], int16[:,::1], int16[:,::1], float32[::1])", sums=True)
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
    values = keys_values_THX.shape[2] - nope
    rope = np.empty(width - nope, np.float32)
    for t in range(tokens):
        place = (first + t) % len(turns)
        for p in range((width - nope) // 2):
            a, b = _turn(wide(rope_TR[t, 2 * p]), wide(rope_TR[t, 2 * p + 1]), turns[place, p, 0], turns[place, p, 1])
            rope[2 * p], rope[2 * p + 1] = wide(narrow(a)), wide(narrow(b))
        for h in range(heads):
            for i in range(nope):
                q_THK[t, h, i] = wide(query_THK[t, h, i])
            for i in range(nope):
                k_THK[t, h, i] = wide(keys_values_THX[t, h, i])
            for p in range((width - nope) // 2):
                i, cosine, sine = nope + 2 * p, turns[place, p, 0], turns[place, p, 1]
                a, b = _turn(wide(query_THK[t, h, i]), wide(query_THK[t, h, i + 1]), cosine, sine)
                q_THK[t, h, i], q_THK[t, h, i + 1] = wide(narrow(a)), wide(narrow(b))
            for i in range(width - nope):
                k_THK[t, h, nope + i] = rope[i]
            for i in range(values):
                v_THW[t, h, i] = wide(keys_values_THX[t, h, nope + i])
            for i in range(values, v_THW.shape[2]):
                v_THW[t, h, i] = np.float32(0)


@kernel(
    "void(float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])"
)
def core_inputs_backward(gq_THK, gk_THK, gv_THW, turns, first, nope, gquery_THK, gkeys_values_THX, grope_TR):
    tokens, heads, width = gq_THK.shape
    values = gkeys_values_THX.shape[2] - nope
    for t in range(tokens):
        place = (first + t) % len(turns)
        for p in range((width - nope) // 2):
            i, cosine, sine = nope + 2 * p, turns[place, p, 0], -turns[place, p, 1]
            a_sum, b_sum = np.float32(0), np.float32(0)
            for h in range(heads):
                a, b = _turn(gq_THK[t, h, i], gq_THK[t, h, i + 1], cosine, sine)
                gquery_THK[t, h, i], gquery_THK[t, h, i + 1] = narrow(a), narrow(b)
                a_sum += gk_THK[t, h, i]
                b_sum += gk_THK[t, h, i + 1]
            a, b = _turn(a_sum, b_sum, cosine, sine)
            grope_TR[t, 2 * p], grope_TR[t, 2 * p + 1] = narrow(a), narrow(b)
        for h in range(heads):
            for i in range(nope):
                gquery_THK[t, h, i] = narrow(gq_THK[t, h, i])
                gkeys_values_THX[t, h, i] = narrow(gk_THK[t, h, i])
            for i in range(values):
                gkeys_values_THX[t, h, nope + i] = narrow(gv_THW[t, h, i])
