"""Products of BF16 in the registers of a CPU with AVX512_BF16, written as LLVM's instructions.

Its instruction adds the products of two pairs of BF16 numbers to an FP32 number, sixteen at a time. So a product's sum
runs over pairs: the left operand gives one pair a row, wherever it stands, and the right one 32 pairs that lie side by
side, which ``interleave`` and ``transpose`` put there. Sums are in FP32, and subnormal numbers count as zero. The bits
of a row do not depend on the rows beside it.

P pairs, J = 32 columns. Addresses are in bytes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from model.kernels.jit import instructions

COLUMNS = 32
ROWS = 12
"""Of the largest tile: 24 registers of sums, and eight for what is multiplied."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES = 16


class _BF16(ir.Type):
    """LLVM's type, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


_INTS, _FLOATS, _PAIRS = (ir.VectorType(t, n) for t, n in ((_I32, _LANES), (_F32, _LANES), (_BF16(), 2 * _LANES)))
_SHORTS = ir.VectorType(ir.IntType(16), 2 * _LANES)
_ADDRESS, _COUNT = types.uint64, types.int64


@cache
def available() -> bool:
    """Whether this CPU multiplies BF16 fastest so. One with AMX does it faster in torch's own products."""
    return "+avx512bf16" in instructions() and not torch.cpu._is_amx_tile_supported()


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _load(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), kind.as_pointer()), align=2)


def _store(builder: Any, value: Any, address: Any, offset: Any) -> None:
    builder.store(value, builder.inttoptr(builder.add(address, offset), value.type.as_pointer()), align=2)


def _tile(rows: int) -> Callable[..., Any]:
    """c [rows, 32] = a b: ``rows`` x 2 registers of sums. Row m has its pair p at ``a + m * row + p * pair``, and the
    right operand its 32 at ``b + 128 p``; at least one pair. ``c``: FP32, one row after the other."""

    @intrinsic
    def tile(_: Any, a: Any, row: Any, pair: Any, pairs: Any, b: Any, c: Any) -> Any:
        def generate(__: Any, builder: Any, ___: Any, values: Any) -> None:
            a, row, pair, pairs, b, c = values
            name, module = "llvm.x86.avx512bf16.dpbf16ps.512", builder.module
            add_products = module.globals.get(name) or ir.Function(
                module, ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]), name
            )
            start_M = [builder.add(a, builder.mul(row, _I64(m))) for m in range(rows)]
            before, loop, after = builder.block, *(builder.append_basic_block(of) for of in ("pairs", "sums"))
            builder.branch(loop)

            builder.position_at_end(loop)
            done, a_offset, b_offset = (builder.phi(_I64) for _ in range(3))
            sums = [builder.phi(_FLOATS) for _ in range(2 * rows)]
            right = [_load(builder, b, builder.add(b_offset, _I64(64 * half)), _PAIRS) for half in range(2)]
            added = []
            for m, start in enumerate(start_M):
                one = builder.insert_element(
                    ir.Constant(_INTS, ir.Undefined), _load(builder, start, a_offset, _I32), _I32(0)
                )
                left = builder.bitcast(_shuffle(builder, one, one, [0] * _LANES), _PAIRS)
                added += [builder.call(add_products, [sums[2 * m + half], left, right[half]]) for half in range(2)]
            following = [
                (done, _I64(0), builder.add(done, _I64(1))),
                (a_offset, _I64(0), builder.add(a_offset, pair)),
                (b_offset, _I64(0), builder.add(b_offset, _I64(4 * COLUMNS))),
                *((of, ir.Constant(_FLOATS, None), then) for of, then in zip(sums, added, strict=True)),
            ]
            for phi, first, then in following:
                phi.add_incoming(first, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", following[0][2], pairs), loop, after)

            builder.position_at_end(after)
            for n, total in enumerate(added):
                _store(builder, total, c, _I64(4 * _LANES * n))

        return types.void(_ADDRESS, _COUNT, _COUNT, _COUNT, _ADDRESS, _ADDRESS), generate

    tile_of: Callable[..., Any] = tile
    return tile_of


tile12, tile8, tile4, tile2, tile1 = (_tile(rows) for rows in (ROWS, 8, 4, 2, 1))


@intrinsic
def interleave(_: Any, low: Any, high: Any, out: Any) -> Any:
    """32 numbers of each of two rows -> 32 pairs."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> None:
        low, high, out = values
        a, b = (_load(builder, of, _I64(0), _SHORTS) for of in (low, high))
        for half in range(2):
            lanes = [lane for n in range(_LANES) for lane in (_LANES * half + n, COLUMNS + _LANES * half + n)]
            _store(builder, _shuffle(builder, a, b, lanes), out, _I64(64 * half))

    return types.void(_ADDRESS, _ADDRESS, _ADDRESS), generate


@intrinsic
def transpose(_: Any, x: Any, row: Any, out: Any, out_row: Any) -> Any:
    """16 rows of 16 pairs each -> 16 rows of one pair of each."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> None:
        x, row, out, out_row = values
        rows = [_load(builder, x, builder.mul(row, _I64(n)), _INTS) for n in range(_LANES)]
        for bit in (1, 2, 4, 8):
            low = [lane if not lane & bit else _LANES + lane - bit for lane in range(_LANES)]
            high = [lane + bit if not lane & bit else _LANES + lane for lane in range(_LANES)]
            for n in (n for n in range(_LANES) if not n & bit):
                a, b = rows[n], rows[n + bit]
                rows[n], rows[n + bit] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        for n, value in enumerate(rows):
            _store(builder, value, out, builder.mul(out_row, _I64(n)))

    return types.void(_ADDRESS, _COUNT, _ADDRESS, _COUNT), generate
