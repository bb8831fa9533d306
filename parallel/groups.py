"""The groups of a layout: expert groups, and the replica groups of every stage and every slice of experts."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist

from parallel.collectives import Group
from parallel.lanes import SharedGroup
from parallel.mesh import Layout
from parallel.shared_memory import SharedMemory


class Groups:
    """Groups by their ranks. Collective: every rank of the world makes all of them, in the same order.

    ``hierarchical``: those of its dispatch's hops too; ``ends``: that of all who hold the first stage or the last.
    ``timeout``: of a collective; a group does not inherit that of the world. ``of`` gives None for a group of one,
    which has nobody to talk to. Those that ``memory`` joins share it; the others are process groups.
    """

    def __init__(
        self,
        layout: Layout,
        routes: Iterable[Sequence[int]],
        hierarchical: bool = False,
        ends: bool = False,
        timeout: timedelta | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        stages = [set(positions) for positions in zip(*routes, strict=True)]
        world = range(layout.world_size)
        wanted = [layout.expert_group(rank) for rank in world[:: layout.expert]]
        if hierarchical:
            wanted += [hop(rank) for hop in (layout.local_peers, layout.node_ranks) for rank in world]
        for positions in stages:
            wanted.append(layout.dense_replicas(sorted(positions)))
            wanted += [layout.expert_replicas(sorted(positions), e) for e in range(layout.expert)]
        if ends:
            wanted.append(layout.dense_replicas(sorted(stages[0] | stages[-1])))
        self._groups: dict[tuple[int, ...], Group] = {}
        for ranks in dict.fromkeys(map(tuple, wanted)):
            if len(ranks) == 1:
                continue
            if memory is None or not memory.joins(ranks):
                self._groups[ranks] = dist.new_group(list(ranks), timeout=timeout)
            elif dist.get_rank() in ranks:
                self._groups[ranks] = SharedGroup(memory, ranks)
        if memory is not None:
            memory.begun()

    def of(self, ranks: Sequence[int]) -> Group | None:
        return None if len(ranks) == 1 else self._groups[tuple(ranks)]
