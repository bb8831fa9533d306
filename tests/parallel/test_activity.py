"""A rank that waits in vain says for whom, whoever it was: too slow, stopped or dead."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dualpipe.program import Kind, Message, Work
from parallel.activity import COMPUTING, Activity, Blame, LostPeer, collective_timeout, judge
from parallel.bucket import Bucket
from parallel.collectives import Group
from parallel.exchange import GroupExchange
from parallel.hop import Hop
from parallel.lanes import SharedGroup
from parallel.mesh import Layout
from parallel.shared_memory import SharedMemory
from parallel.transport import PipelineTransport
from tests.ranks import run_ranks

TIMEOUT_S = 4.0


def record(operation: str, beat: int, seconds: float = 1.0) -> dict[str, Any]:
    return {"operation": operation, "beat": beat, "seconds": seconds, "computing": "F1.0", "step": 7, "peers": []}


def test_who_lives_and_waits_is_not_to_blame() -> None:
    before = {rank: record("dispatch", 3) for rank in range(3)}
    lives = {rank: record("dispatch", 5) for rank in range(3)}
    assert judge(before, lives) is None
    assert judge(before, lives | {1: before[1]}) == Blame(
        (1,), "rank 1 is silent, dead or stopped, last heard of in dispatch (F1.0, step 7)", silent=True
    )
    assert judge(before, lives | {1: before[1]}, reader=1) is None, "it was stopped, and reads again"
    late = lives | {0: record(COMPUTING, 5, 0.01), 2: record(COMPUTING, 6, 9.5)}
    assert judge(before, late) == Blame((2,), "rank 2 did not come: it has been in F1.0 of step 7 for 9.5 s")
    assert "rank 1 is silent" in str(judge(before, late | {1: before[1]})), "a dead rank makes others late too"


def test_of_ranks_that_all_wait_the_one_that_left_something_out_is_named() -> None:
    waits = {rank: {**record("parameter gather", 5), "peers": [p for p in range(4) if p != rank]} for rank in range(4)}
    before = {rank: record("dispatch", 3) for rank in range(4)}
    assert judge(before, waits) is None, "they are all in the same operation"
    missing = waits | {3: {**record("dispatch", 5), "peers": [2]}}
    assert judge(before, missing) == Blame(
        (3,),
        "rank 3 left out what others wait for: 3 ranks wait in parameter gather, and it is in dispatch of step 7",
    )
    of_two = {0: {**record("parameter gather", 5), "peers": [1]}, 1: {**record("dispatch", 5), "peers": [0]}}
    assert judge({0: before[0], 1: before[1]}, of_two) is None, "either may have left it out"


def test_who_is_told_to_end_looks_for_nobody_to_blame() -> None:
    store = dist.HashStore()
    late = Activity(1, range(2), store)
    activity = Activity(0, range(2), store, timeout_s=600)
    activity.ending.set()
    with pytest.raises(LostPeer) as lost, activity.waiting("dispatch", [late.rank]):
        raise RuntimeError("Connection closed by peer")
    assert lost.value.verdict is None and not lost.value.timed_out


def test_who_is_told_to_end_repeats_what_another_has_found_meanwhile() -> None:
    class Told(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            store.set("activity/verdict", "rank 1 is silent")
            return True

    store = dist.HashStore()
    late = Activity(1, range(2), store)
    activity = Activity(0, range(2), store, timeout_s=600)
    activity.ending = Told()
    with pytest.raises(LostPeer) as lost, activity.waiting("dispatch", [late.rank]):
        raise RuntimeError("Timed out")
    assert lost.value.verdict == "rank 1 is silent" and lost.value.timed_out


@dataclass(frozen=True)
class Scenario:
    """Three ranks, of which the last one, in the middle of ``operation``, is ``how``. ``shares``: whether they share
    memory."""

    operation: str
    how: str
    shares: bool = False


SCENARIOS = [
    Scenario("dispatch", "slow"),
    Scenario("dispatch", "stopped"),
    Scenario("dispatch", "dead"),
    Scenario("message", "stopped"),
    Scenario("gradient reduction", "dead"),
    Scenario("dispatch", "dead", shares=True),
    Scenario("gradient reduction", "dead", shares=True),
]
VICTIMS = [3 * number + 2 for number in range(len(SCENARIOS))]


def operate(scenario: Scenario, ranks: list[int], activity: Activity, memory: SharedMemory) -> Callable[[], object]:
    """What takes all of the ranks, to be done again and again. Collective over the world."""
    world, timeout = dist.get_world_size(), collective_timeout(TIMEOUT_S)
    made = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    group: Group = SharedGroup(memory, ranks) if scenario.shares else made
    match scenario.operation:
        case "dispatch":
            exchange = GroupExchange(group, 1, [Hop(group, [False] * 3)], activity=activity)
            every = torch.arange(3).expand(2, 3)
            return lambda: exchange.dispatch(torch.ones(2, 4), torch.ones(2, 3), every).wait()
        case "message":
            used = [(ranks[at - 1], ranks[at], Kind.ACTIVATION) for at in range(3)]
            groups = {(0, channel): made for channel in used}
            layout, like = Layout(pipeline=world), torch.ones(3)
            transport = PipelineTransport(layout, dist.get_rank(), like, groups, activity)
            return lambda: pass_on(transport, ranks)
        case "gradient reduction":
            bucket = Bucket([("w", torch.nn.Parameter(torch.ones(4)), 0, 4)], group, torch.float32)

            def reduce() -> None:
                with activity.waiting("gradient reduction", bucket.peers):
                    bucket.reduce()
                    bucket.reduced()

            return reduce
        case _:
            raise AssertionError(scenario)


def pass_on(transport: PipelineTransport, ranks: list[int]) -> None:
    """A message around the ring."""
    at = ranks.index(dist.get_rank())
    before, after = ranks[at - 1], ranks[(at + 1) % 3]
    message = Message(Kind.ACTIVATION, Work(1, 0))
    transport.receive(message, before)
    transport.send(message, after, torch.ones(3))
    transport.wait(message, before)
    transport.flush()


def take_part(rank: int, folder: Path) -> tuple[str, float, float]:
    """What this rank said of the failure, after how many seconds, and of how many it was told."""
    scenario, ranks = SCENARIOS[rank // 3], [rank // 3 * 3 + at for at in range(3)]
    store = dist.PrefixStore(str(rank // 3), dist.FileStore(str(folder / "activity"), dist.get_world_size()))
    activity = Activity(rank, ranks, store, TIMEOUT_S)
    activity.computes("F2.5")
    nodes = [rank // 3 for rank in range(dist.get_world_size())]
    memory = SharedMemory(nodes, collective_timeout(TIMEOUT_S))
    operation = operate(scenario, ranks, activity, memory)
    memory.begun()
    operation()
    dist.barrier()
    if rank == ranks[-1]:
        match scenario.how:
            case "slow":
                time.sleep(TIMEOUT_S)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "dead":
                os._exit(1)
    start = time.monotonic()
    try:
        operation()
    except LostPeer as error:
        return f"{error}", time.monotonic() - start, TIMEOUT_S
    raise AssertionError("nobody was missed")


def test_every_rank_names_operation_and_culprit_in_time(tmp_path: Path) -> None:
    lost = [v for v, scenario in zip(VICTIMS, SCENARIOS, strict=True) if scenario.how != "slow"]
    found = run_ranks(take_part, 3 * len(SCENARIOS), tmp_path, lost=lost)
    for number, scenario in enumerate(SCENARIOS):
        victim = VICTIMS[number]
        for rank in (victim - 2, victim - 1, victim):
            if rank in lost:
                continue
            said, seconds, limit = found[rank]
            operation = "ing activation A1.0" if scenario.operation == "message" else scenario.operation
            assert operation in said.split(" with ")[0], said
            wanted = "did not come: it has been in F2.5" if scenario.how == "slow" else "is silent, dead or stopped"
            assert f": rank {victim} {wanted}" in said, (scenario, rank, said)
            assert seconds < limit, (scenario, rank, seconds)


def test_without_a_store_the_line_says_with_whom() -> None:
    late = pytest.raises(LostPeer, match=r"^dispatch with ranks 1, 2: nobody came in time$")
    with late, Activity(0).waiting("dispatch", [0, 1, 2]):
        raise RuntimeError("Timed out waiting 10ms for recv operation to complete")
    broken = pytest.raises(LostPeer, match=r"^receiving A1.0 with rank 4: the connection broke$")
    with broken, Activity(0).waiting("receiving A1.0", [4]):
        raise RuntimeError("Connection closed by peer")


def test_what_a_rank_computes_without_a_wait_is_measured_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    activity = Activity(0)

    def lasts(seconds: float) -> None:
        nonlocal now
        now += seconds

    for step, computed in enumerate((50.0, 3.0, 2.0)):
        activity.computes("checkpoint")
        lasts(100)
        with activity.in_step(step):
            lasts(1)
            activity.computes("F0.0")
            lasts(computed)
            with activity.waiting("dispatch", [1]):
                lasts(20)
                with activity.waiting("dispatch", [1]):
                    lasts(20)
                lasts(20)
            lasts(1.5)
            assert activity.record(0)["seconds"] == 1.5
            activity.computes("B0.0")
            lasts(2.5)
        wanted = 3.0 if step == 2 else None
        assert activity.record(0)["longest_stretch_seconds"] == wanted, "the first step warms up"
