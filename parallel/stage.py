"""A slice of the model as the Stage that the runtime drives.

A micro-batch's forward and its backward go through the layers in pieces (``parallel/layer.py``), in the order that
``dualpipe/overlap.py`` gives for a lone operation or for a pair of them; the embedding and the head stand at the ends.
The block of a multi-token-prediction module is the last stage's last layer, and the head stands before it too.

B batch, S sequence, T = B·S tokens, D model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from dualpipe.overlap import Phase, Piece, pair_plan, plan
from dualpipe.program import Op, Work
from model.block import Block
from model.exchange import Exchange, count_experts
from model.linear import WeightGradients
from model.mtp import NO_TARGET
from model.transformer import Transformer
from parallel.layer import Deferred, Graph, LayerBackward, LayerForward, LayerRun, apply, run_graph

PADDING = NO_TARGET
"""A token that is no target."""

_plan, _pair_plan = cache(plan), cache(pair_plan)


@dataclass
class MicroBatch:
    """What the stage keeps of a micro-batch, layer by layer and at the ends of the model."""

    embedding: Graph | None = None
    layers: list[LayerRun] = field(default_factory=list)
    head: Graph | None = None  # with multi-token prediction, also the entry of its block
    next_embedding: Graph | None = None
    mtp_head: Graph | None = None
    deferred: Deferred = field(default_factory=list)  # of the heads


@dataclass(frozen=True)
class StepScale:
    """What the sums of the loss are divided by, known before the first backward: the target tokens and the sequences
    of the whole step, over all replicas. ``mtp_loss_weight``: of this step; None: the model's."""

    tokens: int
    sequences: int
    mtp_loss_weight: float | None = None


class ModelStage:
    """``model``: the slice; ``gradients``: the owner of its parameters' gradients, as given to ``model.linear.own``;
    ``document_start``: the token that begins a document, if attention is to stay within documents.

    ``begin`` starts a step. After it, ``cross_entropy``, ``balance`` and ``mtp`` are the step's sums so far (FP64, as
    in ``model.transformer.Loss``), and ``loads`` counts, for every MoE layer, how many of this rank's tokens chose each
    expert.
    """

    def __init__(
        self,
        model: Transformer,
        gradients: WeightGradients,
        exchange: Exchange,
        device: torch.device,
        document_start: int | None = None,
    ) -> None:
        self.model, self.gradients, self.exchange, self.device = model, gradients, exchange, device
        self.document_start = document_start
        self.layers = len(list(model.blocks()))
        self.predicts_further = False
        experts = model.config.n_routed_experts
        self.loads = {
            layer: torch.zeros(experts, dtype=torch.int64, device=device)
            for layer, block in model.blocks()
            if block.router is not None
        }
        self._alive: dict[Work, MicroBatch] = {}

    def begin(self, tokens: Mapping[int, Tensor], scale: StepScale, training: bool) -> None:
        """``tokens``: by micro-batch, [B, S+1] int64; a stage that is neither first nor last needs none, unless it has
        to find the documents. A sequence of ``PADDING`` fills up a batch and counts for nothing in the cross-entropy.
        Without ``training`` a multi-token-prediction module does not run."""
        self._alive.clear()
        self._tokens, self._training = tokens, training
        self.predicts_further = training and self.model.mtp is not None
        self.layers = len(list(self.blocks()))
        config = self.model.config
        self._head_gradient = torch.full((), 1 / scale.tokens, device=self.device)
        weight = config.mtp_loss_weight if scale.mtp_loss_weight is None else scale.mtp_loss_weight
        self._mtp_gradient = weight * self._head_gradient
        self._balance_gradient = torch.full((), config.balance_loss_alpha / scale.sequences, device=self.device)
        self.cross_entropy = torch.zeros((), dtype=torch.float64, device=self.device)
        self.balance = torch.zeros_like(self.cross_entropy)
        self.mtp = torch.zeros_like(self.cross_entropy)
        for load in self.loads.values():
            load.zero_()

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(layer number, block) of what this step runs, in order."""
        return self.model.blocks() if self.predicts_further else self.model.main_blocks()

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None:
        with torch.set_grad_enabled(self._training):
            return _run(_plan(Op.FORWARD, self.layers), _Forward(self, work, x), None)[0]

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        return _run(_plan(Op.BACKWARD, self.layers), None, _Backward(self, work, gradient, full=True))[1]

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        return _run(_plan(Op.BACKWARD_INPUT, self.layers), None, _Backward(self, work, gradient, full=False))[1]

    def backward_weight(self, work: Work) -> None:
        kept = self._alive[work]
        self.gradients.apply(kept.deferred)
        kept.deferred = []
        for piece in _plan(Op.BACKWARD_WEIGHT, self.layers):
            apply(kept.layers[-1 - piece.layer], self.gradients, piece.phase)

    def overlapped(
        self, work: Work, x: Tensor | None, other: "ModelStage", other_work: Work, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The forward of ``work`` here and the full backward of ``other_work`` in ``other``, piece by piece, so that
        each computes while the other communicates. Bitwise what forward and then backward give."""
        backward = _Backward(other, other_work, gradient, full=True)
        return _run(_pair_plan(self.layers, other.layers), _Forward(self, work, x), backward)

    def free(self, work: Work) -> None:
        del self._alive[work]


