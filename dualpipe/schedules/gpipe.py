"""GPipe: all forwards, then all backwards.

Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism" (2019), section 2.2. Rank
r holds stage r. With M micro-batches:

    1  M  F
    2  M  B
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import B0, F0, spell


def gpipe(ranks: int, microbatches: int) -> Program:
    """GPipe's compute order. Raises ValueError as ``check`` does."""
    check(ranks, microbatches)
    slots = []
    for rank in range(ranks):
        works = [Work(rank, k) for k in range(microbatches)]
        slots.append(spell([(microbatches, (F0,)), (microbatches, (B0,))], [works], [works]))
    return Program("gpipe", microbatches, (tuple(range(ranks)),), tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError unless there is a rank and a micro-batch."""
    check_ranks("gpipe", ranks)
    check_microbatches("gpipe", microbatches, 1)


def gpipe_bubble(ranks: int, forward: float, backward: float) -> float:
    """Idle time of a rank, (P-1)(F+B): the way to the last rank and back. Exact with free messages."""
    return (ranks - 1) * (forward + backward)


def gpipe_peak(microbatches: int) -> int:
    """The most micro-batches whose activations a rank holds at once: all of them."""
    return microbatches
