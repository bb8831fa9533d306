"""The kernels that go over numbers one by one: arrays over the memory of tensors, BF16 as int16.

T rows or tokens; other letters as in the files that call them.
"""

import numpy as np

from model.kernels.jit import EXACT, SUMS, exact_helper, helper, kernel
from model.kernels.scalars import ONE, as_bits, as_float, exp, load, narrow, rounded, scaled, wide

TILE = 128
INFINITY, NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)
"""Their bits."""
E4M3_LARGEST, SMALLEST_SCALE = np.float32(448), np.float32(2.0**-126)
SUBNORMAL_ROUNDER = np.float32(2.0**14)
"""Added, it rounds a number below 2^-6 to multiples of 2^-9, which are then the last bits."""


@helper
def copied(x, y):
    """To what ``y`` stores."""
    for i in range(len(y)):
        y[i] = rounded(load(x[i]), y[i])


@helper
def turned(x, turn, y):
    """Pairs of BF16, each turned and rounded to BF16; ``turn`` has a cosine and a sine for each."""
    for p in range(len(turn)):
        a, b = wide(x[2 * p]), wide(x[2 * p + 1])
        y[2 * p] = rounded(wide(narrow(a * turn[p, 0] - b * turn[p, 1])), y[2 * p])
        y[2 * p + 1] = rounded(wide(narrow(a * turn[p, 1] + b * turn[p, 0])), y[2 * p + 1])


@helper
def turned_back(x, turn, y):
    """Pairs turned the other way, in BF16."""
    for p in range(len(turn)):
        a, b = load(x[2 * p]), load(x[2 * p + 1])
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
    " float32[:,:,::1], float32[:,:,::1], float32[:,:,::1])",
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,:,::1])",
)
def core_inputs_forward(query_THK, keys_values_THX, rope_TR, turns, first, nope, q_THK, k_THK, v_THW):
    tokens, heads, width = query_THK.shape
    values, rope = keys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        turned(rope_TR[t], turn, rope)
        for h in range(heads):
            copied(query_THK[t, h, :nope], q_THK[t, h, :nope])
            copied(keys_values_THX[t, h, :nope], k_THK[t, h, :nope])
            turned(query_THK[t, h, nope:], turn, q_THK[t, h, nope:])
            copied(rope, k_THK[t, h, nope:])
            copied(keys_values_THX[t, h, nope:], v_THW[t, h, :values])
            v_THW[t, h, values:] = 0


@kernel(
    "void(float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])",
    "void(int16[:,:,::1], int16[:,:,::1], int16[:,:,::1], float32[:,:,::1], int64, int64,"
    " int16[:,:,::1], int16[:,:,::1], int16[:,::1])",
)
def core_inputs_backward(gq_THK, gk_THK, gv_THW, turns, first, nope, gquery_THK, gkeys_values_THX, grope_TR):
    tokens, heads, width = gq_THK.shape
    values, total = gkeys_values_THX.shape[2] - nope, np.empty(width - nope, np.float32)
    for t in range(tokens):
        turn = turns[(first + t) % len(turns)]
        total[:] = 0
        for h in range(heads):
            copied(gq_THK[t, h, :nope], gquery_THK[t, h, :nope])
            copied(gk_THK[t, h, :nope], gkeys_values_THX[t, h, :nope])
            copied(gv_THW[t, h, :values], gkeys_values_THX[t, h, nope:])
            turned_back(gq_THK[t, h, nope:], turn, gquery_THK[t, h, nope:])
            gk = gk_THK[t, h, nope:]
            for r in range(len(gk)):
                total[r] += load(gk[r])
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
