"""A layer's work on one micro-batch, in the pieces that ``dualpipe/overlap.py`` puts in order.

A layer is attention, dispatch, MLP and combine. The computing pieces are small autograd graphs of their own, with
detached inputs; the communicating ones start the exchange's collectives, and the computing piece that needs what was
sent waits for it. Whoever runs the pieces decides their order, so that it is the plan's on every rank and never
autograd's, and what runs between a start and its wait hides the communication.

B batch, S sequence, T = B·S tokens, D model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.overlap import Phase
from dualpipe.program import Op
from model.block import Block
from model.exchange import Dispatched, Exchange, Pending
from model.fp8.payload import Handover, anchor
from model.fp8.quantise import Quantised
from model.linear import Contribution, WeightGradients
from model.positions import Positions
from model.recompute import Recomputation

Deferred = list[tuple[nn.Parameter, Contribution]]


class _Enter(torch.autograd.Function):
    """An input of a graph, whose gradient goes to an anchor: the graph then holds an input only if it saved it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


@dataclass
class Graph:
    """One piece of autograd graph: what stands for its inputs, and the edges at its other end, None for an output
    without a gradient. It holds what its operations saved, and no input or output for its own sake."""

    inputs: tuple[Tensor, ...]
    edges: tuple[GradientEdge | None, ...]

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Gradients of the inputs from those of the outputs; None for an output that carries none."""
        pairs = [(e, g) for e, g in zip(self.edges, gradients, strict=True) if g is not None and e is not None]
        edges, gradients = zip(*pairs, strict=True)
        if self.inputs:
            found = torch.autograd.grad(edges, self.inputs, gradients, materialize_grads=True)
        else:  # whatever is behind these edges takes its gradient itself
            torch.autograd.backward(edges, gradients)
            found = ()
        self.inputs = self.edges = ()
        return found


def run_graph(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> tuple[Graph, tuple[Tensor, ...]]:
    """Call ``function`` on detached copies of ``inputs`` -> the graph, and the detached outputs; in no-grad mode
    nothing is recorded."""
    anchors: tuple[Tensor, ...] = ()
    if torch.is_grad_enabled():
        anchors = tuple(x.new_zeros(()).expand(x.shape).requires_grad_() for x in inputs)
        inputs = tuple(_Enter.apply(anchor, x) for anchor, x in zip(anchors, inputs, strict=True))
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    edges = tuple(get_gradient_edge(o) if o.requires_grad else None for o in outputs)
    return Graph(anchors, edges), tuple(o.detach() for o in outputs)


@dataclass
class LayerRun:
    """What a layer keeps of a micro-batch: its graphs from forward to backward, and the weight gradients that each of
    its phases deferred, from I to W."""

    attention: Graph | None = None
    local: Graph | None = None
    experts: Graph | None = None
    layout: object = None
    handover: Handover | None = None
    deferred: dict[Phase, Deferred] = field(default_factory=dict)


class LayerForward:
    """The forward of one layer. ``routed`` is called with the experts that the tokens chose and the balance loss."""

    def __init__(
        self,
        block: Block,
        exchange: Exchange,
        positions: Positions,
        routed: Callable[[Tensor, Tensor], None],
        x_BSD: Tensor,
    ) -> None:
        self.block, self.exchange, self.positions, self.routed = block, exchange, positions, routed
        self.kept = LayerRun()
        self._again = Recomputation(block.recompute)
        self._x_BSD = x_BSD
        self._y_RD: Tensor | None = None
        self._dispatched: Pending[Dispatched] | None = None
        self._combined: Pending[Tensor] | None = None

    def run(self, phase: Phase) -> None:
        match phase:
            case Phase.ATTENTION:
                self.kept.attention, outputs = run_graph(
                    lambda x: _attention(self.block, x, self.positions, self._again), self._x_BSD
                )
                self._h_BSD, self._u_BSD, *self._routing = outputs
            case Phase.DISPATCH if self._routing:
                weights_TK, balance, indices_TK = self._routing
                self._dispatched = self.exchange.dispatch(self._u_BSD.flatten(0, 1), weights_TK, indices_TK)
                self.routed(indices_TK, balance)
            case Phase.MLP:
                self._mlp()
            case Phase.COMBINE if self._routing:
                assert self._y_RD is not None
                self._combined = self.exchange.combine(self._y_RD, self.kept.layout)
                self._y_RD = None
            case Phase.DISPATCH | Phase.COMBINE:
                pass  # a dense layer's tokens stay
            case _:
                raise AssertionError(phase)

    def finish(self) -> Tensor:
        """The layer's output, h + s + z."""
        return self._out_BSD if self._combined is None else self._out_BSD + self._combined.wait().view_as(self._out_BSD)

    def _mlp(self) -> None:
        self._out_BSD = self._h_BSD
        if self.block.mlp is not None:
            self.kept.local, (s_BSD,) = run_graph(lambda u: self.block.local_phase(u, self._again), self._u_BSD)
            self._out_BSD = self._h_BSD + s_BSD
        if self._dispatched is not None:
            arrived = self._dispatched.wait()
            self.kept.experts, (self._y_RD,) = run_graph(
                lambda rows, weights: self.block.expert_phase(rows, weights, arrived, self._again),
                arrived.rows_RD,
                arrived.weights_R,
            )
            self.kept.layout, self.kept.handover = arrived.layout, arrived.handover


