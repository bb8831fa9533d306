"""Messages between ranks: a pipeline's, a reduction's, and who is slow.

All of it is collective over the whole world.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from parallel.estimate.calibrate.clock import Clock

SMALL_BYTES, LARGE_BYTES = 256, 1 << 22
SLOW = 1.5
"""A rank is slow when it takes so many times the median."""


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``latency_s + n / bytes_per_s``, of the clock's seconds on each side."""

    latency_s: float
    bytes_per_s: float


def ring(distance: int, device: torch.device, clock: Clock, size: int, repeats: int) -> tuple[float, float]:
    """(the clock's seconds, wall seconds) of sending ``size`` bytes ``distance`` ranks on while receiving as many."""
    rank, world = dist.get_rank(), dist.get_world_size()
    there, here = (rank + distance) % world, (rank - distance) % world
    leaving, arriving = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def once() -> None:
        ways = [dist.P2POp(dist.isend, leaving, there), dist.P2POp(dist.irecv, arriving, here)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()

    once()
    dist.barrier()
    start, wall = clock.now(), time.perf_counter()
    for _ in range(repeats):
        once()
    return (clock.now() - start) / repeats, (time.perf_counter() - wall) / repeats


def link(distance: int, device: torch.device, clock: Clock) -> tuple[float, float, float]:
    """(the clock's seconds of a small message and of a large one, wall seconds of a large one)."""
    small, _ = ring(distance, device, clock, SMALL_BYTES, 50)
    large, wall = ring(distance, device, clock, LARGE_BYTES, 5)
    return small, large, wall


def fitted(small: float, large: float) -> Link:
    """From the seconds of a small and of a large message."""
    return Link(small, (LARGE_BYTES - SMALL_BYTES) / max(large - small, 1e-9))


def reduction_seconds(device: torch.device, clock: Clock) -> float:
    """Of summing so many bytes over the world and gathering them again, as ``parallel/bucket.py`` does."""
    world = dist.get_world_size()
    gradients = torch.zeros(LARGE_BYTES // 4, device=device)
    parts = [torch.zeros(LARGE_BYTES // 4 // world, device=device) for _ in range(world)]

    def once() -> None:
        dist.all_reduce(gradients)
        dist.all_gather(parts, parts[0].clone())

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
