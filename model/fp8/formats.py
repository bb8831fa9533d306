"""The two narrow floating-point formats, and how a number is rounded to them.

    E4M3   8 bits: 4 of exponent, 3 of mantissa, largest 448; every operand of a product     (torch.float8_e4m3fn)
    E5M6  12 bits: 5 of exponent, 6 of mantissa, largest 65024; a stored copy               (DeepSeek-V3 report, 3.3.3)

E4M3 has NaN and no infinity. E5M6 is what remains of FP16 without its last four bits, infinity and NaN included; two
of its numbers take three bytes. Both round to nearest, ties to even, and have subnormal numbers. Any NaN is stored as
one code, 0x7F and 0x7E0: which sign and payload arithmetic gives a NaN differs between machines.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """``largest``: the greatest finite number; ``smallest_exponent``: of the normal numbers, 2 to this power."""

    name: str
    bits: int
    mantissa_bits: int
    smallest_exponent: int
    largest: float

    @property
    def dtype(self) -> torch.dtype:
        """Of stored numbers."""
        return torch.float8_e4m3fn if self.bits == 8 else torch.uint8

    def stored_width(self, width: int) -> int:
        """How many of ``dtype`` store so many numbers of a row."""
        return width if self.bits == 8 else 3 * -(-width // 2)


E4M3 = Format("E4M3", bits=8, mantissa_bits=3, smallest_exponent=-6, largest=448.0)
E5M6 = Format("E5M6", bits=12, mantissa_bits=6, smallest_exponent=-14, largest=65024.0)


def round_to(x: Tensor, to: Format) -> Tensor:
    """The definition: the nearest number of the format, as FP32. ``x``: FP32, at most ``largest`` up to its own
    rounding; NaN stays."""
    exponent = torch.frexp(x).exponent - 1  # |x| is in [2^exponent, 2^(exponent + 1))
    unit = torch.ldexp(torch.ones_like(x), exponent.clamp_min(to.smallest_exponent) - to.mantissa_bits)
    return torch.round(x / unit) * unit


def encode(x: Tensor, to: Format) -> Tensor:
    """Round FP32 numbers, at most ``largest`` up to their own rounding, and store them: [..., D] -> [..., stored
    width]."""
    x = x.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN; ten times as fast as a mask
    return x.to(to.dtype) if to is E4M3 else _pack(_round_to_e5m6(x))


def decode(stored: Tensor, of: Format, width: int) -> Tensor:
    """The numbers as FP32 [..., width]. NaN of E4M3 on a CPU reads as 480: ``Quantised`` keeps it in its scales."""
    if of is E5M6:
        return _unpack(stored, width).float()
    if stored.device.type != "cpu":
        return stored.float()
    # Torch converts float8 one by one there. FP16 has E4M3's layout with one more bit of exponent, seven of mantissa
    # and a bias that is greater by 8. A shift of the sign-extended byte leaves a copy of the sign in the new bit.
    bits = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).to(torch.float32).mul_(256.0)


def _round_to_e5m6(x: Tensor) -> Tensor:
    """``round_to`` in passes of integers: the mantissa loses 17 of FP32's 23 bits; below the normal numbers, the last
    bit is worth 2^-20, as is FP32's own for a number near 12."""
    bits = x.contiguous().view(torch.int32)
    odd = bits.bitwise_right_shift(17).bitwise_and_(1)
    normal = odd.add_(bits).add_(0xFFFF).bitwise_and_(~0x1FFFF).view(torch.float32)
    subnormal = torch.copysign((x + 12.0).sub_(12.0), x)
    return torch.where(x.abs() < 2.0**E5M6.smallest_exponent, subnormal, normal)


def _pack(x: Tensor) -> Tensor:
    """Numbers of the format -> bytes: a pair of codes of 12 bits in three of them, the low byte of the first first."""
    width = x.shape[-1]
    codes = F.pad(x, (0, width % 2)).half().view(torch.int16).bitwise_right_shift_(4).bitwise_and_(0xFFF)
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    middle = first.bitwise_right_shift(8) | second.bitwise_left_shift(4).bitwise_and_(0xF0)
    parts = [first & 0xFF, middle, second.bitwise_right_shift(4)]
    return torch.stack([part.to(torch.uint8) for part in parts], dim=-1).flatten(-2)


def _unpack(stored: Tensor, width: int) -> Tensor:
    """-> FP16 [..., width]."""
    low, middle, high = stored.unflatten(-1, (-1, 3)).to(torch.int16).unbind(-1)
    first = low | middle.bitwise_and(0x0F).bitwise_left_shift_(8)
    second = middle.bitwise_right_shift(4) | high.bitwise_left_shift(4)
    codes = torch.stack([first, second], dim=-1).flatten(-2)
    return codes.bitwise_left_shift_(4).view(torch.float16)[..., :width]
