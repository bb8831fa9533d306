"""Where the stages can be: what a search chooses between before it orders anything.

linear       P stages, one a rank; a micro-batch goes down the ranks                     as in 1F1B, ZB1P
twins        P stages, each on two ranks; micro-batches enter from both ends             as in DualPipe
v            2P stages, two a rank; a micro-batch goes down the ranks and comes back up   as in ZBV, DualPipeV
interleaved  2P stages, two a rank; a micro-batch goes down the ranks twice              as in interleaved 1F1B
"""

from dataclasses import dataclass

from dualpipe.cost import Costs
from dualpipe.program import Program


@dataclass(frozen=True)
class Placement:
    """``routes`` as in ``Program``."""

    name: str
    routes: tuple[tuple[int, ...], ...]

    @property
    def share(self) -> float:
        """What a stage holds of one P-th of the model."""
        return (max(self.routes[0]) + 1) / len(self.routes[0])

    @property
    def passes(self) -> int:
        """How often a micro-batch comes past each rank."""
        return len(self.routes[0]) // (max(self.routes[0]) + 1)

    def program(self, schedule: str, microbatches: int) -> Program:
        """A program without any slots."""
        return Program(schedule, microbatches, self.routes, ((),) * (max(self.routes[0]) + 1))


def placements(ranks: int, microbatches: int) -> list[Placement]:
    """All that these sizes allow; twins need an even number of ranks and of micro-batches."""
    down, up = tuple(range(ranks)), tuple(reversed(range(ranks)))
    found = [Placement("linear", (down,))]
    if ranks > 1 and ranks % 2 == 0 and microbatches % 2 == 0:
        found.append(Placement("twins", (down, up)))
    if ranks > 1:
        found += [Placement("v", ((*down, *up),)), Placement("interleaved", ((*down, *down),))]
    return found


def share_of(costs: Costs, share: float) -> Costs:
    """The costs of stages of that share. Raises ValueError for costs of single stages, which only a whole P-th has."""
    return costs if share == 1 else costs.scaled(share)
