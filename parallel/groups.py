"""The process groups of a layout: expert groups, and the replica groups of every stage and every slice of experts."""

from collections.abc import Iterable, Sequence

import torch.distributed as dist

from parallel.mesh import Layout


class Groups:
    """Process groups by their ranks. Collective: every rank of the world makes all of them, in the same order.

    ``of`` gives None for a group of one, which has nobody to talk to.
    """

    def __init__(self, layout: Layout, routes: Iterable[Sequence[int]]) -> None:
        stages = [set(positions) for positions in zip(*routes, strict=True)]
        wanted = [layout.expert_group(rank) for rank in range(0, layout.world_size, layout.expert)]
        for positions in stages:
            wanted.append(layout.dense_replicas(sorted(positions)))
            wanted += [layout.expert_replicas(sorted(positions), e) for e in range(layout.expert)]
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for ranks in wanted:
            if len(ranks) > 1 and tuple(ranks) not in self._groups:
                self._groups[tuple(ranks)] = dist.new_group(ranks)

    def of(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        return None if len(ranks) == 1 else self._groups[tuple(ranks)]
