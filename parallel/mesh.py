"""Where a rank stands: rank <-> (pipeline, data, expert) coordinates and the groups that share something.

World = pipeline x data, rank = pipeline index * data + data index, so that the ranks that run one pipeline position
are contiguous. Expert parallelism lives inside the data axis, as DeepSeek-V3 does it: expert index = data index mod
expert, so an expert group is contiguous too. A stage lives wherever some route of the schedule passes (DualPipe: on
ranks p and P-1-p); the *replica group* of its parameters is all those positions x data, and for its routed experts
only the data indices that hold the same experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How many ways the work is split along each axis. Raises ValueError, naming ``layout.KEY``."""

    pipeline: int = 1
    """Pipeline ranks."""
    data: int = 1
    """Replicas of the pipeline, each with its own sequences."""
    expert: int = 1
    """Ways in which the routed experts of a layer are split over data-parallel ranks."""

    ranks_per_node: int = 0
    """Ranks of a machine, which hierarchical dispatch goes by; 0 takes as many as the launcher starts on each."""

    def __post_init__(self) -> None:
        for key in ("pipeline", "data", "expert"):
            if getattr(self, key) < 1:
                raise ValueError(f"layout.{key}={getattr(self, key)} must be at least 1")
        if self.ranks_per_node < 0:
            raise ValueError(f"layout.ranks_per_node={self.ranks_per_node} must not be negative")
        if self.data % self.expert:
            raise ValueError(f"layout.expert={self.expert} must divide layout.data ({self.data})")

    def check_nodes(self) -> None:
        """Raises ValueError unless expert groups hold whole nodes, or nodes whole expert groups, which hierarchical
        dispatch needs; ``ranks_per_node`` is known."""
        larger, smaller = max(self.expert, self.ranks_per_node), min(self.expert, self.ranks_per_node)
        if larger % smaller:
            raise ValueError(
                f"layout.ranks_per_node={self.ranks_per_node} must divide layout.expert ({self.expert}), or be a "
                "multiple of it: hierarchical dispatch needs expert groups of whole nodes"
            )

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data

    def rank(self, pipeline: int, data: int) -> int:
        return pipeline * self.data + data

    def pipeline_index(self, rank: int) -> int:
        return rank // self.data

    def data_index(self, rank: int) -> int:
        return rank % self.data

    def expert_index(self, rank: int) -> int:
        return self.data_index(rank) % self.expert

    def expert_group(self, rank: int) -> list[int]:
        """The ranks that hold, together, every expert of this rank's layers, in the order of the experts."""
        first = rank - self.expert_index(rank)
        return list(range(first, first + self.expert))

    def node_ranks(self, rank: int) -> list[int]:
        """Those of this rank's expert group that are on its node: the second hop of a hierarchical dispatch."""
        group, size = self.expert_group(rank), min(self.ranks_per_node, self.expert)
        first = self.expert_index(rank) // size * size
        return group[first : first + size]

    def local_peers(self, rank: int) -> list[int]:
        """Those of this rank's expert group that have its local index, one on each node: the first hop."""
        size = min(self.ranks_per_node, self.expert)
        return self.expert_group(rank)[self.expert_index(rank) % size :: size]

    def node(self, rank: int) -> int:
        """The node that a rank is on; 0 for all if nodes are not known."""
        return rank // self.ranks_per_node if self.ranks_per_node else 0

    def far(self, rank: int, other: int) -> bool:
        """Whether two ranks are on different nodes, if nodes are known."""
        return self.node(rank) != self.node(other)

    def keeper(self, rank: int) -> int:
        """Who keeps a copy of this rank's state: its like on the next node, or where there is one node only, or none
        is known, the next rank."""
        return (rank + self._to_keeper) % self.world_size

    def kept(self, rank: int) -> int:
        """Whose state this rank keeps a copy of."""
        return (rank - self._to_keeper) % self.world_size

    @property
    def _to_keeper(self) -> int:
        return self.ranks_per_node if 0 < self.ranks_per_node < self.world_size else 1

    def dense_replicas(self, positions: Sequence[int]) -> list[int]:
        """The ranks that hold a copy of a stage that lives at these pipeline positions."""
        return [self.rank(p, d) for p in sorted(set(positions)) for d in range(self.data)]

    def expert_replicas(self, positions: Sequence[int], expert_index: int) -> list[int]:
        """Those of ``dense_replicas`` that hold the routed experts of one expert index."""
        return [r for r in self.dense_replicas(positions) if self.expert_index(r) == expert_index]
