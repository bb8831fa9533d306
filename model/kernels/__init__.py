"""Kernels of our own for a CPU, compiled by Numba, each of which is tested against a definition that stands elsewhere.

One pass over memory where operators take ten: ``swiglu.py``, ``norm.py``, ``core_inputs.py`` and ``tiles.py``, for
``model.mlp``, ``model.norm``, ``model.attention`` and ``model.fp8.quantise``. What Numba compiles of them is in
``elementwise.py`` and, for FP8, in ``e4m3.py``.

Products, on a CPU with AVX512_BF16: ``products.py``, ``scaled_products.py`` and ``attention_core.py``, for
``model.linear``, ``model.fp8.gemm`` and ``model.attention``. They multiply by the tiles of ``registers.py``, whose
operands ``panels.py`` packs.

All read and write BF16 (some FP32 too), compute in FP32 and round where the definition does. What a row becomes depends
on nothing but the row, and sums over rows are made in an order that is always the same, so that results are the same
for any number of threads. ``calls.py`` is how kernels are given tensors and threads, ``jit.py`` how they are compiled
and kept, ``scalars.py`` what they do with one number.
"""
