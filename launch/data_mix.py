"""Which source a sequence is from, when several of them have weights.

Visit v of the endless row is given the number u(v) in [0, 1) that v's binary digits spell in reverse (van der Corput's
sequence), and taken from the source in whose share of [0, 1) that number lies. So every stretch of visits is mixed as
the whole is: after n visits no source is off its share by more than 2 + log2(n) visits, for any weights. How often each
source was visited before is known without walking there, so the stream can be entered anywhere.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

_BITS = 62
"""Binary digits of u; visits are below 2**62."""


class Mixture:
    """``weights``: positive, in any unit."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        total = sum(shares)
        self.shares = [share / total for share in shares]
        """Exact, as the weights are written in decimal."""
        sums = [sum(self.shares[:end]) for end in range(1, len(shares) + 1)]
        self._edges = [int(part * 2**_BITS) for part in sums]

    def place(self, visits: Numbers) -> tuple[Numbers, Numbers]:
        """For each visit its source, and how many visits to that source come before it."""
        sources = np.searchsorted(np.array(self._edges), _reversed(visits), side="right")
        before = self.counts(visits)
        return sources.astype(np.int64), before[sources, np.arange(len(visits))]

    def counts(self, visits: Numbers) -> Numbers:
        """[sources, len(visits)]: how many of the first ``visits`` visits are to each source."""
        below = np.stack([np.zeros_like(visits), *(_count_below(visits, edge) for edge in self._edges)])
        return np.diff(below, axis=0)


def _reversed(visits: Numbers) -> Numbers:
    result = np.zeros_like(visits)
    for bit in range(int(visits.max(initial=0)).bit_length()):
        result |= (visits >> bit & 1) << (_BITS - 1 - bit)
    return result


def _count_below(visits: Numbers, edge: int) -> Numbers:
    """How many v below each of ``visits`` have a reversed number below ``edge``: those that agree with it in the first
    j - 1 digits and have 0 where it has its j-th, a 1, for each such j. They are every 2**j-th v."""
    if edge == 2**_BITS:
        return visits.copy()
    count, most = np.zeros_like(visits), int(visits.max(initial=0))
    first = 0  # the least v whose digits agree so far
    for j in range(1, _BITS + 1):
        if first >= most:
            break
        if edge >> (_BITS - j) & 1:
            count += (visits + (2**j - 1 - first)) >> j
            first |= 1 << (j - 1)
    return count
