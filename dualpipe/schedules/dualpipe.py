"""DualPipe: micro-batches enter the pipeline from both ends, and forwards hide the communication of backwards.

DeepSeek-V3 technical report, section 3.2.1. P ranks hold P stages in two copies: stage s of direction 0 lives on rank
s, of direction 1 on rank P-1-s. The order of a rank is a table of eight phases; with h = min(r, P-1-r), H = P/2 and
n = M/2 micro-batches in each direction:

    1  2(H-h-1)  F0                5  H-h-1   B1 F1&B0
    2  h+1       F0 F1             6  h+1     B1 B0, of which the last h+1 backwards are I
    3  H-h-1     I1 W F1           7  H-h-1   W I0
    4  n-2H+h+1  F0&B1 F1&B0       8  h+1     W

Index 0 is the direction whose forward reaches the rank's half of the pipeline first, 1 the other.
"""

from dualpipe.program import Program, Work
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.schedules.table import B0, B1, F0, F1, I0, I1, Phase, W, spell


def phases(half: int, h: int, each: int) -> list[Phase]:
    """The table for a rank at distance ``h`` from its end of the pipeline: how many times, and which turns.

    ``half`` is H; ``each`` is the number of micro-batches of one index, at least 2H.
    """
    middle = int(h == half - 1)
    pairs, mixed = divmod(h + 1, 2)
    return [
        (2 * (half - h - 1), (F0,)),
        (h + 1, (F0, F1)),
        (half - h - 1, (I1, W, F1)),
        # The middle ranks wait for the first gradient wherever a backward takes longer than a forward: apart, F0 fills
        # the wait.
        (middle, (F0, B1, F1 + B0)),
        (each - 2 * half + h + 1 - middle, (F0 + B1, F1 + B0)),
        (half - h - 1, (B1, F1 + B0)),
        # h+1 times B1 B0, with I for B in the second half: the next rank is waiting, and the W fill the end.
        (pairs, (B1, B0)),
        (mixed, (B1, I0)),
        (pairs, (I1, I0)),
        (half - h - 1, (W, I0)),
        (h + 1, (W,)),
    ]


def dualpipe(ranks: int, microbatches: int) -> Program:
    """DualPipe's compute order. ``microbatches`` counts both directions; direction 0 takes the first half.

    One rank runs every micro-batch forward and backward in turn. Raises ValueError as ``check`` does.
    """
    check(ranks, microbatches)
    if ranks == 1:
        alone = [Work(0, k) for k in range(microbatches)]
        return Program("dualpipe", microbatches, ((0,),), (spell([(microbatches, (F0, B0))], [alone], [alone]),))
    each = microbatches // 2
    slots = []
    for rank in range(ranks):
        works = [[Work(rank, k) for k in range(each)], [Work(ranks - 1 - rank, each + k) for k in range(each)]]
        if rank >= ranks // 2:  # direction 1 arrives here first
            works.reverse()
        slots.append(spell(phases(ranks // 2, min(rank, ranks - 1 - rank), each), works, works))
    routes = (tuple(range(ranks)), tuple(reversed(range(ranks))))
    return Program("dualpipe", microbatches, routes, tuple(slots))


def check(ranks: int, microbatches: int) -> None:
    """Raises ValueError unless ``ranks`` is 1 or even and ``microbatches`` is even and at least twice that (on one
    rank: at least 1)."""
    check_ranks("dualpipe", ranks, even=True)
    if ranks == 1:
        check_microbatches("dualpipe", microbatches, 1)
    else:
        check_microbatches("dualpipe", microbatches, 2 * ranks, "2 x layout.pipeline", multiple=2)


def dualpipe_bubble(
    ranks: int, forward: float, backward_input: float, backward_weight: float, overlapped: float
) -> float:
    """Idle time of a rank by the report's closed form, (P/2-1)(F&B + B - 3W) with B = I + W, and free messages.

    Exact on every rank for F = I = W and F&B = F + B; an upper bound for F <= I, W <= I and F&B <= F + B. F itself
    does not enter. One rank has no bubble.
    """
    return max(ranks // 2 - 1, 0) * (overlapped + backward_input + backward_weight - 3 * backward_weight)


def dualpipe_peak(ranks: int) -> int:
    """The most micro-batches whose activations a rank holds at once: P + 1, both halves of a pair counted.

    One rank never runs a pair and holds 1, within the bound.
    """
    return ranks + 1
