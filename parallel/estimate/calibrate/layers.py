"""A layer's phases and the ends of the model, run by the runtime's own pieces and timed one by one.

B batch, S sequence, T = B·S tokens, D model.
"""

from collections import defaultdict
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
from parallel.layer import LayerBackward, LayerForward, run_graph

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741

_FORWARD = ((Phase.ATTENTION, F), (Phase.DISPATCH, F), (Phase.MLP, F), (Phase.COMBINE, F))
_INPUT = ((Phase.COMBINE, I), (Phase.MLP, I), (Phase.DISPATCH, I), (Phase.ATTENTION, I))
_WEIGHT = ((Phase.MLP, W), (Phase.ATTENTION, W))


class LayerProbe:
    """One layer with experts ``experts`` of the model's, behind ``exchange``; all of them behind none."""

    def __init__(
        self,
        workload: Workload,
        layer: int,
        device: torch.device,
        exchange: Exchange | None = None,
        experts: range | None = None,
    ) -> None:
        # One layer more at each end: the probe has neither the embedding nor the head.
        c = replace(workload.model, num_hidden_layers=max(workload.model.num_hidden_layers, layer + 2))
        self.exchange = exchange or LocalExchange(c.n_routed_experts)
        self.model, self.gradients = _built(Transformer(c, [layer], experts or range(c.n_routed_experts)), device)
        ((_, self.block),) = self.model.blocks()
        self._load_E = torch.zeros(c.n_routed_experts, dtype=torch.int64, device=device)
        self._dtype, self._device = DTYPES[workload.precision], device
        self._shape = workload.micro_batch_size, workload.sequence_length, c.hidden_size
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self._dtype)

    def seconds(self, clock: Clock) -> dict[Part, float]:
        """One forward and one backward. What the exchange takes is in the phase that waits for it, but for what its
        own phase does."""
        took: defaultdict[Part, float] = defaultdict(float)
        x_BSD = torch.randn(self._shape, device=self._device, dtype=self._dtype)
        positions = self.model.positions(None, x_BSD, None)
        forward = LayerForward(self.block, self.exchange, positions, self._routed, x_BSD)
        last = clock.now()
        for phase, op in _FORWARD:
            forward.run(phase)
            took[phase, op], last = clock.now() - last, clock.now()
        y_BSD = forward.finish()
        took[Phase.COMBINE, F] += clock.now() - last
        zero = torch.zeros((), device=self._device)
        backward = LayerBackward(forward.kept, self.exchange, self.gradients, zero, y_BSD)
        last = clock.now()
        for phase, op in (*_INPUT, *_WEIGHT):
            backward.run(phase, op)
            took[phase, op], last = clock.now() - last, clock.now()
        return dict(took)

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
