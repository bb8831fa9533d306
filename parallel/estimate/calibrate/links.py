"""Messages between ranks: a pipeline's, a reduction's, and who is slow.

All of it is collective over the whole world.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Group, all_gather, reduce_scatter, zeros
from parallel.estimate.calibrate.clock import Clock
from parallel.lanes import Inbox, Outbox, Rows
from parallel.shared_memory import SharedMemory

SMALL_BYTES, LARGE_BYTES = 256, 1 << 22
SLOW = 1.5
"""A rank is slow when it takes so many times the median."""


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``latency_s + n / bytes_per_s``, of the clock's seconds on each side."""

    latency_s: float
    bytes_per_s: float


class Ring:
    """Messages to the rank ``distance`` further on, the way the runtime sends them; ``memory``: what ranks share."""

    def __init__(self, distance: int, device: torch.device, memory: SharedMemory | None) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.device, self._there, self._here = device, (rank + distance) % world, (rank - distance) % world
        self._lanes: tuple[Outbox, Inbox] | None = None
        # All or none: a rank whose own way is shared would not come to the others' messages.
        pairs = [(one, (one + distance) % world) for one in range(world)]
        if memory is not None:
            if all(memory.joins(pair) for pair in pairs):
                name = f"ring {distance}"
                self._lanes = Outbox(memory, self._there, name), Inbox(memory, self._here, name)
            memory.begun()

    def pass_on(self, leaving: Tensor, arriving: Tensor) -> None:
        if self._lanes is not None:
            outbox, inbox = self._lanes
            outbox.send([Rows(leaving)])
            inbox.post([arriving]).wait()
            return
        ways = [dist.P2POp(dist.isend, leaving, self._there), dist.P2POp(dist.irecv, arriving, self._here)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()


def ring_seconds(ring: Ring, clock: Clock, size: int, repeats: int) -> tuple[float, float]:
    """(the clock's seconds, wall seconds) of sending ``size`` bytes on while receiving as many."""
    leaving, arriving = (torch.zeros(size, dtype=torch.uint8, device=ring.device) for _ in range(2))

    def once() -> None:
        ring.pass_on(leaving, arriving)

    once()
    dist.barrier()
    start, wall = clock.now(), time.perf_counter()
    for _ in range(repeats):
        once()
    return (clock.now() - start) / repeats, (time.perf_counter() - wall) / repeats


def link(ring: Ring, clock: Clock) -> tuple[float, float, float]:
    """(the clock's seconds of a small message and of a large one, wall seconds of a large one)."""
    small, _ = ring_seconds(ring, clock, SMALL_BYTES, 50)
    large, wall = ring_seconds(ring, clock, LARGE_BYTES, 5)
    return small, large, wall


def fitted(small: float, large: float) -> Link:
    """From the seconds of a small and of a large message."""
    return Link(small, (LARGE_BYTES - SMALL_BYTES) / max(large - small, 1e-9))


def reduction_seconds(group: Group, device: torch.device, clock: Clock) -> float:
    """Of summing so many bytes over the world and gathering them again, as ``parallel/bucket.py`` does."""
    world, rank = dist.get_world_size(), dist.get_rank()
    each = LARGE_BYTES // 4 // world
    gradients = zeros(world * each, torch.float32, device, group)

    def once() -> None:
        reduce_scatter(gradients, group).wait()
        all_gather(gradients[rank * each : (rank + 1) * each], gradients, group).wait()

    once()
    dist.barrier()
    start = clock.now()
    for _ in range(3):
        once()
    return (clock.now() - start) / 3


def slow_ranks(seconds: Sequence[float]) -> list[int]:
    """Ranks whose seconds stand out."""
    usual = median(seconds)
    return [rank for rank, each in enumerate(seconds) if each > SLOW * usual]
