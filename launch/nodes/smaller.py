"""How a run goes on with fewer nodes than it wants: pure arithmetic over layouts.

The pipeline stays, because it is the model's cut into stages. Data parallelism shrinks, and with it expert parallelism
where it has to; the global batch stays, so that each replica has more micro-batches. Every node that trains starts as
many ranks as the others; nodes that are not needed for that wait as spares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from parallel.mesh import Layout


@dataclass(frozen=True)
class Share:
    """``layout`` on so many ``nodes``, each with so many ``ranks``."""

    nodes: int
    ranks: int
    layout: Layout

    @property
    def keys(self) -> str:
        return f"layout.data={self.layout.data} layout.expert={self.layout.expert}"


def shares(wanted: Share, fits: Callable[[Layout], bool]) -> list[Share]:
    """What can train, from ``wanted`` down, each on fewer nodes than the one before: with the most data parallelism
    that so few nodes hold, then the most expert parallelism, then on the fewest nodes. ``fits``: whether the run can
    have a layout; it is asked about few."""
    found = [wanted]
    for share in _candidates(wanted):
        if share.nodes < found[-1].nodes and fits(share.layout):
            found.append(share)
    return found


def largest(found: list[Share], nodes: int) -> Share | None:
    """Of what ``shares`` gave, what so many nodes train."""
    return next((share for share in found if share.nodes <= nodes), None)


def _candidates(wanted: Share) -> Iterator[Share]:
    """Everything with equal nodes, the best first."""
    layout = wanted.layout
    for data in range(layout.data, 0, -1):
        world_size = layout.pipeline * data
        spread = [(world_size // ranks, ranks) for ranks in range(wanted.ranks, 0, -1) if world_size % ranks == 0]
        for expert in (ways for ways in range(min(layout.expert, data), 0, -1) if data % ways == 0):
            for nodes, ranks in spread:
                yield Share(nodes, ranks, replace(layout, data=data, expert=expert, ranks_per_node=ranks))
