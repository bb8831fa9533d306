"""A slice of the model as the Stage that the runtime drives.

A micro-batch goes through the phases of each block (``model/block.py``). Every phase is a small autograd graph of its
own, with detached inputs; between phases stand the exchange's collectives, called from here, so that their order is the
program's on every rank and never autograd's. Backward walks the phases the other way. What a phase's linear layers
defer is kept with the micro-batch and applied by W.

B batch, S sequence, T = B·S tokens, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dualpipe.program import Work
from model.block import Block
from model.exchange import Exchange, count_experts
from model.linear import Contribution, WeightGradients
from model.transformer import Transformer

PADDING = -100
"""A token that is no target: what torch's cross-entropy ignores."""


@dataclass
class Phase:
    """One piece of autograd graph, from its detached inputs to its outputs."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Gradients of the inputs from those of the outputs; None for an output that carries none."""
        pairs = [(o, g) for o, g in zip(self.outputs, gradients, strict=True) if g is not None and o.requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, self.inputs, gradients, materialize_grads=True)
        self.inputs = self.outputs = ()
        return found


def run_phase(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Phase:
    """Call ``function`` on detached copies of ``inputs``; in no-grad mode nothing is recorded."""
    if torch.is_grad_enabled():
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
    outputs = function(*inputs)
    return Phase(inputs, outputs if isinstance(outputs, tuple) else (outputs,))


@dataclass
class LayerRun:
    """What one block keeps of a micro-batch between forward and backward."""

    attention: Phase
    local: Phase | None = None
    experts: Phase | None = None
    layout: object = None


@dataclass
class MicroBatch:
    """What the stage keeps of a micro-batch: the phases, and the weight gradients that its I deferred."""

    embedding: Phase | None = None
    layers: list[LayerRun] = field(default_factory=list)
    head: Phase | None = None
    deferred: list[tuple[nn.Parameter, Contribution]] = field(default_factory=list)


@dataclass(frozen=True)
class StepScale:
    """What the sums of the loss are divided by, known before the first backward: the target tokens and the sequences
    of the whole step, over all replicas."""

    tokens: int
    sequences: int


class ModelStage:
    """``model``: the slice; ``gradients``: the owner of its parameters' gradients, as given to ``model.linear.own``.

    ``begin`` starts a step. After it, ``cross_entropy`` and ``balance`` are the step's sums so far (FP64, the balance
    loss without alpha), and ``loads`` counts, for every MoE layer, how many of this rank's tokens
    chose each expert.
    """

    def __init__(
        self, model: Transformer, gradients: WeightGradients, exchange: Exchange, device: torch.device
    ) -> None:
        self.model, self.gradients, self.exchange, self.device = model, gradients, exchange, device
        self.alpha = model.config.balance_loss_alpha
        experts = model.config.n_routed_experts
        self.loads = {
            layer: torch.zeros(experts, dtype=torch.int64, device=device)
            for layer, block in model.blocks()
            if block.router is not None
        }
        self._alive: dict[Work, MicroBatch] = {}

    def begin(self, tokens: Mapping[int, Tensor], scale: StepScale, training: bool) -> None:
        """``tokens``: by micro-batch, [B, S+1] int64; a stage that is neither first nor last needs none. A sequence of
        ``PADDING`` fills up a batch and counts for nothing in the cross-entropy."""
        self._alive.clear()
        self._tokens, self._scale, self._training = tokens, scale, training
        self.cross_entropy = torch.zeros((), dtype=torch.float64, device=self.device)
        self.balance = torch.zeros((), dtype=torch.float64, device=self.device)
        for load in self.loads.values():
            load.zero_()

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None:
        with torch.set_grad_enabled(self._training):
            kept = self._alive[work] = MicroBatch()
            x_BSD = self._embed(work, kept) if x is None else x
            for layer, block in self.model.blocks():
                x_BSD = self._forward_layer(kept, layer, block, x_BSD)
            if not self.model.last:
                return x_BSD
            targets = self._tokens[work.microbatch][:, 1:]
            kept.head = run_phase(lambda x: self.model.cross_entropy(x, targets), x_BSD)
            self.cross_entropy += kept.head.outputs[0].detach()
            return None

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        gx = self.backward_input(work, gradient)
        self.backward_weight(work)
        return gx

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        kept = self._alive[work]
        if kept.head is not None:
            scale = torch.full((), 1 / self._scale.tokens, device=self.device)
            (gradient,) = kept.head.backward([scale])
        assert gradient is not None
        while kept.layers:
            gradient = self._backward_layer(kept.layers.pop(), gradient)
        if kept.embedding is not None:
            # The embedding adds its gradient itself; tokens have none to pass on.
            torch.autograd.backward(kept.embedding.outputs, (gradient,))
            kept.embedding.outputs = ()
        kept.deferred = self.gradients.take()
        return gradient if kept.embedding is None else None

    def backward_weight(self, work: Work) -> None:
        self.gradients.apply(self._alive[work].deferred)
        self._alive[work].deferred = []

    def free(self, work: Work) -> None:
        del self._alive[work]

    def _embed(self, work: Work, kept: MicroBatch) -> Tensor:
        assert self.model.embed is not None
        x_BSD = self.model.embed(self._tokens[work.microbatch][:, :-1].clamp_min(0))
        kept.embedding = Phase((), (x_BSD,))
        return x_BSD

    def _forward_layer(self, kept: MicroBatch, layer: int, block: Block, x_BSD: Tensor) -> Tensor:
        turns = self.model.rotations(x_BSD.shape[1], x_BSD.device)
        run = LayerRun(run_phase(lambda x: _attention(block, x, turns), x_BSD))
        kept.layers.append(run)
        h_BSD, u_BSD, *routing = (t.detach() for t in run.attention.outputs)
        if not routing:
            run.local = run_phase(block.local_phase, u_BSD)
            return h_BSD + run.local.outputs[0].detach()

        weights_TK, balance, indices_TK = routing
        dispatch = self.exchange.dispatch(u_BSD.flatten(0, 1), weights_TK, indices_TK)
        self.balance += balance
        self.loads[layer] += count_experts(indices_TK, len(self.loads[layer]))
        out_BSD = h_BSD
        if block.mlp is not None:
            run.local = run_phase(block.local_phase, u_BSD)
            out_BSD = h_BSD + run.local.outputs[0].detach()
        arrived = dispatch.wait()
        run.experts = run_phase(
            lambda rows, weights: block.expert_phase(rows, weights, arrived.ends_E), arrived.rows_RD, arrived.weights_R
        )
        run.layout = arrived.layout
        z_TD = self.exchange.combine(run.experts.outputs[0].detach(), arrived.layout).wait()
        return out_BSD + z_TD.view_as(out_BSD)

    def _backward_layer(self, run: LayerRun, gradient_BSD: Tensor) -> Tensor:
        """The block's output is h + s + z, so its gradient is the gradient of all three."""
        if run.experts is None:
            assert run.local is not None
            (gu_BSD,) = run.local.backward([gradient_BSD])
            return run.attention.backward([gradient_BSD, gu_BSD])[0]
        rows = self.exchange.dispatch_gradient(gradient_BSD.flatten(0, 1), run.layout)
        local = () if run.local is None else run.local.backward([gradient_BSD])
        grows_RD, gweights_R = run.experts.backward([rows.wait()])
        gu_TD, gweights_TK = self.exchange.combine_gradient(grows_RD, gweights_R, run.layout).wait()
        gu_BSD = sum(local, gu_TD.view_as(gradient_BSD))
        balance = torch.full((), self.alpha / self._scale.sequences, device=self.device)
        return run.attention.backward([gradient_BSD, gu_BSD, gweights_TK, balance, None])[0]


def _attention(block: Block, x_BSD: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
    attended = block.attention_phase(x_BSD, turns)
    routing = attended.routing
    if routing is None:
        return attended.h_BSD, attended.u_BSD
    return attended.h_BSD, attended.u_BSD, routing.weights_TK, routing.balance, routing.indices_TK
