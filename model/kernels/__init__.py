"""Kernels of our own for a CPU, compiled by Numba: one pass over memory where operators take ten.

``swiglu.py``, ``norm.py``, ``core_inputs.py`` and ``tiles.py`` each have a piece of mathematics whose definition stands
elsewhere (``model.mlp``, ``model.norm``, ``model.attention``, ``model.fp8.quantise``) and is what it is tested against.
They read and write BF16 (SwiGLU and tiles FP32 too), compute in FP32 and round where the definition does. What a row
becomes depends on nothing but the row, and sums over rows are made by blocks of a fixed size, so that results are the
same for any number of threads. ``compiled.py`` holds what Numba compiles, ``calls.py`` how it is given tensors.
"""
