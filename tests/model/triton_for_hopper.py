"""Compiles the Triton kernels for Hopper, which takes no GPU, and prints their PTX as JSON, by name.

A process of its own: the tests' one interprets kernels.
"""

import json
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.fp8 import triton_kernels

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"x": "*bf16", "rows_TD": "*u8", "columns_DT": "*u8", "bounds": "*i32", "tasks": "*i32", "out": "*bf16"}
POINTERS |= dict.fromkeys(("weights_T", "row_scales", "column_scales", "sa", "sb"), "*fp32")
POINTERS |= dict.fromkeys("ab", "*fp8e4nv")


def ptx(kernel: Any, **constants: Any) -> str:
    """With pointers, sizes and strides that are multiples of 16, as they are in DeepSeek-V3."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants},
    )
    return str(compile(source, target=HOPPER, options=triton_kernels.OPTIONS).asm["ptx"])


if __name__ == "__main__":
    flags = dict.fromkeys(("SWIGLU", "WEIGHTED", "ROWS", "COLUMNS", "POWER_OF_TWO"), True)
    print(
        json.dumps(
            {
                "quantise": ptx(triton_kernels._quantise, **flags),
                "product": ptx(triton_kernels._product, a_k=1, b_k=1, B_ROWS=False, BF16=True),
            }
        )
    )
