"""A second, small simulation, of compute order whose messages are free: how long each rank idles.

It shares no code with ``dualpipe.progress``, and is quick enough to go through all sizes.
"""

from collections.abc import Mapping
from math import inf

from dualpipe.program import Compute, Op, Overlap, Program


def idle(order: Program, costs: Mapping[str, float]) -> list[float]:
    """Each rank's idle time until the last rank is done. ``costs``: F, I, W, B and FB."""
    stages, microbatches = order.stages, order.microbatches
    # When the input of a forward, or of a backward, is there; by stage and micro-batch.
    activation = [[inf if stage else 0.0] * microbatches for stage in range(stages + 1)]
    gradient = [[inf if stage < stages - 1 else 0.0] * microbatches for stage in range(-1, stages)]
    clock, busy, reached = [0.0] * order.ranks, [0.0] * order.ranks, [0] * order.ranks
    while any(place < len(slots) for place, slots in zip(reached, order.slots, strict=True)):
        before = sum(reached)
        for rank, slots in enumerate(order.slots):
            for slot in slots[reached[rank] :]:
                forward = backward = None
                match slot:
                    case Overlap(forward, backward):
                        cost = costs["FB"]
                    case Compute(Op.FORWARD, forward):
                        cost = costs["F"]
                    case Compute(Op.BACKWARD | Op.BACKWARD_INPUT as op, backward):
                        cost = costs[op.value]
                    case _:
                        cost = costs["W"]
                start = clock[rank]
                if forward:
                    start = max(start, activation[forward.stage][forward.microbatch])
                if backward:
                    start = max(start, gradient[backward.stage + 1][backward.microbatch])
                if start == inf:
                    break
                clock[rank] = start + cost
                busy[rank] += cost
                reached[rank] += 1
                if forward:
                    activation[forward.stage + 1][forward.microbatch] = clock[rank]
                if backward:
                    gradient[backward.stage][backward.microbatch] = clock[rank]
        assert sum(reached) > before, "the order comes to no end"
    return [max(clock) - time for time in busy]
