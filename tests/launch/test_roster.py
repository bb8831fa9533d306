"""Whatever nodes come and go: places are never held twice, survivors keep theirs, and an attempt ends once."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import train
from launch.config import ConfigError, load
from launch.nodes import member as members
from launch.nodes.member import Member, _Silence
from launch.nodes.roster import Ending, NodeCount, Roster
from launch.nodes.roster_file import SLOT_BYTES, RosterFile
from tests.launch.runs import ROOT, wait_for

NAMES = "abcd"
COUNT = NodeCount(2, 4)
TWO_TRAIN = [("join", "a"), ("join", "b"), ("ready", "a"), ("ready", "b")]
ONE_AND_A_SPARE = NodeCount(1, 2)


def begun(count: NodeCount = COUNT, max_restarts: int = 1000, sizes: Sequence[int] = ()) -> Roster:
    roster = Roster()
    roster.begin("job", count, sizes or [count.needed], max_restarts)
    return roster


@given(st.lists(st.tuples(st.sampled_from(["join", "ready", "lose", "end", "late end"]), st.sampled_from(NAMES))))
def test_places_are_kept_and_attempts_end_once(changes: list[tuple[str, str]]) -> None:
    roster, attempts = begun(), []
    for change, name in [*TWO_TRAIN, *changes]:
        before = Roster.from_dict(json.loads(json.dumps(roster.as_dict())))
        assert before == roster, "what is written is what is read"
        known = name in roster.members
        if change == "join" and not known:
            roster.join(name, "host")
        elif change == "ready" and known:
            roster.be_ready(name)
        elif change == "lose" and known:
            held = roster.running and roster.members[name].place is not None
            assert (roster.remove(name, "gone") is not None) == held
            attempts += [before.attempt] if held else []
        elif "end" in change and known:
            late = change == "late end"
            ending = Ending(roster.attempt - late, 0, "host", 0, "died", can_recover=True)
            told = roster.end(ending)
            assert told == (before.running and not late)
            attempts += [before.attempt] if told else []
        for survivor in roster.members.keys() & before.members.keys():
            place = before.members[survivor].place
            assert place is None or roster.members[survivor].place == place
        places = [roster.members[name].place for name in roster.placed()]
        assert len(set(places)) == len(places) and set(places) <= {0, 1}
        assert len(places) == min(2, len(roster.members)), "no place is free while a node is"
        if roster.running:
            assert places == [0, 1] and all(roster.members[n].ready == roster.attempt for n in roster.placed())
    assert attempts == sorted(set(attempts)), "each attempt ended once"


@given(
    st.lists(st.tuples(st.sampled_from(["join", "ready", "lose", "end", "regroup"]), st.sampled_from("abcde"))),
    st.sets(st.integers(1, 2)),
)
def test_a_run_that_may_shrink_never_waits_for_nodes_that_it_can_do_without(
    changes: list[tuple[str, str]], smaller: set[int]
) -> None:
    sizes = sorted({3, *smaller}, reverse=True)
    roster = begun(NodeCount(3, 5), sizes=sizes)
    for change, name in [*(("join", n) for n in "abc"), *(("ready", n) for n in "abc"), *changes]:
        before = Roster.from_dict(json.loads(json.dumps(roster.as_dict())))
        known = name in roster.members
        if change == "join" and not known:
            roster.join(name, "host")
        elif change == "ready" and known:
            roster.be_ready(name)
        elif change == "lose" and known:
            roster.remove(name, "gone")
        elif change in ("end", "regroup") and known:
            planned = change == "regroup"
            roster.end(Ending(roster.attempt, 0, "host", 0, "died", True, planned=planned))
            assert roster.restarts == before.restarts + (before.running and not planned)
        places = [roster.members[name].place for name in roster.placed()]
        assert places == sorted(set(places)) and set(places) <= set(range(roster.places)) and roster.places in sizes
        hold = max((size for size in sizes if size <= len(roster.members)), default=0)
        if before.running and roster.running:
            assert roster.places == before.places, "an attempt keeps its size"
            ready = [m for m in roster.members.values() if m.place is not None or m.ready == roster.attempt]
            assert roster.growing == any(roster.places < size <= len(ready) for size in sizes)
        elif not roster.running and roster.attempt > roster.first:
            assert roster.places == hold or (hold == 0 and len(places) < roster.places), "the most that can be filled"
            if hold:
                assert any(roster.members[name].ready < roster.attempt for name in roster.placed())
        elif not roster.running:
            assert roster.places == 3, "the first attempt waits for all"


def test_a_node_that_returns_ends_the_smaller_attempt_once_it_is_ready_and_costs_no_restart() -> None:
    roster = begun(NodeCount(2, 2), sizes=[2, 1])
    for name in "ab":
        roster.join(name, "host")
        roster.be_ready(name)
    assert roster.running and roster.remove("a", "gone") is not None
    assert (roster.placed(), roster.places, roster.running) == (["b"], 1, False)
    roster.be_ready("b")
    roster.join("c", "host")
    assert roster.running and not roster.growing and roster.members["b"].place == 0
    roster.be_ready("c")
    assert roster.growing
    assert roster.end(Ending(roster.attempt, 0, "host", None, "2 nodes are there", True, planned=True))
    assert (roster.placed(), roster.places, roster.growing, roster.restarts) == (["b", "c"], 2, False, 1)


def test_restarts_are_counted_and_what_cannot_be_mended_ends_all() -> None:
    def ended(max_restarts: int, can_recover: bool, status: int = 1) -> Roster:
        roster = begun(NodeCount(1, 1), max_restarts)
        roster.join("a", "host")
        for _ in range(2):
            roster.be_ready("a")
            roster.end(Ending(roster.attempt, 0, "host", 0, "died", can_recover, status))
        return roster

    assert (ended(2, True).over, ended(2, True).restarts) == (None, 2)
    assert (ended(1, True).over, ended(1, True).restarts) == (1, 1)
    assert (ended(2, False, 2).over, ended(2, False, 2).restarts) == (2, 0)


def test_a_write_that_was_cut_short_spoils_nothing_else(tmp_path: Path) -> None:
    file = RosterFile(tmp_path / "nodes")
    for attempt in (5, 6, 7):
        with file.open() as roster:
            assert roster.attempt == (1 if attempt == 5 else attempt - 1)
            roster.attempt = attempt
    with pytest.raises(KeyError), file.open() as roster:
        roster.attempt = 99
        raise KeyError
    data = bytearray(file.path.read_bytes())
    newest = max((0, SLOT_BYTES), key=lambda at: int(data[at : at + 8].split()[0]))
    data[newest + 40] ^= 1
    file.path.write_bytes(data)
    with file.open() as roster:
        assert roster.attempt == 6
        roster.attempt = 8
    with file.open() as roster:
        assert roster.attempt == 8


def test_silence_is_measured_by_one_clock_that_stops_with_its_node() -> None:
    silence = _Silence(1.0, longest_gap=0.5)
    assert silence.of(10.0, {"a": 1, "b": 1}) == []
    assert silence.of(10.5, {"a": 2, "b": 1}) == []
    assert silence.of(3600.0, {"a": 2, "b": 1}) == ["b"], "an hour that this node slept counts as half a second"
    assert silence.of(3600.4, {"a": 3, "b": 2}) == []
    assert silence.of(3600.8, {"a": 4}) == []
    assert silence.of(3601.2, {"a": 5, "b": 2}) == [], "who comes back begins anew"


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Member]:
    monkeypatch.setattr(members, "BEAT_SECONDS", 0.02)

    def make(job: str = "job", count: NodeCount = ONE_AND_A_SPARE) -> Member:
        return Member(RosterFile(tmp_path / "nodes"), (job, count, [count.needed], 3), lambda ending: None)

    return make


def test_who_does_not_fit_is_refused(join: Callable[..., Member]) -> None:
    with join(), join():
        for other, said in (
            (join(count=NodeCount(1, 3)), "--nnodes=1:3 must be 1:2, as on the nodes that are there"),
            (join(job="another"), "CONFIG and key=value must give what the nodes that are there were given"),
            (join(), "--nnodes=1:2 must be more: as many nodes are there"),
        ):
            with pytest.raises(ConfigError, match=said), other:
                pass


def test_a_silent_node_is_given_up_and_knows_it(join: Callable[..., Member]) -> None:
    told: list[Ending] = []
    silent, other = join(), join()
    other._told = told.append
    silent.join()
    silent.look(lambda roster: roster.be_ready(silent.name))
    silent._thread.start()
    with other:
        silent._over.set()
        assert (silent.place, other.place) == (0, None)
        wait_for(lambda: other.place == 0)
        assert [(ending.rank, ending.place) for ending in told] == [(None, 0)]
        silent.look(silent._beat)
        assert silent.given_up and other.view.restarts == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_what_an_earlier_start_left_is_in_nobodys_way(join: Callable[..., Member], stopped: bool) -> None:
    left = join()
    left.join()
    if stopped:
        left.look(lambda roster: setattr(roster, "stop", 15))
    attempt = left.view.attempt
    with join() as member:
        assert member.place == 0 and len(member.view.members) == 1 and not member.view.closed
        assert member.view.attempt > attempt, "ranks of that start may still be there"


@pytest.mark.parametrize(("text", "count"), [("1", (1, 1)), ("16", (16, 16)), ("16:18", (16, 18))])
def test_how_many_nodes(text: str, count: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    assert NodeCount.parse(text) == NodeCount(*count) and str(NodeCount.parse(text)) == text
    assert NodeCount(2, 3).ranks_on_each(8) == 4
    for wrong in ("0", "-1", "3:2", "2:", "1e3", "", "2:3:4"):
        assert train.main(["nowhere.yaml", f"--nnodes={wrong}"]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: --nnodes={wrong} must be the number of nodes, such as 16, or 16:18 with two")


def test_ranks_that_nodes_cannot_share_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"--nnodes=3 must divide the 4 ranks of layout\.pipeline"):
        train._check_room(load(config), NodeCount(3, 3))


def test_the_job_script_keeps_spares_and_survives_a_lost_node(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "18", "CONFIG": "a b.yaml"}
    for more, nodes in (({"SPARES": "2"}, "16:18"), ({}, "18:18")):
        words = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "train.seed=1"]
        result = subprocess.run(words, env={**environment, **more}, capture_output=True, text=True, check=True)
        *options, program, command, config, flag, count, override = result.stdout.splitlines()
        assert (program, command, config, flag, count) == ("dualpipe", "train", "a b.yaml", "--nnodes", nodes)
        assert override == "train.seed=1" and {"--no-kill", "--wait=0", "--kill-on-bad-exit=0"} <= set(options)
        assert NodeCount.parse(count).most == 18


@pytest.mark.parametrize("length", [-5, SLOT_BYTES, 10**14, 10**22])
def test_a_slot_of_an_impossible_length_holds_nothing(length: int, tmp_path: Path) -> None:
    file = RosterFile(tmp_path / "nodes")
    header = b"%d %d 00000000" % (1, length)
    file.path.write_bytes(header.ljust(SLOT_BYTES, b" ") + header)
    with file.open() as roster:
        assert roster == Roster()
        roster.join("a", "host")
    with file.open() as roster:
        assert list(roster.members) == ["a"]
