"""1F1B: a backward as soon as there is one, so that no rank holds more micro-batches than there are ranks.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training" (2019), section 3.2, with the flush at
the end of each step of "Memory-Efficient Pipeline-Parallel DNN Training" (2021). Rank r of P holds stage r; with
M micro-batches, of which a = min(P-r-1, M) go ahead:

    1  a    F
    2  M-a  F B
    3  a    B
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import B0, F0, spell


def one_f_one_b(ranks: int, microbatches: int) -> Program:
    """1F1B's compute order. Raises ValueError as ``check`` does."""
    check(ranks, microbatches)
    slots = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, microbatches)
        works = [Work(rank, k) for k in range(microbatches)]
        slots.append(spell([(ahead, (F0,)), (microbatches - ahead, (F0, B0)), (ahead, (B0,))], [works], [works]))
    return Program("1f1b", microbatches, (tuple(range(ranks)),), tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError unless there is a rank and a micro-batch; fewer micro-batches than ranks leave ranks idle."""
    check_ranks("1f1b", ranks)
    check_microbatches("1f1b", microbatches, 1)


def one_f_one_b_bubble(ranks: int, forward: float, backward: float) -> float:
    """Idle time of a rank, (P-1)(F+B): the way to the last rank and back. Exact with free messages."""
    return (ranks - 1) * (forward + backward)


def one_f_one_b_peak(ranks: int, microbatches: int) -> int:
    """The most micro-batches whose activations a rank holds at once: P on rank 0, if there are as many."""
    return min(ranks, microbatches)
