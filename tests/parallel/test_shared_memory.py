"""Shared memory carries what process groups would, in order, whoever waits first, and says who has gone."""

import gc
import os
import random
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Group, all_gather, all_reduce, all_to_all, reduce_scatter, zeros
from parallel.lanes import Arrival, Inbox, Outbox, Rows, SharedGroup
from parallel.shared_memory import HELLO, SharedMemory
from tests.ranks import run_ranks

WORLD = 3
TIMEOUT = timedelta(seconds=60)
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def shared(nodes: list[int] | None = None, timeout: timedelta = TIMEOUT) -> SharedMemory:
    return SharedMemory([0] * dist.get_world_size() if nodes is None else nodes, timeout)


def drawn(draw: random.Random, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    return torch.randint(0, 100, (rows, width), generator=generator).to(dtype)


def messages(seed: int) -> list[list[Tensor]]:
    """Columns of messages of very different sizes, none at all among them."""
    draw = random.Random(seed)
    found = []
    for _ in range(draw.randint(1, 12)):
        rows = draw.choice([0, 1, 7, 100, 3000])
        widths = [draw.choice([1, 5, 64]) for _ in range(draw.randint(1, 3))]
        found.append([drawn(draw, rows, width, draw.choice(DTYPES)) for width in widths])
    return found


def lanes(rank: int, rounds: int) -> list[bool]:
    """Rank 0 sends, in whole or chosen rows, what rank 1 waits for in another order, from two threads."""
    memory, right = shared(), []
    strangers = [intrude(memory, said) for said in (b"", b"\xfc" * HELLO.size, b"short")]
    outbox, inbox = (Outbox(memory, 1, "lane"), None) if rank == 0 else (None, Inbox(memory, 0, "lane"))
    strangers += [intrude(memory, b"")]
    memory.begun()
    for seed in range(rounds):
        draw = random.Random(seed)
        sent = messages(seed)
        if outbox is not None:
            for columns in sent:
                scattered = draw.random() < 0.5
                outbox.send([chosen(column) if scattered else Rows(column) for column in columns])
                for column in columns:
                    column.zero_()  # it has left
        elif rank == 1:
            assert inbox is not None
            arrived = [[torch.empty_like(column) for column in columns] for columns in sent]
            posted = [inbox.post(columns) for columns in arrived]
            draw.shuffle(posted)
            in_two_threads(posted)
            right += [torch.equal(a, b) for pair in zip(arrived, sent, strict=True) for a, b in zip(*pair, strict=True)]
        dist.barrier()
    return right


def intrude(memory: SharedMemory, said: bytes) -> socket.socket:
    """A connection to the next rank that no rank begins, and that stays."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(memory._names[(memory.rank + 1) % dist.get_world_size()])
    connection.sendall(said)
    return connection


def in_two_threads(posted: list[Arrival]) -> None:
    def wait(own: list[Arrival]) -> None:
        for arrival in own:
            arrival.wait()

    threads = [threading.Thread(target=wait, args=[posted[half::2]]) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def chosen(column: Tensor) -> Rows:
    """The same rows, out of others."""
    order = torch.randperm(2 * len(column))[: len(column)]
    other = column.new_full((2 * len(column), column.shape[1]), 77)
    other[order] = column
    return Rows(other, order)


def test_a_lane_brings_every_message_in_order_whoever_waits_first() -> None:
    _, right, _ = run_ranks(lanes, WORLD, 40)
    assert len(right) > 40 and all(right)


def both_ways(rank: int, rounds: int) -> None:
    """The same collectives over a process group and over shared memory, to the bit."""
    memory, world = shared(), list(range(dist.get_world_size()))
    assert memory.joins(world) and dist.group.WORLD is not None
    groups: list[Group] = [dist.group.WORLD, SharedGroup(memory, world)]
    memory.begun()
    for seed in range(rounds):
        for collective in (rows_to_each, gathered, scattered, reduced):
            over_sockets, over_memory = (collective(random.Random(f"{seed}"), rank, group) for group in groups)
            for a, b in zip(over_sockets, over_memory, strict=True):
                assert torch.equal(a, b), (seed, collective.__name__, a, b)


def rows_to_each(draw: random.Random, rank: int, group: Group) -> list[Tensor]:
    counts = [[draw.choice([0, 0, 1, 5, 300]) for _ in range(WORLD)] for _ in range(WORLD)]
    widths = draw.randint(1, 2)
    columns = [drawn(draw, sum(counts[rank]), 16, dtype) for dtype in draw.sample(DTYPES, widths)]
    sent = [chosen(column) if draw.random() < 0.5 else Rows(column) for column in columns]
    for rows in sent:
        there = memory_for(draw, max(rows.tensor.numel(), 1), rows.tensor.dtype, group)[: rows.tensor.numel()]
        rows.tensor.set_(there.view(rows.tensor.shape).copy_(rows.tensor))  # type: ignore[call-overload]
    return list(all_to_all(sent, counts[rank], [of[rank] for of in counts], group).wait())


def memory_for(draw: random.Random, count: int, dtype: torch.dtype, group: Group) -> Tensor:
    """What others read where it is, or a copy of."""
    return zeros(count, dtype, torch.device("cpu"), group if draw.random() < 0.5 else None)


def gathered(draw: random.Random, rank: int, group: Group) -> list[Tensor]:
    size = draw.choice([1, 64, 5000])
    whole = memory_for(draw, WORLD * size, torch.bfloat16, group)
    own = whole[rank * size : (rank + 1) * size]
    own.copy_(drawn(random.Random(f"{size} {rank}"), size, 1, torch.bfloat16).view(-1))
    all_gather(own, whole, group).wait()
    return [whole]


def scattered(draw: random.Random, rank: int, group: Group) -> list[Tensor]:
    """Of numbers whose sum depends on its order."""
    size = draw.choice([1, 64, 5000])
    whole = memory_for(draw, WORLD * size, torch.float32, group)
    whole.copy_(torch.randn(WORLD * size, generator=torch.Generator().manual_seed(draw.randrange(1000) + rank)))
    reduce_scatter(whole, group).wait()
    return [whole[rank * size : (rank + 1) * size]]


def reduced(draw: random.Random, rank: int, group: Group) -> list[Tensor]:
    values = drawn(random.Random(f"{draw.random()} {rank}"), 3, 4, draw.choice([torch.float32, torch.int64]))
    all_reduce(values, group).wait()
    return [values]


def test_collectives_are_those_of_process_groups() -> None:
    run_ranks(both_ways, WORLD, 40)


def joined(rank: int) -> list[bool]:
    memory = shared([0, 0, 1])
    return [memory.joins([0, 1]), memory.joins([1, 2]), memory.joins([2])]


def test_ranks_of_other_nodes_are_not_joined() -> None:
    assert run_ranks(joined, WORLD) == [[True, False, True]] * WORLD


def missed(rank: int, how: str) -> tuple[str, float]:
    """What rank 0 says of rank 1, which is ``how``, and after how many seconds."""
    memory = shared(timeout=timedelta(seconds=2))
    group = SharedGroup(memory, [0, 1]) if rank < 2 else None
    memory.begun()
    if group is None:
        return "", 0.0
    all_gather(torch.ones(2), torch.empty(4), group).wait()
    start = time.monotonic()
    if rank == 1:
        match how:
            case "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "confused":
                all_gather(torch.ones(3), torch.empty(6), group)
    try:
        all_gather(torch.ones(2), torch.empty(4), group).wait()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize(
    "how,words",
    [
        ("dead", "Connection with rank 1 is broken: "),
        ("stopped", "Timed out after 2 s of waiting for rank 1"),
        ("confused", "Connection with rank 1 is broken: it sent 12 bytes where 8 were to come"),
    ],
)
def test_who_does_not_come_is_named(how: str, words: str) -> None:
    (said, seconds), *_ = run_ranks(missed, 3, how, lost=[1])
    assert said.startswith(words)
    assert seconds < (4 if how == "stopped" else 1)


def descriptors(rank: int) -> tuple[int, int]:
    """Open before and after many lives."""
    counts = []
    for lives in (2, 5):
        for _ in range(lives):
            both_ways(rank, 1)
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[0], counts[1]


def test_nothing_is_left_open() -> None:
    for before, after in run_ranks(descriptors, WORLD):
        assert after == before