class _Forward:
    """The forward of one micro-batch, in pieces."""

    def __init__(self, stage: ModelStage, work: Work, x_BSD: Tensor | None) -> None:
        self.stage, self.work = stage, work
        self.kept = stage._alive[work] = MicroBatch()
        self._blocks = stage.blocks()
        self._layer: LayerForward | None = None
        self._x_BSD = self._embed() if x_BSD is None else x_BSD
        tokens_BS = None if stage.document_start is None else stage._tokens[work.microbatch][:, : self._x_BSD.shape[1]]
        self._positions = stage.model.positions(tokens_BS, self._x_BSD, stage.document_start)

    def run(self, piece: Piece) -> None:
        if piece.phase is Phase.ATTENTION:
            self._next_layer()
        assert self._layer is not None
        self._layer.run(piece.phase)

    def finish(self) -> Tensor | None:
        """The stage's output; None from the last stage, which adds the cross-entropy to the step's."""
        self._leave_layer()
        stage = self.stage
        if not stage.model.last:
            return self._x_BSD
        if stage.predicts_further:
            targets_BS, start, model = self._targets_BS, stage.document_start, stage.model
            self.kept.mtp_head, (mtp,) = run_graph(lambda x: model.leave_mtp(targets_BS, start, x), self._x_BSD)
            stage.mtp += mtp
        else:
            self._leave_main()
        return None

    @property
    def _targets_BS(self) -> Tensor:
        return self.stage._tokens[self.work.microbatch][:, 1:]

    def _leave_main(self) -> None:
        """The main model's head, and the entry of the module that predicts further."""
        stage, model, targets_BS = self.stage, self.stage.model, self._targets_BS
        inputs = [self._x_BSD]
        if stage.predicts_further:
            self.kept.next_embedding, (next_BSD,) = run_graph(lambda: model.embed_next(targets_BS))
            inputs.append(next_BSD)
        self.kept.head, (cross_entropy, *entered) = run_graph(lambda *x: model.leave_layers(targets_BS, *x), *inputs)
        stage.cross_entropy += cross_entropy
        if entered:
            (self._x_BSD,) = entered

    def _embed(self) -> Tensor:
        embed = self.stage.model.embed
        assert embed is not None
        tokens = self.stage._tokens[self.work.microbatch][:, :-1].clamp_min(0)
        self.kept.embedding, (x_BSD,) = run_graph(lambda: embed(tokens))
        return x_BSD

    def _next_layer(self) -> None:
        self._leave_layer()
        layer, block = next(self._blocks)
        if layer == self.stage.model.config.num_hidden_layers:
            self._leave_main()

        def routed(indices_TK: Tensor, balance: Tensor) -> None:
            load_E = self.stage.loads[layer]
            self.stage.balance += balance
            load_E += count_experts(indices_TK, len(load_E))

        self._layer = LayerForward(block, self.stage.exchange, self._positions, routed, self._x_BSD)
        self.kept.layers.append(self._layer.kept)

    def _leave_layer(self) -> None:
        if self._layer is not None:
            self._x_BSD = self._layer.finish()
            self._layer = None


class _Backward:
    """The backward of one micro-batch, in pieces, from the last layer to the first."""

    def __init__(self, stage: ModelStage, work: Work, gradient_BSD: Tensor | None, full: bool) -> None:
        """``full``: the heads' weight gradients too; otherwise they are deferred."""
        self.stage, self.kept, self.full = stage, stage._alive[work], full
        self._layer: LayerBackward | None = None
        if self.kept.mtp_head is not None:
            (gradient_BSD,) = self.kept.mtp_head.backward([stage._mtp_gradient])
            self._take_deferred()
        elif self.kept.head is not None:
            (gradient_BSD,) = self.kept.head.backward([stage._head_gradient])
            self._take_deferred()
        assert gradient_BSD is not None
        self._gradient_BSD = gradient_BSD

    def run(self, piece: Piece) -> None:
        if piece.op is Op.BACKWARD_INPUT and piece.phase is Phase.COMBINE:
            self._leave_layer()
            if piece.layer == 1 and self.kept.mtp_head is not None:
                self._enter_main()
            kept, stage = self.kept.layers[-1 - piece.layer], self.stage
            self._layer = LayerBackward(
                kept, stage.exchange, stage.gradients, stage._balance_gradient, self._gradient_BSD
            )
        assert self._layer is not None
        self._layer.run(piece.phase, piece.op)

    def finish(self) -> Tensor | None:
        """The gradient of the stage's input; None from the first stage, whose embedding adds its own."""
        self._leave_layer()
        embedding = self.kept.embedding
        if embedding is None:
            return self._gradient_BSD
        embedding.backward([self._gradient_BSD])
        return None

    def _enter_main(self) -> None:
        """From the gradient of the predicting module's block to that of the main model's last layer."""
        assert self.kept.head is not None and self.kept.next_embedding is not None
        gradients = [self.stage._head_gradient, self._gradient_BSD]
        self._gradient_BSD, gnext_BSD = self.kept.head.backward(gradients)
        self.kept.next_embedding.backward([gnext_BSD])
        self._take_deferred()

    def _take_deferred(self) -> None:
        deferred = self.stage.gradients.take()
        if self.full:
            self.stage.gradients.apply(deferred)
        else:
            self.kept.deferred += deferred

    def _leave_layer(self) -> None:
        if self._layer is not None:
            self._gradient_BSD = self._layer.finish()
            self._layer = None


def _run(
    pieces: Iterable[Piece], forward: _Forward | None, backward: _Backward | None
) -> tuple[Tensor | None, Tensor | None]:
    """Issue the pieces in the order of their plan; -> (the stage's output, the gradient of the stage's input)."""
    for piece in pieces:
        half = forward if piece.op is Op.FORWARD else backward
        assert half is not None, piece
        half.run(piece)
    y = None if forward is None else forward.finish()
    return y, None if backward is None else backward.finish()
