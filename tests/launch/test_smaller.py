"""What a run trains on fewer nodes: the largest layout that they hold, and nothing that does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config import Config, ConfigError, load
from launch.nodes.roster import NodeCount
from launch.nodes.smaller import Share, largest, shares
from launch.nodes.together import shares_of
from parallel.mesh import Layout


@st.composite
def wholes(draw: st.DrawFn) -> Share:
    """A layout on nodes that hold it whole."""
    pipeline, expert = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 6))
    layout = Layout(pipeline, expert * draw(st.integers(1, 6)), expert)
    ranks = draw(st.sampled_from([n for n in range(1, layout.world_size + 1) if layout.world_size % n == 0]))
    return Share(layout.world_size // ranks, ranks, layout)


@given(wholes(), st.integers(1, 48), st.integers(1, 48), st.integers(1, 40))
def test_it_is_the_largest_that_fits(wanted: Share, batch: int, experts: int, nodes: int) -> None:
    def fits(layout: Layout) -> bool:  # as a configuration has it
        return batch % layout.data == 0 and experts % layout.expert == 0

    found = shares(wanted, fits)
    share = largest(found, nodes)
    best = max(
        (
            (data, expert)
            for data in range(1, wanted.layout.data + 1)
            for expert in range(1, wanted.layout.expert + 1)
            if data % expert == 0 and fits(Layout(wanted.layout.pipeline, data, expert))
            for ranks in range(1, wanted.ranks + 1)
            if wanted.layout.pipeline * data % ranks == 0 and wanted.layout.pipeline * data // ranks <= nodes
        ),
        default=None,
    )
    if nodes >= wanted.nodes:
        assert share == wanted
    elif share is None:
        assert best is None
    else:
        layout = share.layout
        assert (layout.data, layout.expert) == best and layout.pipeline == wanted.layout.pipeline
        assert share.nodes * share.ranks == layout.world_size and layout.ranks_per_node == share.ranks
        assert share.nodes <= nodes and share.ranks <= wanted.ranks, "no rank more than there are"
        assert largest(found, share.nodes) == share, "the number of nodes that train says what they train"


def shrinking(config: Path, *overrides: str) -> Config:
    return load(config, ["recovery.on_node_loss=shrink", "recovery.max_restarts=1", *overrides])


def test_the_rules_of_the_configuration_hold_for_it(config: Path) -> None:
    wide = ["layout.data=4", "train.global_batch_size=16", "layout.expert=4"]
    found = shares_of(shrinking(config, *wide), NodeCount(4, 4))
    assert [(s.nodes, s.ranks, s.layout.data, s.layout.expert) for s in found] == [
        (4, 2, 4, 4),
        (2, 2, 2, 2),
        (1, 2, 1, 1),
    ]
    found = shares_of(
        shrinking(config, "layout.data=4", "layout.expert=1", "train.global_batch_size=48"), NodeCount(4, 4)
    )
    assert [s.layout.data for s in found] == [4, 3, 2, 1], "12 micro-batches, 16, 24, 48"
    assert shares_of(replace(shrinking(config), recovery=load(config).recovery), NodeCount(2, 3))[1:] == []


def test_a_policy_that_could_do_nothing_is_refused(config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"on_node_loss=shrink: no layout with layout\.pipeline=2 .* fewer than 2 nodes"
    ):
        shares_of(shrinking(config, "layout.data=1", "layout.expert=1"), NodeCount(2, 2))
    with pytest.raises(ConfigError, match=r"--nnodes=2:3 must be 2: recovery\.on_node_loss=wait has no spares"):
        shares_of(load(config, ["recovery.on_node_loss=wait", "recovery.max_restarts=1"]), NodeCount(2, 3))
    with pytest.raises(ConfigError, match=r"recovery\.on_node_loss='?shrink'? needs recovery\.max_restarts"):
        load(config, ["recovery.on_node_loss=shrink"])