class LayerBackward:
    """The backward of one layer from what its forward kept. The output is h + s + z, so its gradient is the gradient
    of all three. ``balance``: the gradient of the balance loss."""

    def __init__(
        self, kept: LayerRun, exchange: Exchange, gradients: WeightGradients, balance: Tensor, gradient_BSD: Tensor
    ) -> None:
        self.kept, self.exchange, self.gradients = kept, exchange, gradients
        self._balance, self._gradient_BSD = balance, gradient_BSD
        self._local: tuple[Tensor, ...] = ()
        self._expert_gradients: tuple[Tensor, ...] = ()
        self._rows: Pending[Tensor | Quantised] | None = None
        self._returned: Pending[tuple[Tensor, Tensor]] | None = None

    def run(self, phase: Phase, op: Op) -> None:
        match op, phase:
            case Op.BACKWARD_WEIGHT, _:
                apply(self.kept, self.gradients, phase)
            case _, Phase.COMBINE if self.kept.experts is not None:
                self._rows = self.exchange.dispatch_gradient(self._gradient_BSD.flatten(0, 1), self.kept.layout)
            case _, Phase.MLP:
                self._mlp()
            case _, Phase.DISPATCH if self.kept.experts is not None:
                grows_RD, gweights_R = self._expert_gradients
                self._returned = self.exchange.combine_gradient(grows_RD, gweights_R, self.kept.layout)
                self._expert_gradients = ()
            case _, Phase.ATTENTION:
                self._attention()
            case _, Phase.COMBINE | Phase.DISPATCH:
                pass
            case _:
                raise AssertionError((op, phase))

    def finish(self) -> Tensor:
        """The gradient of the layer's input."""
        return self._gradient_BSD

    def _mlp(self) -> None:
        kept = self.kept
        if kept.local is not None:
            self._local = kept.local.backward([self._gradient_BSD])
        if self._rows is not None:
            assert kept.experts is not None
            gy_RD = self._rows.wait()
            if isinstance(gy_RD, Quantised):
                assert kept.handover is not None
                kept.handover.leave(gy_RD)
                gy_RD = anchor(gy_RD, self._gradient_BSD.dtype)
            self._expert_gradients = kept.experts.backward([gy_RD])
        kept.deferred[Phase.MLP] = self.gradients.take()

    def _attention(self) -> None:
        kept, gradient_BSD = self.kept, self._gradient_BSD
        assert kept.attention is not None
        if self._returned is None:
            found = kept.attention.backward([gradient_BSD, *self._local])
        else:
            gu_TD, gweights_TK = self._returned.wait()
            gu_BSD = sum(self._local, gu_TD.view_as(gradient_BSD))
            found = kept.attention.backward([gradient_BSD, gu_BSD, gweights_TK, self._balance, None])
        self._gradient_BSD = found[0]
        kept.deferred[Phase.ATTENTION] = self.gradients.take()
        # The graphs are dead, the deferred weight gradients hold what they need.
        kept.attention = kept.local = kept.experts = kept.layout = kept.handover = None


def apply(kept: LayerRun, gradients: WeightGradients, phase: Phase) -> None:
    """Add the weight gradients that a phase deferred."""
    gradients.apply(kept.deferred.pop(phase))


def _attention(block: Block, x_BSD: Tensor, positions: Positions, again: Recomputation) -> tuple[Tensor, ...]:
    attended = block.attention_phase(x_BSD, positions, again)
    routing = attended.routing
    if routing is None:
        return attended.h_BSD, attended.u_BSD
    return attended.h_BSD, attended.u_BSD, routing.weights_TK, routing.balance, routing.indices_TK
