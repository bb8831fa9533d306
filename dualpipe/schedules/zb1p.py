"""ZB1P (ZB-H1): 1F1B whose weight gradients are put off, to fill the end of the step.

Qi et al., "Zero Bubble Pipeline Parallelism" (2023), section 2.1. Rank r of P holds stage r. The later a rank gets its
first micro-batch, the more W it leaves for the end, so that every rank holds as many micro-batches as the first:

    1  P-r-1  F              4  P-r-1  I W
    2  r      F I            5  r      W
    3  M-P+1  F I W
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import F0, I0, Phase, W, spell


def phases(ranks: int, rank: int, microbatches: int) -> list[Phase]:
    """The table for one rank: how many times, and which turns."""
    ahead = ranks - rank - 1
    return [
        (ahead, (F0,)),
        (rank, (F0, I0)),
        (microbatches - ranks + 1, (F0, I0, W)),
        (ahead, (I0, W)),
        (rank, (W,)),
    ]


def zb1p(ranks: int, microbatches: int) -> Program:
    """ZB1P's compute order. Raises ValueError as ``check`` does."""
    check(ranks, microbatches)
    slots = []
    for rank in range(ranks):
        works = [Work(rank, k) for k in range(microbatches)]
        slots.append(spell(phases(ranks, rank, microbatches), [works], [works]))
    return Program("zb1p", microbatches, (tuple(range(ranks)),), tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError for fewer micro-batches than ranks: W could not fill the way back."""
    check_ranks("zb1p", ranks)
    check_microbatches("zb1p", microbatches, ranks, "layout.pipeline")


def zb1p_bubble(ranks: int, forward: float, backward_input: float, backward_weight: float) -> float:
    """Idle time of a rank, (P-1)(F+B-2W) with B = I + W: what 1F1B idles, less the W that fill the way back.

    Exact on every rank for F = I = W and free messages.
    """
    return (ranks - 1) * (forward + backward_input - backward_weight)


def zb1p_peak(ranks: int) -> int:
    """The most micro-batches whose activations a rank holds at once, kept until W: P, as for 1F1B."""
    return ranks
