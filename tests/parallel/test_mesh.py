"""Coordinates and groups: every rank has one place, and groups split the world without gaps or overlaps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import Layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    expert = draw(st.integers(1, 6))
    return Layout(draw(st.integers(1, 8)), expert * draw(st.integers(1, 6)), expert)


@given(layouts())
def test_a_rank_has_one_place(layout: Layout) -> None:
    ranks = range(layout.world_size)
    assert layout.world_size == layout.pipeline * layout.data
    places = [(layout.pipeline_index(r), layout.data_index(r)) for r in ranks]
    # Ranks of one pipeline position are neighbours.
    assert places == [(p, d) for p in range(layout.pipeline) for d in range(layout.data)]
    assert [layout.rank(p, d) for p, d in places] == list(ranks)


@given(layouts())
def test_expert_groups_are_contiguous_and_partition_the_world(layout: Layout) -> None:
    groups = {tuple(layout.expert_group(r)) for r in range(layout.world_size)}
    assert sorted(r for group in groups for r in group) == list(range(layout.world_size))
    for group in groups:
        assert group == tuple(range(group[0], group[0] + layout.expert))
        assert [layout.expert_index(r) for r in group] == list(range(layout.expert))
        assert len({layout.pipeline_index(r) for r in group}) == 1
    for rank in range(layout.world_size):
        assert rank in layout.expert_group(rank)


@given(layouts())
def test_replicas_of_a_stage_are_its_positions_times_the_data_axis(layout: Layout) -> None:
    for p in range(layout.pipeline):
        positions = [p, layout.pipeline - 1 - p]  # of a DualPipe stage
        replicas = layout.dense_replicas(positions)
        assert replicas == [r for r in range(layout.world_size) if layout.pipeline_index(r) in positions]
        split = [layout.expert_replicas(positions, e) for e in range(layout.expert)]
        assert sorted(r for part in split for r in part) == replicas
        # Each expert group holds every expert once, so it gives one rank to each expert's replicas.
        for rank in replicas:
            group = set(layout.expert_group(rank))
            assert [len(group.intersection(part)) for part in split] == [1] * layout.expert


@pytest.mark.parametrize("key", ["pipeline", "data", "expert"])
def test_an_axis_is_at_least_one(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^layout\.{key}=0 must be at least 1"):
        Layout(**{key: 0})


def test_expert_parallelism_lives_inside_the_data_axis() -> None:
    with pytest.raises(ValueError, match=r"^layout\.expert=3 must divide layout\.data \(4\)"):
        Layout(2, 4, 3)
