"""Kernels of our own for a CPU, compiled by Numba: one pass over memory where operators take ten.

Each of ``swiglu.py``, ``norm.py`` and ``core_inputs.py`` has a piece of mathematics whose definition stands elsewhere
(``model.mlp``, ``model.norm``, ``model.attention``) and is what it is tested against. They read and write BF16, compute
in FP32 and round where the definition does. What a row becomes depends on nothing but the row, so that results are the
same however rows are cut. ``compiled.py`` holds what Numba compiles.
"""
