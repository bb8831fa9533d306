"""What launchers of several nodes say about an attempt that ended: once, by one that goes on, and by who does not."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from launch.config import load
from launch.nodes import together
from launch.nodes.roster import NodeCount, Roster
from launch.nodes.together import Together
from tests.launch.runs import ONE_RANK, wait_for

THREE = NodeCount(1, 3)


@pytest.fixture
def nodes(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Together]]:
    """Three nodes, of which the first trains and the others are spare; nobody looks who reaches whom."""
    monkeypatch.setattr(together, "Reach", lambda member: nullcontext())
    given = load(config, [*ONE_RANK, "recovery.max_restarts=3"])
    with ExitStack() as stack:
        three = [Together(given, THREE, "localhost", None) for _ in range(3)]
        for node in three:
            stack.enter_context(node)
        assert three[0].wait() is None
        yield three


def waiting(node: Together, statuses: list[int | None]) -> threading.Thread:
    thread = threading.Thread(target=lambda: statuses.append(node.wait()))
    thread.start()
    return thread


def look_all(nodes: list[Together], missing: Callable[[Together], list[str]]) -> None:
    """Every node says whom it does not reach, as when one of them had asked for it."""

    def look(roster: Roster) -> None:
        roster.suspect()
        for node in nodes:
            roster.report(node.member.name, missing(node))

    nodes[0].member.look(look)


def test_a_spare_that_takes_the_place_of_a_node_that_is_cut_off_says_so_and_so_does_that(
    nodes: list[Together], capsys: pytest.CaptureFixture[str]
) -> None:
    first, spare, other = nodes
    statuses: list[int | None] = []
    threads = [waiting(node, statuses) for node in (spare, other)]
    capsys.readouterr()
    rest = [spare.member.name, other.member.name]
    look_all(nodes, lambda node: rest if node is first else [first.member.name])
    threads.append(waiting(first, statuses))
    host, said = first.member.host, ""

    def heard(*parts: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return all(part in said for part in parts)

    cut = f"this node ({host}) was cut off: it does not reach 2 nodes, which go on; its ranks were ended"
    cause = f"node 0 ({host}) was cut off: it does not reach 2 nodes, which go on"
    wait_for(lambda: heard(cut, f"{cause}; restart 1 of 3, from the newest checkpoint\n"))
    first.member.look(lambda roster: vars(roster).update(over=0))
    for thread in threads:
        thread.join(10)
    heard()
    assert said.count("restart 1 of 3") == said.count("was cut off: it does not reach 2 nodes, which go on;") - 1 == 1
    assert sorted(statuses, key=str) == [0, 0, None], "one took the place, and then all was over"


def test_a_run_without_restarts_left_is_ended_by_a_line_though_who_trained_is_gone(
    nodes: list[Together], capsys: pytest.CaptureFixture[str]
) -> None:
    first, spare, _ = nodes
    spare.member.look(lambda roster: vars(roster).update(restarts=3))
    spare.member.look(lambda roster: spare.member._remove(roster, first.member.name, "it is gone"))
    assert spare.wait() == 1
    line = f"error: node 0 ({first.member.host}) was lost: it is gone; recovery.max_restarts=3 is used up; "
    assert line in capsys.readouterr().err
