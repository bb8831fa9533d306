"""A stage for ``benchmarks.overlap``: layers, exchange and buckets are those that train, what computes waits instead.

T tokens of a rank, D model, K experts a token.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.dispatch_ranks import MODEL
from benchmarks.timed import sleep_until
from dualpipe.overlap import F, I, Part, Phase, Piece, W, pair_plan, plan
from dualpipe.program import Compute, Op, Overlap, Slot, Work
from model.block import Attended, Block
from model.exchange import Dispatched
from model.linear import WeightGradients
from model.router import Routing
from parallel.bucket import Bucket
from parallel.comm_stream import Times
from parallel.exchange import GroupExchange
from parallel.layer import LayerBackward, LayerForward, LayerRun, apply


class Waits(torch.autograd.Function):
    """The identity on rows, whose forward and input gradient take their time and whose weight gradient is deferred."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: Mapping[Op, float], gradients: WeightGradients, weight: Any) -> Tensor:
        ctx.seconds, ctx.gradients, ctx.weight = seconds, gradients, weight
        take(seconds[F])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        take(ctx.seconds[I])
        ctx.gradients.defer(ctx.weight, lambda _: take(ctx.seconds[W]))
        return gradient, None, None, None


def take(seconds: float) -> None:
    sleep_until(time.perf_counter() + seconds)


class TimedBlock:
    """What a layer calls of a ``model.block.Block``, with the durations of a layer's phases in seconds. Tokens go where
    ``routing`` says."""

    mlp = None
    recompute = MODEL.recompute

    def __init__(self, phases: Mapping[Part, float], routing: Routing, gradients: WeightGradients, weight: Any) -> None:
        self._seconds = {p: {op: phases[p, op] for op in (F, I, W)} for p in (Phase.ATTENTION, Phase.MLP)}
        self._routing, self._gradients, self._weight = routing, gradients, weight

    def attention_phase(self, x_BSD: Tensor, positions: object, again: object) -> Attended:
        h_BSD = Waits.apply(x_BSD, self._seconds[Phase.ATTENTION], self._gradients, self._weight)
        return Attended(h_BSD, h_BSD, self._routing)

    def expert_phase(self, rows_RD: Tensor, weights_R: Tensor, sent: Dispatched, again: object) -> Tensor:
        y_RD: Tensor = Waits.apply(rows_RD, self._seconds[Phase.MLP], self._gradients, self._weight)
        return y_RD.contiguous()


@dataclass
class Pair:
    """What an overlapped pair took, in seconds, and how long its communication was in flight and waited for."""

    seconds: float
    times: Times


class TimedStage:
    """A Stage of ``dualpipe.runtime`` whose layers are ``parallel.layer``'s over ``TimedBlock``. Messages between
    stages are all the same small tensor, ``like``: they are not what is measured."""

    def __init__(self, block: TimedBlock, layers: int, exchange: GroupExchange, ends: tuple[bool, bool], like: Tensor):
        self.block, self.layers, self.exchange = block, layers, exchange
        self._x_BSD = torch.randn(1, len(block._routing.indices_TK), MODEL.hidden_size).bfloat16()
        first, last = ends
        self._output, self._input_gradient = None if last else like, None if first else like
        self.overlaps = True
        self.pairs: list[Pair] = []
        self._alive: dict[Work, list[LayerRun]] = {}

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None:
        self._run(plan(F, self.layers), work, None)
        return self._output

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        self._run(plan(Op.BACKWARD, self.layers), None, work)
        return self._input_gradient

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        self._run(plan(I, self.layers), None, work)
        return self._input_gradient

    def backward_weight(self, work: Work) -> None:
        for piece in plan(W, self.layers):
            apply(self._alive[work][-1 - piece.layer], self.block._gradients, piece.phase)

    def overlapped(
        self, work: Work, x: Tensor | None, other: "TimedStage", other_work: Work, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        start, before = time.perf_counter(), self.exchange.stream.times()
        if self.overlaps:
            self._run(pair_plan(self.layers, other.layers), work, other_work, other)
        else:
            self.forward(work, x)
            other.backward(other_work, gradient)
        after = self.exchange.stream.times()
        times = Times(after.communication_s - before.communication_s, after.exposed_s - before.exposed_s)
        self.pairs.append(Pair(time.perf_counter() - start, times))
        return self._output, other._input_gradient

    def free(self, work: Work) -> None:
        del self._alive[work]

    def _run(
        self, pieces: Iterable[Piece], ahead: Work | None, back: Work | None, other: "TimedStage | None" = None
    ) -> None:
        """The pieces of a forward of ``ahead`` here and of a backward of ``back`` in ``other``, or here."""
        x_BSD, g_BSD = self._x_BSD, self._x_BSD
        forward: LayerForward | None = None
        backward: LayerBackward | None = None
        for piece in pieces:
            if piece.op is F:
                assert ahead is not None
                if piece.phase is Phase.ATTENTION:
                    x_BSD = x_BSD if forward is None else forward.finish()
                    block = cast(Block, self.block)
                    forward = LayerForward(block, self.exchange, cast(Any, None), lambda *_: None, x_BSD)
                    self._alive.setdefault(ahead, []).append(forward.kept)
                assert forward is not None
                forward.run(piece.phase)
            else:
                assert back is not None
                stage = other or self
                if (piece.phase, piece.op) == (Phase.COMBINE, I):
                    g_BSD = g_BSD if backward is None else backward.finish()
                    kept = stage._alive[back][-1 - piece.layer]
                    backward = LayerBackward(kept, stage.exchange, stage.block._gradients, torch.zeros(()), g_BSD)
                assert backward is not None
                backward.run(piece.phase, piece.op)
        for half in (forward, backward):
            if half is not None:
                half.finish()


class TimedEnd:
    """REDUCE, STEP and GATHER of real buckets. With ``hidden``, ``begin`` starts the gathers, as the end of the step
    before would, and a stage's first forward waits for its own."""

    def __init__(self, buckets: Mapping[int, Bucket], hidden: bool) -> None:
        self.buckets, self.hidden = buckets, hidden
        self.exposed_s = {"reduce": 0.0, "gather": 0.0}

    def begin(self) -> None:
        self.exposed_s = dict.fromkeys(self.exposed_s, 0.0)
        for bucket in self.buckets.values() if self.hidden else ():
            bucket.gather()

    def entered(self, slot: Slot) -> None:
        match slot:
            case Compute(Op.FORWARD, work) | Overlap(work, _):
                with self._exposed("gather"):
                    self.buckets[work.stage].gathered()

    def reduce(self, stage: int) -> None:
        with self._exposed("reduce"):
            self.buckets[stage].reduce()
            if not self.hidden:
                self.buckets[stage].reduced()

    def step(self) -> None:
        with self._exposed("reduce"):
            for bucket in self.buckets.values():
                bucket.reduced()
        dist.all_reduce(torch.zeros(8))

    def gather(self, stage: int) -> None:
        if not self.hidden:
            with self._exposed("gather"):
                gather(self.buckets[stage])

    @contextmanager
    def _exposed(self, kind: str) -> Any:
        start = time.perf_counter()
        yield
        self.exposed_s[kind] += time.perf_counter() - start


def reduce(bucket: Bucket) -> None:
    bucket.reduce()
    bucket.reduced()


def gather(bucket: Bucket) -> None:
    bucket.gather()
    bucket.gathered()
