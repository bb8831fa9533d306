"""Stages that wait for a deadline instead of computing: they stand in for an accelerator.

A rank that sleeps takes no core, so that eight real processes with real messages show a schedule's real bubble on two
cores. A slot's deadline is counted from the moment at which it starts; what the process does after that, and how late
the kernel wakes it, is part of what is measured.
"""

import ctypes
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe.cost import Costs
from dualpipe.program import Work

MESSAGE_ELEMENTS = 1024
"""Of 4 bytes. Small, because gloo copies a message on the rank's own thread, and a network card would not."""
WAKE_S = 100e-6
"""About how late the kernel wakes a sleeper."""


def wake_on_time() -> None:
    """Ask the kernel to wake this thread at the deadline and not up to 50 microseconds later, which it may otherwise do
    to wake several at once. Linux only; elsewhere do nothing."""
    if sys.platform == "linux":
        set_timer_slack, nanoseconds = 29, 1
        ctypes.CDLL(None).prctl(set_timer_slack, nanoseconds)


def sleep_until(deadline: float) -> None:
    """``deadline`` in seconds of ``time.perf_counter``. Spins for ``WAKE_S`` at most: the ranks share few cores."""
    while (left := deadline - time.perf_counter()) > 0:
        if left > WAKE_S:
            time.sleep(left - WAKE_S)


class TimedStage:
    """A Stage of ``dualpipe.runtime`` in which every operation takes its duration in ``costs``, in seconds. Messages
    are all the same tensor, ``like``."""

    def __init__(self, costs: Costs, first: bool, last: bool, like: Tensor) -> None:
        self.costs = costs
        self._output = None if last else like
        self._input_gradient = None if first else like

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None:
        _take(self.costs.forward)
        return self._output

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        _take(self.costs.backward)
        return self._input_gradient

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        _take(self.costs.backward_input)
        return self._input_gradient

    def backward_weight(self, work: Work) -> None:
        _take(self.costs.backward_weight)

    def overlapped(
        self, work: Work, x: Tensor | None, other: "TimedStage", other_work: Work, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        _take(self.costs.overlapped)
        return self._output, other._input_gradient

    def free(self, work: Work) -> None:
        pass


def _take(seconds: float) -> None:
    sleep_until(time.perf_counter() + seconds)


class TimedModule(nn.Module):
    """The same stage for torch.distributed.pipelining: F in the forward, I where autograd computes the gradient of the
    input, and W where it computes the gradient of the weight.

    The three are nodes of their own, joined by an addition, because torch takes I and W apart by walking the graph
    twice: a single function would wait for both, both times. torch's first stage does nothing in I and all of the
    backward in W; there ``anchor``, in place of an embedding, makes the gradient of the input needed.
    """

    def __init__(self, costs: Costs, first: bool) -> None:
        super().__init__()
        self.costs = costs
        self.weight = nn.Parameter(torch.zeros(()))
        self.anchor = nn.Parameter(torch.zeros(())) if first else None

    def forward(self, x: Tensor) -> Tensor:
        _take(self.costs.forward)
        if self.anchor is not None:
            x = x + self.anchor
        ahead: Tensor = _Slow.apply(x, self.costs.backward_input)
        weight: Tensor = _Slow.apply(self.weight, self.costs.backward_weight)
        return ahead + weight


class _Slow(torch.autograd.Function):
    """The identity, whose backward takes so many seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _take(ctx.seconds)
        return gradient, None
