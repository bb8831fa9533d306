"""Ranks that share the cores of a node, as they do on a machine without GPUs.

While n ranks of a node compute on c < n cores, the kernel gives each of them c/n of a core, and all of them go on n/c
times as slowly; more slowly by what cores are idle meanwhile, since the kernel takes a while to move a rank over. So
the order of events stays what it is with a core for every rank; only time runs more slowly, by a factor that changes
whenever a rank starts or stops computing.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

from dualpipe.progress import Progress, Span
from parallel.mesh import Layout


def share_cores(progress: Progress, layout: Layout, ranks_per_node: int, cores: int, busy: float) -> None:
    """Stretch a play of one pipeline in which every rank had a core, in place. All replicas run alike. ``busy``: the
    share of the cores' time that ranks use where they outnumber them."""
    later = _clock(progress.spans, layout, ranks_per_node, cores, busy)
    progress.spans = [[_moved(span, later) for span in spans] for spans in progress.spans]
    progress.clock = [later(time) for time in progress.clock]
    progress.reduced = [later(time) for time in progress.reduced]
    for holdings in progress.holdings:
        holdings.curve = [(later(time), alive, size) for time, alive, size in holdings.curve]


def _clock(
    spans: Sequence[Sequence[Span]], layout: Layout, ranks_per_node: int, cores: int, busy: float
) -> Callable[[float], float]:
    """From a time with a core for every rank to the time with shared ones; the busiest node holds up all."""
    starts: dict[float, Counter[int]] = {}  # time -> how many ranks more, by node, compute from then on
    for position, own in enumerate(spans):
        on_node = Counter(layout.rank(position, data) // ranks_per_node for data in range(layout.data))
        for span in own:
            starts.setdefault(span.start, Counter()).update(on_node)
            starts.setdefault(span.end, Counter()).subtract(on_node)
    times = sorted({0.0, *starts})
    computing: Counter[int] = Counter()
    factors = []
    for time in times:
        computing.update(starts.get(time, Counter()))
        most = max(computing.values(), default=0)
        factors.append(most / (cores * busy) if most > cores else 1.0)
    lengths = [(after - time) * factor for time, after, factor in zip(times, times[1:], factors, strict=False)]
    reached = list(accumulate(lengths, initial=0.0))

    def later(time: float) -> float:
        place = bisect_right(times, time) - 1
        return reached[place] + (time - times[place]) * factors[place]

    return later


def _moved(span: Span, later: Callable[[float], float]) -> Span:
    waited = None if span.waited is None else span.waited._replace(ready=later(span.waited.ready))
    inputs = tuple(each._replace(sent=later(each.sent), arrival=later(each.arrival)) for each in span.inputs)
    return span._replace(start=later(span.start), end=later(span.end), waited=waited, inputs=inputs)
