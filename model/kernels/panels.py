"""Products of BF16 matrices from ``registers``' tiles: operands packed into panels of 32 columns, and their product.

M rows of the left operand, N panels, P pairs of the sum, J = 32 columns.
"""

from collections.abc import Callable

import numpy as np

from model.kernels.calls import by_rows
from model.kernels.jit import helper
from model.kernels.registers import COLUMNS, ROWS, interleave, tile1, tile2, tile4, tile8, tile12, transpose

PAIR = 4
"""Bytes."""
LANES = 16


def by_panels(columns: int, rows: int, run: Callable[[int, int], None]) -> None:
    """``run`` from a panel to a later one, of a result with so many columns and rows: threads share the panels."""
    by_rows(-(-columns // COLUMNS), COLUMNS * rows, run)


@helper
def address(x):
    return np.uint64(x.ctypes.data)


@helper
def pair_of(low, high):
    return np.int32(np.uint32(np.uint16(low)) | (np.uint32(np.uint16(high)) << np.uint32(16)))


@helper
def panels_of(columns):
    return (columns + COLUMNS - 1) // COLUMNS


@helper
def pack_rows(x_RD, first, b_NPJ):
    """A right operand [R, D] whose sum runs over its rows: pairs of rows, a last one without its other half with zeros.
    The panels from ``first`` on."""
    rows, width = x_RD.shape
    for n in range(b_NPJ.shape[0]):
        start, stop = COLUMNS * (first + n), min(COLUMNS * (first + n + 1), width)
        for p in range((rows + 1) // 2):
            if stop - start == COLUMNS and 2 * p + 1 < rows:
                interleave(address(x_RD[2 * p, start:]), address(x_RD[2 * p + 1, start:]), address(b_NPJ[n, p]))
                continue
            for j in range(COLUMNS):
                there = start + j < stop
                low = x_RD[2 * p, start + j] if there else np.int16(0)
                high = x_RD[2 * p + 1, start + j] if there and 2 * p + 1 < rows else np.int16(0)
                b_NPJ[n, p, j] = pair_of(low, high)


@helper
def pack_columns(w_FD, first, b_NPJ):
    """A right operand [F, D] that is multiplied transposed, D even: pairs of each row. The panels from ``first`` on."""
    rows, pairs = w_FD.shape[0], w_FD.shape[1] // 2
    for n in range(b_NPJ.shape[0]):
        start, whole = COLUMNS * (first + n), 0
        if rows - start >= COLUMNS:
            whole = pairs // LANES * LANES
            for p in range(0, whole, LANES):
                for half in range(0, COLUMNS, LANES):
                    transpose(
                        address(w_FD[start + half, 2 * p :]),
                        w_FD.strides[0],
                        address(b_NPJ[n, p, half:]),
                        PAIR * COLUMNS,
                    )
        for p in range(whole, pairs):
            for j in range(COLUMNS):
                there = start + j < rows
                b_NPJ[n, p, j] = pair_of(w_FD[start + j, 2 * p], w_FD[start + j, 2 * p + 1]) if there else 0


@helper
def tile(left, a, row, pair, pairs, b, c):
    """As many rows as one tile takes of those ``left``: their number."""
    if left >= ROWS:
        tile12(a, row, pair, pairs, b, c)
        return 12
    if left >= 8:
        tile8(a, row, pair, pairs, b, c)
        return 8
    if left >= 4:
        tile4(a, row, pair, pairs, b, c)
        return 4
    if left >= 2:
        tile2(a, row, pair, pairs, b, c)
        return 2
    tile1(a, row, pair, pairs, b, c)
    return 1


@helper
def tile_of_rows(x_RD, row, left, pairs, b_PJ, c_MJ):
    """The product of as many rows from ``row`` on, of those ``left``, as one tile takes, with a panel: their number."""
    a = address(x_RD[row:])
    return tile(left, a, x_RD.strides[0], PAIR, pairs, address(b_PJ), address(c_MJ))


@helper
def tile_of_packed(a_NPJ, row, rows, pairs, b_PJ, c_MJ):
    """The same of a left operand that is packed as right ones are, by ``pack_rows``, and has ``rows`` in all."""
    left, a = min(rows - row, COLUMNS - row % COLUMNS), address(a_NPJ[row // COLUMNS, 0, row % COLUMNS :])
    return tile(left, a, PAIR, PAIR * COLUMNS, pairs, address(b_PJ), address(c_MJ))
