"""DualPipeV: DualPipe's upper half of the pipeline alone, with both directions made into one V.

From deepseek-ai/DualPipe, after the "cut-in-half" procedure of Sea AI Lab (Qi et al., "DualPipe could be better without
the Dual", 2025). P ranks hold 2P stages: rank r those with the numbers r and 2P-1-r, once each, so that parameters have
no twins. A micro-batch goes down the ranks and comes back up. The order is that of DualPipe's first P ranks of 2P
(``dualpipe.phases``), with the way down as index 0 and the way up as index 1, each of them meeting all M micro-batches.
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.dualpipe import phases
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import spell


def dualpipev(ranks: int, microbatches: int) -> Program:
    """DualPipeV's compute order. Raises ValueError as ``check`` does."""
    check(ranks, microbatches)
    slots = []
    for rank in range(ranks):
        works = [[Work(stage, k) for k in range(microbatches)] for stage in (rank, 2 * ranks - 1 - rank)]
        slots.append(spell(phases(ranks, rank, microbatches), works, works))
    return Program("dualpipev", microbatches, ((*range(ranks), *reversed(range(ranks))),), tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError for fewer micro-batches than twice the ranks."""
    check_ranks("dualpipev", ranks)
    check_microbatches("dualpipev", microbatches, 2 * ranks, "2 x layout.pipeline")


def dualpipev_bubble(ranks: int, backward_input: float, backward_weight: float, overlapped: float) -> float:
    """Idle time of a rank, (P-1)(F&B + B - 3W) with B = I + W, durations of one of its two stages, and free messages.

    Exact on every rank for F = I = W and F&B = F + B; an upper bound for F <= I, W <= I and F&B <= F + B.
    """
    return (ranks - 1) * (overlapped + backward_input - 2 * backward_weight)


def dualpipev_peak(ranks: int) -> int:
    """The most micro-batches whose activations a rank holds at once, each in one of its two stages: 2P + 1, both
    halves of a pair counted."""
    return 2 * ranks + 1
