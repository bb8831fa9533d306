"""The kernels of E4M3: arrays over the memory of tensors, codes as bytes, BF16 as int16.

They are imported when FP8 is chosen, for compiling them takes seconds.
"""

import numpy as np

from model.fp8 import SIZE
from model.kernels.jit import EXACT, exact_helper, kernel
from model.kernels.scalars import ONE, as_bits, as_float, load

INFINITY, NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)
"""Their bits."""
E4M3_LARGEST, SMALLEST_SCALE = np.float32(448), np.float32(2.0**-126)
SUBNORMAL_ROUNDER = np.float32(2.0**14)
"""Added, it rounds a number below 2^-6 to multiples of 2^-9, which are then the last bits."""


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
            start, stop = tile * SIZE, min((tile + 1) * SIZE, width)
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
            start, stop, scale = tile * SIZE, min((tile + 1) * SIZE, width), scales_XY[tile_T[t], tile]
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
