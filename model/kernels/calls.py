"""How kernels are given tensors, and shared by threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

PART_ELEMENTS = 1 << 16
"""No thread is woken for less."""
_AS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def serves(x: Tensor) -> bool:
    """Whether the kernels are for numbers such as these."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, BF16 as int16 and E4M3 as uint8."""
    x = x.detach() if x.requires_grad else x
    return (x.view(_AS[x.dtype]) if x.dtype in _AS else x).numpy()


def by_rows(rows: int, width: int, run: Callable[[int, int], None]) -> None:
    """``run`` from a row to a later one, in as many parts as torch has threads for, if there is work for them."""
    if not rows:
        return
    parts = min(torch.get_num_threads(), rows, rows * width // PART_ELEMENTS)
    if parts <= 1:
        run(0, rows)
        return
    ends = [rows * (part + 1) // parts for part in range(parts)]
    others = [_helpers().submit(run, *of) for of in pairwise(ends)]
    run(0, ends[0])
    for other in others:
        other.result()


_pool: ThreadPoolExecutor | None = None


def _helpers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, torch.get_num_threads()), "kernels")
    return _pool


def _forget_helpers() -> None:
    """A fork has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_helpers)
