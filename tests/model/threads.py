"""Kernels are shared by threads without a change of a bit."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import model.kernels.calls


def assert_threads_change_nothing(
    patch: pytest.MonkeyPatch, compute: Callable[[], Sequence[Tensor]], repeats: int = 10
) -> None:
    """``compute`` gives the same bits in one thread and in five that share the smallest parts, again and again."""
    alone = compute()
    patch.setattr(model.kernels.calls, "PART_ELEMENTS", 16)
    patch.setattr(torch, "get_num_threads", lambda: 5)
    for _ in range(repeats):
        for one, many in zip(alone, compute(), strict=True):
            assert torch.equal(one, many)
