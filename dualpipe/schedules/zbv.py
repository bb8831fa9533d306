"""ZBV: two stages on each rank in the shape of a V, and weight gradients wherever a rank would wait.

ZB-V of Qi et al., "Zero Bubble Pipeline Parallelism" (2023). Rank r of P holds stages r and 2P-1-r: micro-batches go
down the ranks and come back up, so that the first rank also has the loss. The order keeps every rank busy from its
first forward to its last W when F = I = W, in the memory of 1F1B:

    1  2(P-r)-1    F0                    5  P-r-1  I0 W F1 I1 W
    2  r           F1 F0                 6  r      I0 I1
    3  P-r         F1 I1 W               7  P-r    I0 W
    4  M-2P+r+1    F0 I0 W F1 I1 W       8  2r     W

Index 0 is the rank's stage on the way down, 1 the one on the way up.
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import F0, F1, I0, I1, Phase, W, spell


def phases(ranks: int, rank: int, microbatches: int) -> list[Phase]:
    """The table for one rank: how many times, and which turns."""
    above = ranks - rank
    return [
        (2 * above - 1, (F0,)),
        (rank, (F1, F0)),
        (above, (F1, I1, W)),
        (microbatches - 2 * ranks + rank + 1, (F0, I0, W, F1, I1, W)),
        (above - 1, (I0, W, F1, I1, W)),
        (rank, (I0, I1)),
        (above, (I0, W)),
        (2 * rank, (W,)),
    ]


def zbv(ranks: int, microbatches: int) -> Program:
    """ZBV's compute order. Raises ValueError as ``check`` does."""
    check(ranks, microbatches)
    slots = []
    for rank in range(ranks):
        works = [[Work(stage, k) for k in range(microbatches)] for stage in (rank, 2 * ranks - 1 - rank)]
        slots.append(spell(phases(ranks, rank, microbatches), works, works))
    return Program("zbv", microbatches, ((*range(ranks), *reversed(range(ranks))),), tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError for fewer micro-batches than the way down and up holds: 2P-1."""
    check_ranks("zbv", ranks)
    check_microbatches("zbv", microbatches, 2 * ranks - 1, "2 x layout.pipeline - 1")


def zbv_bubble(ranks: int, forward: float) -> float:
    """Idle time of a rank, (P-1)F with F of one of its two stages: the last rank's wait for its first micro-batch,
    and nothing after it. Exact on every rank for F = I = W and free messages."""
    return (ranks - 1) * forward


def zbv_peak(ranks: int) -> int:
    """The most micro-batches whose activations a rank holds at once, each in one of its two stages: 2P, as much
    memory as P micro-batches in a stage twice as thick, which is 1F1B's."""
    return 2 * ranks
