"""Interleaved 1F1B: a rank runs several thin stages instead of a thick one, which shortens the bubble.

Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (2021), section 2.2.
Rank r of P holds the stages r, P+r, 2P+r, ...: one of each of v *chunks* of P stages. Micro-batches go through a chunk
in groups of P: the k-th forward of a rank is in chunk k / P mod v, the k-th backward in chunk v-1 - k / P mod v. With
n = v M of each, of which a = min(2(P-r-1) + (v-1)P, n) go ahead:

    1  a    F
    2  n-a  F B
    3  a    B
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import B0, F0, spell


def interleaved(ranks: int, microbatches: int, chunks: int) -> Program:
    """The compute order of interleaved 1F1B. Raises ValueError as ``check`` does."""
    check(ranks, microbatches, chunks)
    total = chunks * microbatches
    order = [
        (k // ranks % chunks, k // (ranks * chunks) * ranks + k % ranks)  # (chunk, micro-batch)
        for k in range(total)
    ]
    slots = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, total)
        forwards = [Work(chunk * ranks + rank, k) for chunk, k in order]
        backwards = [Work((chunks - 1 - chunk) * ranks + rank, k) for chunk, k in order]
        slots.append(spell([(ahead, (F0,)), (total - ahead, (F0, B0)), (ahead, (B0,))], [forwards], [backwards]))
    return Program("interleaved", microbatches, (tuple(range(ranks)) * chunks,), tuple(slots))


def check(ranks: int, microbatches: int, chunks: int) -> None:
    """Raises ValueError unless ``microbatches`` is a multiple of ``ranks`` and ``chunks`` is at least 2."""
    check_ranks("interleaved", ranks)
    if chunks < 2:
        raise ValueError(f"schedule.chunks={chunks} must be at least 2 for schedule interleaved")
    multiple = f"a multiple of layout.pipeline ({ranks})"
    check_microbatches("interleaved", microbatches, 1, multiple=ranks, multiple_rule=multiple)


def interleaved_bubble(ranks: int, forward: float, backward: float) -> float:
    """Idle time of a rank, (P-1)(F+B) with F and B of one thin stage: 1F1B's, divided by the chunks. Exact with free
    messages."""
    return (ranks - 1) * (forward + backward)


def interleaved_peak(ranks: int, microbatches: int, chunks: int) -> int:
    """The most micro-batches whose activations a rank holds at once, each in one thin stage: on rank 0, those that go
    ahead and one more."""
    return min(2 * (ranks - 1) + (chunks - 1) * ranks + 1, chunks * microbatches)
