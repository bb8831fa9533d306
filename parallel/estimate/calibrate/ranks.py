"""What every rank measures, in turns, while all the others measure the same."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dualpipe.overlap import Part
from parallel.cores import idle_share, own_cores
from parallel.estimate.calibrate import links
from parallel.estimate.calibrate.clock import Clock
from parallel.estimate.calibrate.layers import LayerProbe, head_seconds
from parallel.estimate.calibrate.products import (
    core_seconds,
    measured_products,
    optimizer_rate,
    product_seconds,
)
from parallel.estimate.hardware import Cluster
from parallel.estimate.products import Product
from parallel.estimate.workload import Workload
from parallel.exchange import GroupExchange
from parallel.groups import Groups
from parallel.hop import Hop
from parallel.mesh import Layout
from parallel.shared_memory import SharedMemory, shared_memory

ROUNDS = 3
TIMEOUT = timedelta(minutes=10)


@dataclass
class Measured:
    """Seconds of the clock, medians over the rounds and then over the ranks. ``phases``: of an MoE layer that exchanges
    nothing, by tokens of a micro-batch (a mean over layers and micro-batches); ``exchanged``: what an exchange adds to
    a layer's forward and backward; ``links``: by the distance of the ranks, a small and a large message, and the wall
    seconds of the large one."""

    products: dict[Product, float] = field(default_factory=dict)
    core: tuple[float, float] = (0.0, 0.0)
    phases: dict[int, dict[Part, float]] = field(default_factory=dict)
    exchanged: tuple[float, float] | None = None
    idle: float | None = None
    """Share of the cores' time in which nothing ran while those layers did, where ranks outnumber the cores."""
    head: tuple[float, float] = (0.0, 0.0)
    optimizer_bytes_per_s: float = 0.0
    links: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    reduction: float | None = None
    slow: dict[str, list[int]] = field(default_factory=dict)
    """Ranks that stand out, by what they are slow at."""
    alone: float | None = None
    """A layer on one rank while the others wait, over the same while all are busy."""


def measure(
    workload: Workload, base: Cluster, device: torch.device, local_world: int, rounds: int = ROUNDS
) -> Measured:
    """Collective, if there is a group. ``local_world``: ranks on a node. Every rank gets the same answer."""
    clock, world = Clock(device), dist.get_world_size() if dist.is_initialized() else 1
    half = replace(workload, sequence_length=max(workload.sequence_length // 2, 1))
    probes = {each.tokens: LayerProbe(each, device) for each in (workload, half)}
    memory = shared_memory(Layout(data=world, ranks_per_node=local_world), device, TIMEOUT)
    apart = _exchanging(workload, device, memory) if world > 1 else None
    measurements: dict[str, Callable[[], Any]] = {
        "products": lambda: {p: product_seconds(p, device, clock) for p in measured_products(workload, base)},
        "core": lambda: core_seconds(workload, device, clock),
        "phases": lambda: {tokens: probe.seconds(clock) for tokens, probe in probes.items()},
        "head": lambda: head_seconds(workload, device, clock),
        "optimizer": lambda: optimizer_rate(workload, device, clock),
    }
    if apart is not None:
        measurements["exchanged"] = lambda: idle_share(lambda: apart.seconds(clock))
    turns: dict[str, list[Any]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, measurement in measurements.items():
            if world > 1:
                dist.barrier()  # what the others do at the same time decides what is left of caches and memory's rate
            value = measurement()
            if turn:  # the first is a warm-up
                turns[name].append(value)
    result = _over_ranks({name: _middle(values) for name, values in turns.items()})
    measured = Measured(
        products=result["products"],
        core=tuple(result["core"]),
        phases=result["phases"],
        head=tuple(result["head"]),
        optimizer_bytes_per_s=result["optimizer"],
        slow=result["slow"],
    )
    if apart is not None:
        exchanging, idle = result["exchanged"]
        measured.exchanged = _added(exchanging, result["phases"][workload.tokens])
        if device.type == "cpu" and local_world > len(own_cores()):
            measured.idle = idle
    if world > 1:
        _messages(measured, device, clock, local_world, memory)
        measured.alone = _alone(probes[workload.tokens], measured.phases[workload.tokens], clock)
    return measured


def _exchanging(workload: Workload, device: torch.device, memory: SharedMemory | None) -> LayerProbe | None:
    """Layers whose experts are spread over the layout's expert group; None where a rank has them all."""
    layout = workload.layout
    world = dist.get_world_size()
    if layout.expert == 1 or world % layout.expert:
        return None
    groups = Groups(Layout(pipeline=1, data=world, expert=layout.expert), [], memory=memory)
    rank, each = dist.get_rank(), workload.model.n_routed_experts // layout.expert
    first = rank % layout.expert * each
    members = range(rank - rank % layout.expert, rank - rank % layout.expert + layout.expert)
    group = groups.of(members)
    assert group is not None
    exchange = GroupExchange(group, each, [Hop(group, [False] * layout.expert)])
    return LayerProbe(workload, device, exchange, range(first, first + each))


def _added(exchanging: Mapping[Part, float], local: Mapping[Part, float]) -> tuple[float, float]:
    """What the exchange adds, forward and backward."""
    ways = {"F": (0.0, 0.0), "I": (0.0, 0.0)}
    for name in ways:
        ways[name] = (
            sum(seconds for (_, op), seconds in exchanging.items() if op.value == name),
            sum(seconds for (_, op), seconds in local.items() if op.value == name),
        )
    forward, backward = (max(a - b, 0.0) for a, b in ways.values())
    return forward, backward


def _messages(
    measured: Measured, device: torch.device, clock: Clock, local_world: int, memory: SharedMemory | None
) -> None:
    world = dist.get_world_size()
    for distance in {1, local_world} if local_world < world else {1}:
        each: list[Any] = [None] * world
        dist.all_gather_object(each, links.link(links.Ring(distance, device, memory), clock))
        measured.links[distance] = tuple(median(column) for column in zip(*each, strict=True))
        measured.slow[f"messages {distance} ranks on"] = links.slow_ranks([wall for _, _, wall in each])
    group = Groups(Layout(data=world), [range(1)], memory=memory).of(range(world))
    assert group is not None
    sums: list[Any] = [None] * world
    dist.all_gather_object(sums, links.reduction_seconds(group, device, clock))
    measured.reduction = median(sums)


def _alone(probe: LayerProbe, busy: Mapping[Part, float], clock: Clock) -> float:
    """Rank 0 measures while the others wait."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        answer[0] = sum(probe.seconds(clock).values()) / sum(busy.values())
    dist.broadcast_object_list(answer)
    return float(answer[0])


def _over_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """The medians over the ranks, and under ``slow`` the ranks whose arithmetic stands out."""
    if not dist.is_initialized():
        return {**own, "slow": {}}
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, own)
    arithmetic = [sum(of["products"].values()) for of in each]
    found = {name: _middle([of[name] for of in each]) for name in own}
    return {**found, "slow": {"products": links.slow_ranks(arithmetic)}}


def _middle(values: Iterable[Any]) -> Any:
    """The median of numbers, and of what is built of them place by place."""
    values = list(values)
    first = values[0]
    if isinstance(first, dict):
        return {key: _middle([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_middle(column) for column in zip(*values, strict=True))
    return median(values)
