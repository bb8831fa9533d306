"""A layer's phases and the ends of the model, run by the runtime's own pieces and timed one by one.

In a step a rank runs its other layers and micro-batches between a forward and its backward, so that weights, gradients
and activations come from memory. One layer on one micro-batch would find them in a CPU's last cache.

B batch, S sequence, T = B·S tokens, D model.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dualpipe.overlap import Part, Phase
from dualpipe.program import Op
from model.exchange import Exchange, LocalExchange, count_experts
from model.linear import WeightGradients, own
from model.transformer import Transformer, initialise
from parallel.estimate.calibrate.clock import Clock
from parallel.estimate.calibrate.products import DTYPES
from parallel.estimate.workload import Workload
from parallel.layer import LayerBackward, LayerForward, LayerRun, run_graph

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741

_FORWARD = ((Phase.ATTENTION, F), (Phase.DISPATCH, F), (Phase.MLP, F), (Phase.COMBINE, F))
_INPUT = ((Phase.COMBINE, I), (Phase.MLP, I), (Phase.DISPATCH, I), (Phase.ATTENTION, I))
_WEIGHT = ((Phase.MLP, W), (Phase.ATTENTION, W))

PASSES = 8
"""Layers times micro-batches that a CPU's probe holds at a time, as a rank of a pipeline does."""


class LayerProbe:
    """MoE layers with experts ``experts`` of the model's, behind ``exchange``; all of them behind none. On a CPU as
    many layers as a rank has, up to ``PASSES``, and micro-batches until their product is that; on a GPU, whose caches
    hold no layer of a size that trains there, one of each."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        exchange: Exchange | None = None,
        experts: range | None = None,
    ) -> None:
        c = workload.model
        layers = min(max(c.num_hidden_layers // workload.layout.pipeline, 1), PASSES) if device.type == "cpu" else 1
        self._alive = PASSES // layers if device.type == "cpu" else 1
        first = max(c.first_k_dense_replace, 1)
        # One layer more at each end: the probe has neither the embedding nor the head.
        c = replace(c, num_hidden_layers=max(c.num_hidden_layers, first + layers + 1))
        self.exchange = exchange or LocalExchange(c.n_routed_experts)
        numbers = list(range(first, first + layers))
        self.model, self.gradients = _built(Transformer(c, numbers, experts or range(c.n_routed_experts)), device)
        self.blocks = [block for _, block in self.model.blocks()]
        self._load_E = torch.zeros(c.n_routed_experts, dtype=torch.int64, device=device)
        self._dtype, self._device = DTYPES[workload.precision], device
        self._shape = workload.micro_batch_size, workload.sequence_length, c.hidden_size
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self._dtype)

    def seconds(self, clock: Clock) -> dict[Part, float]:
        """Of one layer on one micro-batch, the mean over all that the probe holds: forwards of all, then backwards.
        What the exchange takes is in the phase that waits for it, but for what its own phase does."""
        took: defaultdict[Part, float] = defaultdict(float)
        kept: list[tuple[Tensor, list[LayerRun]]] = [self._forward(clock, took) for _ in range(self._alive)]
        for g_BSD, runs in kept:
            self._backward(clock, took, g_BSD, runs)
        return {part: seconds / (self._alive * len(self.blocks)) for part, seconds in took.items()}

    def _forward(self, clock: Clock, took: defaultdict[Part, float]) -> tuple[Tensor, list[LayerRun]]:
        x_BSD = torch.randn(self._shape, device=self._device, dtype=self._dtype)
        positions, runs = self.model.positions(None, x_BSD, None), []
        last = clock.now()
        for block in self.blocks:
            forward = LayerForward(block, self.exchange, positions, self._routed, x_BSD)
            runs.append(forward.kept)
            for phase, op in _FORWARD:
                forward.run(phase)
                if phase is Phase.COMBINE:
                    x_BSD = forward.finish()
                now = clock.now()
                took[phase, op], last = took[phase, op] + now - last, now
        return x_BSD, runs

    def _backward(self, clock: Clock, took: defaultdict[Part, float], g_BSD: Tensor, runs: Sequence[LayerRun]) -> None:
        zero = torch.zeros((), device=self._device)
        last = clock.now()
        for run in reversed(runs):
            backward = LayerBackward(run, self.exchange, self.gradients, zero, g_BSD)
            for phase, op in (*_INPUT, *_WEIGHT):
                backward.run(phase, op)
                now = clock.now()
                took[phase, op], last = took[phase, op] + now - last, now
            g_BSD = backward.finish()

    def _routed(self, indices_TK: Tensor, balance: Tensor) -> None:
        self._load_E += count_experts(indices_TK, len(self._load_E))


def head_seconds(workload: Workload, device: torch.device, clock: Clock) -> tuple[float, float]:
    """(forward, backward with its weight gradient) of final norm, head and loss on one micro-batch."""
    c = replace(workload.model, num_hidden_layers=2, first_k_dense_replace=2)
    model, gradients = _built(Transformer(c, [1], range(0)), device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[workload.precision])
    shape = workload.micro_batch_size, workload.sequence_length
    x_BSD = torch.randn(*shape, c.hidden_size, device=device, dtype=DTYPES[workload.precision])
    targets_BS = torch.randint(0, c.vocab_size, shape, device=device)
    scale = torch.full((), 1e-3, device=device)
    took = [0.0, 0.0]
    repeats = 4
    for turn in range(repeats + 1):
        last = clock.now()
        graph, _ = run_graph(lambda x: model.cross_entropy(x, targets_BS), x_BSD)
        middle = clock.now()
        graph.backward([scale])
        gradients.apply(gradients.take())
        if turn:  # the first one is a warm-up
            took[0] += middle - last
            took[1] += clock.now() - middle
    return took[0] / repeats, took[1] / repeats


def _built(model: Transformer, device: torch.device) -> tuple[Transformer, WeightGradients]:
    model = model.to(device)
    initialise(model, seed=1)
    gradients = WeightGradients({p: torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()})
    own(model, gradients)
    return model, gradients
