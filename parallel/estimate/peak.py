"""Where the stages of a program are, and when its ranks may hold most, whatever a micro-batch takes in each stage.

A rank holds a micro-batch from its F to its B, or to its I and from there to its W, which is less or more. Of all that
a program passes through only those moments matter that no other exceeds in every count: a handful for each rank, the
same for every number of micro-batches that fills the pipeline.

R ranks, S stages, M moments, C columns of counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dualpipe.program import Compute, Op, Overlap, Program

Counts = tuple[int, ...]
"""Of micro-batches, for each stage of a rank: those kept from F on; then, stage by stage, those that wait for W."""


class Placement:
    """``held``: the stages of each rank. ``copies_S``: the ranks that hold a stage."""

    def __init__(self, program: Program) -> None:
        self.stages, self.ranks, self.routes = program.stages, program.ranks, program.routes
        self.held = tuple(tuple(sorted(program.stages_of(rank))) for rank in range(program.ranks))
        self.held_RS = np.array([[stage in own for stage in range(program.stages)] for own in self.held], dtype=float)
        self.copies_S = self.held_RS.sum(axis=0)
        fullest = [_largest(set(_moments(program, rank, own))) for rank, own in enumerate(self.held)]
        width = 2 * max(map(len, self.held))
        # Of each count, where its bytes stand among those of all stages; a rank with fewer stages has noughts besides.
        self._counts_MC, self._place_MC = (
            np.zeros((sum(map(len, fullest)), width), dtype=kind) for kind in (float, int)
        )
        at = 0
        for moments, own in zip(fullest, self.held, strict=True):
            place = [*own, *(program.stages + stage for stage in own)]
            for counts in moments:
                self._counts_MC[at, : len(counts)], self._place_MC[at, : len(counts)] = counts, place
                at += 1
        self._first_R = np.cumsum([0, *(len(each) for each in fullest[:-1])])

    def peak_R(self, activation_bytes: Sequence[float], deferred_bytes: Sequence[float]) -> np.ndarray:
        """The most that each rank holds, slot by slot. Both are of one micro-batch, by stage."""
        held_MC = self._counts_MC * np.array([*activation_bytes, *deferred_bytes])[self._place_MC]
        return np.maximum.reduceat(held_MC.sum(axis=1), self._first_R)


def _moments(program: Program, rank: int, stages: Sequence[int]) -> Iterator[Counts]:
    """What the rank holds while and after each of its operations. While an I runs, that is what was there before, or
    what is there behind it."""
    place, waiting = {stage: index for index, stage in enumerate(stages)}, len(stages)
    held = [0] * (2 * waiting)
    for slot in program.slots[rank]:
        match slot:
            case Compute(Op.FORWARD, work):
                held[place[work.stage]] += 1
            case Overlap(forward, backward):
                held[place[forward.stage]] += 1
                yield tuple(held)
                held[place[backward.stage]] -= 1
            case Compute(Op.BACKWARD, work):
                held[place[work.stage]] -= 1
            case Compute(Op.BACKWARD_INPUT, work):
                held[place[work.stage]] -= 1
                held[waiting + place[work.stage]] += 1
            case Compute(Op.BACKWARD_WEIGHT, work):
                held[waiting + place[work.stage]] -= 1
            case _:
                continue
        yield tuple(held)


def _largest(moments: set[Counts]) -> list[Counts]:
    """Those that no other one exceeds."""
    largest: list[Counts] = []
    for counts in sorted(moments, key=sum, reverse=True):  # one that exceeds another comes before it
        if not any(all(a >= b for a, b in zip(other, counts, strict=True)) for other in largest):
            largest.append(counts)
    return largest
