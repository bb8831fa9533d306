"""A rank's order as a table of phases: how many times, and which turns.

A turn names an operation and an *index*, a sequence of micro-batches that a rank takes in order: the two directions of
DualPipe, the two stages of a V, or simply all of them. Which micro-batch a turn means follows by counting.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from dualpipe.program import Compute, Op, Overlap, Slot, Work

# One slot of the table: an operation and its index, or a forward and a backward as a pair.
Turn = tuple[tuple[Op, int], ...]
Phase = tuple[int, tuple[Turn, ...]]

F0: Turn = ((Op.FORWARD, 0),)
F1: Turn = ((Op.FORWARD, 1),)
B0: Turn = ((Op.BACKWARD, 0),)
B1: Turn = ((Op.BACKWARD, 1),)
I0: Turn = ((Op.BACKWARD_INPUT, 0),)
I1: Turn = ((Op.BACKWARD_INPUT, 1),)
W: Turn = ((Op.BACKWARD_WEIGHT, 0),)  # of either index: the oldest that is deferred


def spell(
    phases: Iterable[Phase], forwards: Sequence[Iterable[Work]], backwards: Sequence[Iterable[Work]]
) -> tuple[Slot, ...]:
    """The table spelled out. ``forwards`` and ``backwards`` hold, for each index, its works in order."""
    ahead = [iter(works) for works in forwards]
    back = [iter(works) for works in backwards]
    deferred: deque[Work] = deque()

    def slot(turn: Turn) -> Slot:
        match turn:
            case ((Op.FORWARD, f), (Op.BACKWARD, b)):
                return Overlap(next(ahead[f]), next(back[b]))
            case ((Op.FORWARD, index),):
                return Compute(Op.FORWARD, next(ahead[index]))
            case ((Op.BACKWARD, index),):
                return Compute(Op.BACKWARD, next(back[index]))
            case ((Op.BACKWARD_INPUT, index),):
                deferred.append(next(back[index]))
                return Compute(Op.BACKWARD_INPUT, deferred[-1])
            case ((Op.BACKWARD_WEIGHT, _),):
                return Compute(Op.BACKWARD_WEIGHT, deferred.popleft())
            case _:
                raise AssertionError(turn)

    return tuple(slot(turn) for times, turns in phases for _ in range(times) for turn in turns)
