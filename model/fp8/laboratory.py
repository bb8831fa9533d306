"""What narrow arithmetic does, in slow emulation: to see on a CPU why the scheme is what it is.

Hopper's FP8 tensor cores (DeepSeek-V3 report, 3.5.2): an instruction takes 32 products, shifts them right to the
largest exponent among them, keeps the highest 14 bits of each (the shift fills with the sign, so it rounds down) and
adds them; the register that the results are added to keeps 14 bits as well. Promotion every 128 of K hands the
register over to an FP32 one and begins again at zero.

Wang et al. (2018, "Training Deep Neural Networks with 8-bit Floating Point Numbers") had no wide register either: their
sums are made in chunks, each rounded at every addition, and the weight update rounds stochastically.

M, N outer dims, K summed dim.
"""

import torch
from torch import Tensor

INSTRUCTION = 32
"""Products that one instruction of the tensor core adds."""


def hopper_product(a_MK: Tensor, b_NK: Tensor, bits: int | None = 14, interval: int | None = 128) -> Tensor:
    """a bᵀ with ``bits`` significant bits in the instruction and its register (None: FP32), promoted to FP32 every
    ``interval`` of K (None: never). FP32 [M, N]; M · N · 32 numbers of memory."""
    promoted = a_MK.new_zeros(len(a_MK), len(b_NK))
    register = torch.zeros_like(promoted)
    for k in range(0, a_MK.shape[1], INSTRUCTION):
        products = a_MK[:, None, k : k + INSTRUCTION] * b_NK[None, :, k : k + INSTRUCTION]
        if bits is not None:
            unit = _unit(products.abs().amax(-1, keepdim=True), bits)
            products = torch.floor(products / unit) * unit
        register = _truncated(register + products.sum(-1), bits)
        if interval is not None and (k + INSTRUCTION) % interval == 0:
            promoted, register = promoted + register, torch.zeros_like(register)
    return promoted + register


def chunked_product(a_MK: Tensor, b_NK: Tensor, bits: int, chunk: int) -> Tensor:
    """a bᵀ with a sum that is rounded to ``bits`` significant bits at every addition: within chunks of ``chunk``
    products, then over the chunks. One chunk of all K is the plain sum. FP32 [M, N]."""
    total = a_MK.new_zeros(len(a_MK), len(b_NK))
    for start in range(0, a_MK.shape[1], chunk):
        part = torch.zeros_like(total)
        for k in range(start, min(start + chunk, a_MK.shape[1])):
            part = _rounded(part + a_MK[:, k, None] * b_NK[:, k], bits)
        total = _rounded(total + part, bits)
    return total


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """FP32 rounded to one of its two neighbours in BF16, to each with the probability that makes the mean x. Infinities
    and NaN stay."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = x.contiguous().view(torch.int32) + noise
    rounded = bits.bitwise_and_(~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _unit(magnitude: Tensor, bits: int) -> Tensor:
    """The last of ``bits`` bits of numbers of this magnitude; 1 for zero."""
    exponent = torch.where(magnitude == 0, bits, torch.frexp(magnitude).exponent)
    return torch.ldexp(torch.ones_like(magnitude), exponent - bits)


def _truncated(x: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return x
    unit = _unit(x.abs(), bits)
    return torch.floor(x / unit) * unit


def _rounded(x: Tensor, bits: int) -> Tensor:
    unit = _unit(x.abs(), bits)
    return torch.round(x / unit) * unit
