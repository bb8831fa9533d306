"""The inside of an operation, as data: which phase of which layer runs on which stream, and in what order.

A layer is four phases: attention and MLP on the *compute* stream, dispatch and combine on the *communication* stream
(DeepSeek-V3 technical report, 3.2.1, figure 4). Each stream takes its pieces in the order of the plan; a piece also
waits for what it needs on the other stream. The orders below are those of DeepSeek's published trace of an
overlapped pair (github.com/deepseek-ai/profile-data, train.json):

    compute        attn(F)     mlp(B)      mlp(W) mlp(F)  attn(B) attn(W)
    communication  combine(B)  dispatch(F) dispatch(B)    combine(F)

Every row of a plan stands after the rows that it needs, so one thread can issue the pieces from top to bottom.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from dualpipe.program import Op


class Phase(Enum):
    ATTENTION = "attn"
    DISPATCH = "dispatch"
    MLP = "mlp"
    COMBINE = "combine"


class Stream(Enum):
    COMPUTE = "compute"
    COMMUNICATION = "communication"


STREAM_OF = {
    Phase.ATTENTION: Stream.COMPUTE,
    Phase.DISPATCH: Stream.COMMUNICATION,
    Phase.MLP: Stream.COMPUTE,
    Phase.COMBINE: Stream.COMMUNICATION,
}

# A phase and what it does in it: forward, gradients of inputs, gradients of weights (communication has no weights).
Part = tuple[Phase, Op]

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741, the names that schedules are written with

FORWARD: tuple[Part, ...] = ((Phase.ATTENTION, F), (Phase.DISPATCH, F), (Phase.MLP, F), (Phase.COMBINE, F))
INPUT: tuple[Part, ...] = ((Phase.COMBINE, I), (Phase.MLP, I), (Phase.DISPATCH, I), (Phase.ATTENTION, I))
WEIGHT: tuple[Part, ...] = ((Phase.MLP, W), (Phase.ATTENTION, W))
# A full backward: the dispatch of its gradients hides behind the weight gradients of the MLP.
BACKWARD: tuple[Part, ...] = (*INPUT[:3], (Phase.MLP, W), INPUT[3], (Phase.ATTENTION, W))
PAIR: tuple[Part, ...] = (
    (Phase.COMBINE, I),
    (Phase.ATTENTION, F),
    (Phase.DISPATCH, F),
    (Phase.MLP, I),
    (Phase.DISPATCH, I),
    (Phase.MLP, W),
    (Phase.MLP, F),
    (Phase.COMBINE, F),
    (Phase.ATTENTION, I),
    (Phase.ATTENTION, W),
)
PARTS = (*FORWARD, *INPUT, *WEIGHT)


class Piece(NamedTuple):
    """One phase of one layer. ``layer`` counts the layers in the order in which this half of the work meets them."""

    phase: Phase
    op: Op
    layer: int


@dataclass(frozen=True)
class Timed:
    piece: Piece
    start: float
    end: float


_ORDERS = {F: FORWARD, Op.BACKWARD: BACKWARD, I: INPUT, W: WEIGHT}


def plan(op: Op, layers: int) -> tuple[Piece, ...]:
    """The pieces of a lone operation on a stage of so many layers, in the order in which they are issued."""
    return tuple(Piece(phase, part, layer) for layer in range(layers) for phase, part in _ORDERS[op])


def pair_plan(forward_layers: int, backward_layers: int) -> tuple[Piece, ...]:
    """The pieces of an overlapped pair, layer by layer; the half with more layers runs the rest as if alone."""
    common = min(forward_layers, backward_layers)
    together = [Piece(phase, op, layer) for layer in range(common) for phase, op in PAIR]
    rest = plan(F, forward_layers) + plan(Op.BACKWARD, backward_layers)
    return (*together, *(piece for piece in rest if piece.layer >= common))


def needs(piece: Piece) -> Piece | None:
    """The piece whose result this one works on, within the same half; None where the half begins.

    Weight gradients need the input gradients of their own phase, whose pieces an earlier I may have run.
    """
    if piece.op is W:
        return Piece(piece.phase, I, piece.layer)
    chain = FORWARD if piece.op is F else INPUT
    place = chain.index((piece.phase, piece.op))
    if place > 0:
        return Piece(*chain[place - 1], piece.layer)
    return Piece(*chain[-1], piece.layer - 1) if piece.layer > 0 else None


def timeline(pieces: tuple[Piece, ...], durations: Mapping[Part, float]) -> list[Timed]:
    """When each piece runs, from 0, in the order of the plan: once its stream is free and what it needs is done.

    What a piece needs and the plan does not hold was done before: a lone W follows an earlier I.
    """
    free = {stream: 0.0 for stream in Stream}
    done: dict[Piece, float] = {}
    timed = []
    for piece in pieces:
        stream, need = STREAM_OF[piece.phase], needs(piece)
        start = max(free[stream], done.get(need, 0.0) if need is not None else 0.0)
        done[piece] = free[stream] = start + durations[piece.phase, piece.op]
        timed.append(Timed(piece, start, done[piece]))
    return timed


def duration(pieces: tuple[Piece, ...], durations: Mapping[Part, float]) -> float:
    """The critical path: from the first start to the last end, on both streams."""
    return max((timed.end for timed in timeline(pieces, durations)), default=0.0)
