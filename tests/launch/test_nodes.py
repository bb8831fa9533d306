"""Several launchers train one run; here they share a machine, and a folder as several machines would."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.nodes.roster_file import RosterFile
from tests.launch.runs import Start, assert_gone, descendants, entries, wait_for

ENDLESS = [
    "layout.pipeline=1",
    "train.threads=1",
    "train.steps=100000",
    "checkpoint.every=5",
    "recovery.max_restarts=20",
    "recovery.replicate_every=1",
    "recovery.on_node_loss=shrink",
    "--nnodes=2:3",
]
PATIENCE = 500
"""Seconds that a busy machine may take for what takes a few on an idle one."""


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] in names]


def placed(run: Path, processes: list[subprocess.Popen[str]], place: int) -> subprocess.Popen[str]:
    """The launcher that trains in a place."""
    with RosterFile(run / "nodes").open() as roster:
        name = roster.placed()[place]
    (process,) = [process for process in processes if f":{process.pid}:" in name]
    return process


def recovered(run: Path, **failure: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first failure with these details, and the last resume, once a step after it is done. A machine that is busy
    enough may lose a node in between; that is recovered from, too."""

    def found() -> list[dict[str, Any]]:
        return [event for event in events(run, "failure") if event.items() >= failure.items()]

    wait_for(lambda: bool(found()), PATIENCE)
    wait_for(lambda: any(event["cause"] == found()[0]["cause"] for event in events(run, "recovery")), PATIENCE)
    since = events(run, "failure", "resume")
    return found()[0], since[since.index(found()[0]) + 1]


@pytest.fixture
def nodes(config: Path, start: Start) -> Iterator[list[subprocess.Popen[str]]]:
    """Three launchers, of which two train."""
    processes = [start(config, *ENDLESS) for _ in range(3)]
    yield processes
    for process in processes:  # their ranks go with them
        process.kill()
        process.communicate()


def test_killed_ranks_lost_nodes_one_that_returns_and_a_wish_to_stop(
    nodes: list[subprocess.Popen[str]], config: Path, start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wait_for(lambda: len(entries(run)) >= 3, PATIENCE)
    everyone = [process for node in nodes for process in descendants(node)]

    (rank,) = ranks(placed(run, nodes, 1))
    rank.kill()
    failure, resume = recovered(run, rank=1)
    assert failure["cause"].startswith("rank 1 was ended by SIGKILL (node 1, ") and failure["node"] == 1
    assert resume["source"] == "memory" and resume["from_peers"] == [] and resume["step"] >= failure["step"] - 1

    lost = placed(run, nodes, 0)
    kill_node(lost)
    failure, resume = recovered(run, rank=None, node=0)
    assert " was lost: nothing was heard of it for " in failure["cause"]
    assert resume["source"] == "memory" and resume["from_peers"] == [0] and resume["step"] >= failure["step"] - 1

    nodes.remove(lost)
    both = entries(run)[-1]["step"] + 3  # until the spare's memory has its peer's state, too
    wait_for(lambda: entries(run)[-1]["step"] >= both, PATIENCE)
    lost = placed(run, nodes, 1)
    kill_node(lost)
    nodes.remove(lost)
    failure, resume = recovered(run, rank=None, node=1)
    assert resume["source"] == "checkpoint", "memory has the layout of two nodes"
    assert resume["step"] >= failure["step"] - 1, "it was made of what memory has"
    assert [event["world_size"] for event in events(run, "start")][-1] == 1, "no spare was left"

    nodes.append(start(config, *ENDLESS))
    wait_for(lambda: any("there, and 1 trained" in event["cause"] for event in events(run, "recovery")), PATIENCE)
    since = events(run, "regroup", "start", "resume")
    (at,) = [number for number, event in enumerate(since) if event["event"] == "regroup"]
    assert since[at]["cause"] == "2 nodes are there, and 1 trained"
    assert since[at + 1]["world_size"] == 2 and since[at + 2]["step"] == since[at]["step"], "no step was lost"

    everyone += [process for node in nodes for process in descendants(node)]
    nodes[0].send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [143, 143], said
    assert not any("Traceback" in text for texts in said for text in texts)
    last = entries(run)[-1]["step"]
    assert [entry["step"] for entry in entries(run)] == list(range(1, last + 1))
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert_gone(everyone)


def ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Of one node, by their rank."""
    everyone = descendants(launcher)
    (server,) = [one for one in everyone if any(other.ppid() == one.pid for other in everyone)]
    return server.children()


def kill_node(launcher: subprocess.Popen[str]) -> None:
    """As a machine that loses its power: all of its processes at once."""
    everyone = [psutil.Process(launcher.pid), *descendants(launcher)]
    for process in everyone:
        process.suspend()
    for process in everyone:
        process.kill()
    launcher.communicate()
