"""Nodes that do not reach each other: one side goes on, never two, and not before the other has ended its ranks."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.nodes import member as members
from launch.nodes.member import Member
from launch.nodes.reach import Listener, Reach, quorum
from launch.nodes.roster import Ending, NodeCount, Roster
from launch.nodes.roster_file import RosterFile
from tests.launch.runs import wait_for

NAMES = "abcdef"


@given(st.sets(st.sampled_from(list(combinations(NAMES, 2)))))
def test_those_that_go_on_reach_each_other_and_nobody_is_left_out_in_vain(broken: set[tuple[str, str]]) -> None:
    side = quorum({name: [b for a, b in broken if a == name] for name in NAMES}, NAMES)
    assert not any(pair in broken for pair in combinations(side, 2))
    for name in set(NAMES) - set(side):
        assert any(set(pair) <= {name, *side} for pair in broken)


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_of_a_cut_the_larger_side_goes_on_and_of_equal_ones_that_with_the_first_node(group: list[int]) -> None:
    """``group``: on which side of the cut each node is."""
    missing = {
        name: [o for o, g in zip(NAMES, group, strict=True) if g != at] for name, at in zip(NAMES, group, strict=True)
    }
    sides = [[name for name, at in zip(NAMES, group, strict=True) if at == g] for g in dict.fromkeys(group)]
    assert quorum(missing, NAMES) == max(sides, key=len)  # the first of equals


def two_train_and_one_waits() -> Roster:
    roster = Roster()
    roster.begin("job", NodeCount(2, 3), [2], 1000)
    for name in "abc":
        roster.join(name, f"host-{name}")
        roster.be_ready(name)
    assert roster.running and roster.placed() == ["a", "b"]
    return roster


def test_a_node_that_is_cut_off_is_replaced_once_no_rank_is_alive_on_it_and_comes_back_as_a_spare() -> None:
    roster = two_train_and_one_waits()
    roster.suspect()
    assert roster.report("a", ["b"]) is None and roster.report("b", ["a", "c"]) is None and roster.running
    ending = roster.report("c", ["b"])
    assert ending is not None and (ending.place, ending.rank, ending.can_recover) == (1, None, True)
    assert ending.cause == "node 1 (host-b) was cut off: it does not reach 2 nodes, which go on"
    assert roster.placed() == ["a", "c"] and roster.reachable == ["a", "c"]
    roster.be_ready("a")
    roster.be_ready("c")
    assert not roster.running, "a rank of the other side could still write to the run's folder"
    silent = Roster.from_dict(json.loads(json.dumps(roster.as_dict())))
    assert silent.remove("b", "silent") is None and silent.running, "it cannot, without the folder"
    roster.be_ready("b")
    assert roster.running and roster.placed() == ["a", "c"]
    roster.suspect()
    for name in "abc":
        assert roster.report(name, []) is None
    assert roster.reachable == ["a", "b", "c"] and roster.placed() == ["a", "c"] and roster.running


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "ready", "lose", "look", "report"]),
            st.sampled_from("abcd"),
            st.sets(st.sampled_from("abcd")),
        )
    )
)
def test_never_two_sides_train(changes: list[tuple[str, str, set[str]]]) -> None:
    roster = Roster()
    roster.begin("job", NodeCount(2, 4), [2, 1], 1000)
    for change, name, others in changes:
        before = Roster.from_dict(json.loads(json.dumps(roster.as_dict())))
        assert before == roster, "what is written is what is read"
        if change == "join" and name not in roster.members:
            roster.join(name, "host")
        elif change == "ready" and name in roster.members:
            roster.be_ready(name)
        elif change == "lose" and name in roster.members:
            roster.remove(name, "gone")
        elif change == "look":
            roster.suspect()
        elif change == "report":
            roster.report(name, others & roster.members.keys() - {name})
        placed = roster.placed()
        assert set(placed) <= set(roster.reachable)
        if all(member.checked == roster.check for member in roster.members.values()):
            for a, b in combinations(placed, 2):
                assert b not in roster.members[a].missing and a not in roster.members[b].missing
        if not roster.running and roster.attempt > roster.first:
            fits = min(2, len(roster.reachable))
            assert roster.places == fits or not fits, "nobody waits for nodes that are cut off"
        if roster.running and not before.running:
            assert len(placed) == roster.places
            assert all(m.ready == roster.attempt for m in roster.members.values() if m.cut or m.place is not None)
        if roster.running and before.running and roster.attempt == before.attempt:
            assert placed == before.placed()


def test_nodes_find_out_themselves_who_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "BEAT_SECONDS", 0.1)
    told: list[Ending] = []
    listeners = [Listener("localhost") for _ in range(3)]

    def make(listener: Listener) -> Member:
        terms = "job", NodeCount(2, 3), [2], 3
        return Member(RosterFile(tmp_path / "nodes"), terms, told.append, listener.address)

    first, second, spare = map(make, listeners)
    with first, second, spare, Reach(first) as one, Reach(second) as two, Reach(spare) as three:
        for node in (first, second, spare):
            node.look(lambda roster, name=node.name: roster.be_ready(name))
        wait_for(lambda: all(len(reach._reached) == 2 for reach in (one, two, three)))
        assert first.view.running
        listeners[1].__exit__(None, None, None)
        wait_for(lambda: [ending.place for ending in told] == [1])
        assert told[0].cause.endswith("was cut off: it does not reach 2 nodes, which go on")
        wait_for(lambda: spare.place == 1 and second.place is None and not second.given_up)
    for listener in listeners:
        listener.__exit__(None, None, None)
