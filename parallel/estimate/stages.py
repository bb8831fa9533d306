"""The stages of a workload: their layers, what stands at the ends of the model, and how long an operation takes there.

The order inside an operation is that of ``dualpipe/overlap.py``; here its pieces get the durations of their own layer,
dense or MoE. Head, embedding and multi-token-prediction stand before the first or behind the last piece, as in
``parallel/stage.py``, and overlap with nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from dualpipe.overlap import STREAM_OF, Piece, Stream, Timed, needs, pair_plan, plan
from dualpipe.program import Op
from parallel.estimate.operations import EndCost, LayerCost, Operations
from parallel.estimate.workload import Workload
from parallel.partition import partition


@dataclass(frozen=True)
class StageCost:
    """``layers``: the phases of each layer, in order; ``end``: what overlaps with nothing."""

    layers: tuple[LayerCost, ...]
    end: EndCost

    @cached_property
    def alone(self) -> dict[Op, float]:
        """Seconds of each operation alone."""
        return {op: self._end(op) + _span(timeline(_alone(op, len(self.layers)), self._length)) for op in Op}

    def _end(self, op: Op) -> float:
        match op:
            case Op.FORWARD:
                return self.end.forward
            case Op.BACKWARD:
                return self.end.backward_input + self.end.backward_weight
            case Op.BACKWARD_INPUT:
                return self.end.backward_input
            case Op.BACKWARD_WEIGHT:
                return self.end.backward_weight
            case _:
                raise AssertionError(op)

    def _length(self, piece: Piece) -> float:
        """A backward meets the last layer first."""
        layer = piece.layer if piece.op is Op.FORWARD else -1 - piece.layer
        return self.layers[layer][piece.phase, piece.op]


def pair_timeline(forward: StageCost, backward: StageCost) -> list[Timed]:
    """The pieces of an overlapped pair, without the ends."""

    def length(piece: Piece) -> float:
        return (forward if piece.op is Op.FORWARD else backward)._length(piece)

    return timeline(_pair(len(forward.layers), len(backward.layers)), length)


def pair_seconds(forward: StageCost, backward: StageCost) -> float:
    """An overlapped pair: the backward's end first, the forward's last."""
    ends = forward._end(Op.FORWARD) + backward._end(Op.BACKWARD)
    return ends + _span(pair_timeline(forward, backward))


def hidden_fraction(timed: Iterable[Timed]) -> float:
    """The share of the communication stream's time during which the compute stream works; 1 without communication."""
    spans: dict[Stream, list[tuple[float, float]]] = {stream: [] for stream in Stream}
    for piece, start, end in ((t.piece, t.start, t.end) for t in timed):
        spans[STREAM_OF[piece.phase]].append((start, end))
    total = sum(end - start for start, end in spans[Stream.COMMUNICATION])
    both = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in spans[Stream.COMMUNICATION]
        for other_start, other_end in spans[Stream.COMPUTE]
    )
    return both / total if total else 1.0


class _Wired(NamedTuple):
    """A plan with places instead of names: for each piece its stream and, if the plan holds it, what it needs."""

    pieces: tuple[Piece, ...]
    streams: tuple[int, ...]
    needs: tuple[int | None, ...]


def timeline(wired: _Wired, length: Callable[[Piece], float]) -> list[Timed]:
    """``dualpipe.overlap.timeline`` for pieces whose durations differ from layer to layer."""
    free = [0.0 for _ in Stream]
    timed: list[Timed] = []
    for piece, stream, need in zip(*wired, strict=True):
        start = free[stream] if need is None else max(free[stream], timed[need].end)
        free[stream] = start + length(piece)
        timed.append(Timed(piece, start, free[stream]))
    return timed


@cache
def _alone(op: Op, layers: int) -> _Wired:
    return _wire(plan(op, layers))


@cache
def _pair(forward_layers: int, backward_layers: int) -> _Wired:
    return _wire(pair_plan(forward_layers, backward_layers))


def _wire(pieces: tuple[Piece, ...]) -> _Wired:
    """What a piece needs and the plan does not hold was done before."""
    place = {piece: index for index, piece in enumerate(pieces)}
    streams = list(Stream)
    return _Wired(
        pieces,
        tuple(streams.index(STREAM_OF[piece.phase]) for piece in pieces),
        tuple(None if (need := needs(piece)) is None else place.get(need) for piece in pieces),
    )


def stage_layers(workload: Workload, stages: int) -> list[range]:
    """The layers of each stage, as the runtime cuts them. Raises ValueError for more stages than layers."""
    return _partition(replace(workload.model, num_nextn_predict_layers=workload.mtp), stages)


def stage_costs(operations: Operations, layers: Iterable[range]) -> list[StageCost]:
    """The stages that hold these layers of the model, in order."""
    workload = operations.workload
    c = workload.model
    dense, moe = operations.layer(False), operations.layer(True)
    kinds: dict[tuple[bool, ...], StageCost] = {}  # equal stages are one object: what it takes is computed once
    stages = []
    for each in layers:
        kind = tuple(c.is_moe(layer) for layer in each)
        if kind not in kinds:
            kinds[kind] = StageCost(tuple(moe if of_experts else dense for of_experts in kind), EndCost())
        stages.append(kinds[kind])
    if len(stages) > 1 and operations.cluster.shares_cores:
        stages = [replace(stage, end=operations.message()) for stage in stages]
    stages[0] = replace(stages[0], end=stages[0].end + operations.embedding())
    end = stages[-1].end + operations.head()
    for _ in range(workload.mtp):
        end = end + operations.mtp_projection() + operations.head() + operations.embedding()
    stages[-1] = StageCost(stages[-1].layers + (moe,) * workload.mtp, end)
    return stages


_partition = cache(partition)


def _span(timed: list[Timed]) -> float:
    return max((piece.end for piece in timed), default=0.0)
