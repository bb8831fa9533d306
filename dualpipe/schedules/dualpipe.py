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

from collections import deque
from collections.abc import Callable, Iterator

from dualpipe.program import Compute, Op, Overlap, Program, Slot, Work

# One slot of the table: an operation and its index, or a forward and a backward as a pair.
Turn = tuple[tuple[Op, int], ...]

F0: Turn = ((Op.FORWARD, 0),)
F1: Turn = ((Op.FORWARD, 1),)
B0: Turn = ((Op.BACKWARD, 0),)
B1: Turn = ((Op.BACKWARD, 1),)
I0: Turn = ((Op.BACKWARD_INPUT, 0),)
I1: Turn = ((Op.BACKWARD_INPUT, 1),)
W: Turn = ((Op.BACKWARD_WEIGHT, 0),)  # of either index: the oldest that is deferred


def phases(half: int, h: int, each: int) -> list[tuple[int, tuple[Turn, ...]]]:
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


def compute_order(half: int, h: int, each: int, place: Callable[[int, int], Work]) -> tuple[Slot, ...]:
    """The table of ``phases`` spelled out; ``place(index, k)`` is the work of the k-th micro-batch of an index."""

    def works(index: int) -> Iterator[Work]:
        return (place(index, k) for k in range(each))

    forwards, backwards = (works(0), works(1)), (works(0), works(1))
    deferred: deque[Work] = deque()

    def slot(turn: Turn) -> Slot:
        match turn:
            case ((Op.FORWARD, f), (Op.BACKWARD, b)):
                return Overlap(next(forwards[f]), next(backwards[b]))
            case ((Op.FORWARD, index),):
                return Compute(Op.FORWARD, next(forwards[index]))
            case ((Op.BACKWARD, index),):
                return Compute(Op.BACKWARD, next(backwards[index]))
            case ((Op.BACKWARD_INPUT, index),):
                deferred.append(next(backwards[index]))
                return Compute(Op.BACKWARD_INPUT, deferred[-1])
            case ((Op.BACKWARD_WEIGHT, _),):
                return Compute(Op.BACKWARD_WEIGHT, deferred.popleft())
            case _:
                raise AssertionError(turn)

    return tuple(slot(turn) for times, turns in phases(half, h, each) for _ in range(times) for turn in turns)


def dualpipe(ranks: int, microbatches: int) -> Program:
    """DualPipe's compute order. ``microbatches`` counts both directions; direction 0 takes the first half.

    One rank runs every micro-batch forward and backward in turn. Raises ValueError unless ``ranks`` is 1 or even and
    ``microbatches`` is even and at least twice that (on one rank: at least 1).
    """
    _check_ranks(ranks)
    rule = "1" if ranks == 1 else f"2 x layout.pipeline ({2 * ranks})"
    if microbatches < (1 if ranks == 1 else 2 * ranks) or (ranks > 1 and microbatches % 2):
        raise ValueError(_microbatches_error(ranks, microbatches, rule))
    if ranks == 1:
        alone = tuple(Compute(op, Work(0, m)) for m in range(microbatches) for op in (Op.FORWARD, Op.BACKWARD))
        return Program("dualpipe", microbatches, ((0,),), (alone,))
    each = microbatches // 2
    slots = tuple(
        compute_order(ranks // 2, min(rank, ranks - 1 - rank), each, _placement(ranks, rank, each))
        for rank in range(ranks)
    )
    return Program("dualpipe", microbatches, _routes(ranks), slots)


def forward_only(ranks: int, microbatches: int) -> Program:
    """The forwards of a validation pass over the stages as DualPipe places them, for any even number of micro-batches.

    A rank runs what reaches it first until the other direction arrives, then alternates: with forwards of one length
    and free messages the last rank ends after M + P - 2 of them, which no order betters.
    """
    _check_ranks(ranks)
    if microbatches < min(ranks, 2) or (ranks > 1 and microbatches % 2):
        raise ValueError(_microbatches_error(ranks, microbatches, str(min(ranks, 2))))
    if ranks == 1:
        alone = tuple(Compute(Op.FORWARD, Work(0, m)) for m in range(microbatches))
        return Program("dualpipe-forward", microbatches, ((0,),), (alone,))
    each = microbatches // 2
    slots = []
    for rank in range(ranks):
        place = _placement(ranks, rank, each)
        # The other direction arrives after as many forwards as fit into its way here and this direction's way there.
        lead = min(each, ranks - 2 * min(rank, ranks - 1 - rank) - 2)
        order = [place(0, k) for k in range(lead)]
        for k in range(each):
            order += [place(0, k + lead)] if k + lead < each else []
            order += [place(1, k)]
        slots.append(tuple(Compute(Op.FORWARD, work) for work in order))
    return Program("dualpipe-forward", microbatches, _routes(ranks), tuple(slots))


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


def _routes(ranks: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(ranks)), tuple(reversed(range(ranks))))


def _placement(ranks: int, rank: int, each: int) -> Callable[[int, int], Work]:
    """Where index 0 or 1 and the k-th micro-batch of it are on a rank: the far half meets direction 1 first."""

    def place(index: int, k: int) -> Work:
        direction = index if rank < ranks // 2 else 1 - index
        return Work(rank if direction == 0 else ranks - 1 - rank, direction * each + k)

    return place


def _check_ranks(ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"layout.pipeline={ranks} must be at least 1")
    if ranks > 1 and ranks % 2:
        raise ValueError(f"layout.pipeline={ranks} must be 1 or even for schedule dualpipe")


def _microbatches_error(ranks: int, microbatches: int, least: str) -> str:
    even = "even and " if ranks > 1 else ""
    return (
        "the number of micro-batches (train.global_batch_size / (layout.data x train.micro_batch_size)) = "
        f"{microbatches} must be {even}at least {least} for schedule dualpipe"
    )
