"""Which step is safe: never one that is not whole, never an older one than there is."""

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import Layout
from parallel.recovery import Copy, newest_complete, newest_whole


@st.composite
def survivors(draw: st.DrawFn) -> tuple[int, list[Copy], set[Copy]]:
    """(ranks, the copies that are left of any that there may be, and those among them that are damaged)."""
    ranks = draw(st.integers(1, 5))
    rank, step = st.integers(0, ranks - 1), st.integers(0, 4)
    copies = draw(st.lists(st.builds(Copy, rank, rank, step), unique=True, max_size=60))
    damaged = draw(st.sets(st.sampled_from(copies))) if copies else set()
    return ranks, copies, damaged


@given(survivors())
def test_the_newest_step_that_is_whole_is_found_and_no_other(case: tuple[int, list[Copy], set[Copy]]) -> None:
    ranks, copies, damaged = case
    read: list[Copy] = []

    def damaged_of(chosen: list[Copy]) -> Collection[Copy]:
        read.extend(chosen)
        return damaged.intersection(chosen)

    choice = newest_whole(copies, ranks, damaged_of)
    good = set(copies) - damaged
    whole = [step for step in range(5) if {copy.owner for copy in good if copy.step == step} == set(range(ranks))]
    assert (None if choice is None else choice.step) == max(whole, default=None)
    if choice is not None:
        assert set(choice.copies()) <= good & set(read)  # nothing is used unread
        assert [copy.owner for copy in choice.copies()] == list(range(ranks))
        for copy in choice.copies():
            own = Copy(copy.owner, copy.owner, choice.step)
            assert copy == own or own not in good


def test_a_step_that_one_rank_lacks_is_not_complete() -> None:
    copies = [Copy(0, 0, 6), Copy(1, 1, 6), Copy(0, 0, 7), Copy(0, 1, 7)]
    choice = newest_complete(copies, 2)
    assert choice is not None and choice.step == 6
    assert newest_complete(copies, 3) is None


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_any_node_and_any_process_may_be_lost_at_any_moment_for_one_step(
    nodes: int, per_node: int, lost: int, begun: bool
) -> None:
    """While step N is being copied, N - 1 is whole at every rank and at its keeper."""
    layout = Layout(pipeline=nodes, data=per_node, ranks_per_node=per_node)
    ranks = range(layout.world_size)
    assert sorted(map(layout.keeper, ranks)) == list(ranks)
    assert all(layout.kept(layout.keeper(rank)) == rank for rank in ranks)
    assert all(layout.far(rank, layout.keeper(rank)) for rank in ranks) or nodes == 1
    before = [Copy(rank, holder, 6) for rank in ranks for holder in {rank, layout.keeper(rank)}]
    during = [Copy(rank, rank, 7) for rank in ranks if begun and rank % 2]
    node = set(range(lost % nodes * per_node, (lost % nodes + 1) * per_node)) if nodes > 1 else set()
    choice = newest_complete([copy for copy in before + during if copy.holder not in node], len(ranks))
    assert choice is not None and choice.step == 6
