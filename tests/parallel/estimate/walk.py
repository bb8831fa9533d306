"""What a rank holds, slot by slot: the plain way to what ``parallel.estimate.peak`` looks up in a table."""

from collections.abc import Iterator, Sequence

from dualpipe.program import Compute, Op, Overlap, Program


def held_bytes(
    program: Program, rank: int, activation_bytes: Sequence[float], deferred_bytes: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """(while a computing slot of the rank runs, behind it): the bytes of all micro-batches whose backward is not
    complete. Both are of one micro-batch by stage; while an I runs, the larger."""
    held = 0.0
    for slot in program.slots[rank]:
        match slot:
            case Compute(Op.FORWARD, work):
                during, change = activation_bytes[work.stage], activation_bytes[work.stage]
            case Overlap(forward, backward):
                during = activation_bytes[forward.stage]
                change = during - activation_bytes[backward.stage]
            case Compute(Op.BACKWARD, work):
                during, change = 0.0, -activation_bytes[work.stage]
            case Compute(Op.BACKWARD_INPUT, work):
                change = deferred_bytes[work.stage] - activation_bytes[work.stage]
                during = max(change, 0.0)
            case Compute(Op.BACKWARD_WEIGHT, work):
                during, change = 0.0, -deferred_bytes[work.stage]
            case _:
                continue
        yield held + during, held + change
        held += change
