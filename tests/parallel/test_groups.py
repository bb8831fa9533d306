"""Process groups: each rank's have the members that the mesh says."""

import torch.distributed as dist

from dualpipe.schedules.dualpipe import dualpipe
from parallel.groups import Groups
from parallel.mesh import Layout
from tests.ranks import run_ranks


def made_groups(rank: int, layout: Layout) -> dict[str, list[int] | None]:
    """The members of the groups that this rank is in, as torch sees them."""
    groups = Groups(layout, dualpipe(layout.pipeline, 2 * layout.pipeline).routes)
    position, expert = layout.pipeline_index(rank), layout.expert_index(rank)
    positions = [position, layout.pipeline - 1 - position]
    wanted = {
        "dense": layout.dense_replicas(positions),
        "routed": layout.expert_replicas(positions, expert),
        "expert": layout.expert_group(rank),
    }
    found = {name: groups.of(ranks) for name, ranks in wanted.items()}
    return {name: None if g is None else dist.get_process_group_ranks(g) for name, g in found.items()}


def test_process_groups_have_the_ranks_that_they_are_asked_for() -> None:
    assert run_ranks(made_groups, 4, Layout(2, 2, 2)) == [
        {"dense": [0, 1, 2, 3], "routed": [0, 2], "expert": [0, 1]},
        {"dense": [0, 1, 2, 3], "routed": [1, 3], "expert": [0, 1]},
        {"dense": [0, 1, 2, 3], "routed": [0, 2], "expert": [2, 3]},
        {"dense": [0, 1, 2, 3], "routed": [1, 3], "expert": [2, 3]},
    ]
    alone = {"dense": [0, 1, 2, 3], "routed": [0, 1, 2, 3], "expert": None}
    assert run_ranks(made_groups, 4, Layout(2, 2, 1)) == [alone] * 4
