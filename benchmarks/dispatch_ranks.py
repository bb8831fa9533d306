"""One rank of ``benchmarks.dispatch``, as torchrun starts it on an emulated node:

    torchrun -m benchmarks.dispatch_ranks SETTING RESULT

SETTING is a ``Setting`` as JSON; rank 0 writes the result, as JSON, to the file RESULT. T tokens of a rank, D model,
K experts a token.
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.exchange import Dispatched
from model.router import choose
from parallel.exchange import DispatchLayout, GroupExchange, Hop
from parallel.mesh import Layout

MODEL = ModelConfig()
"""DeepSeek-V3: 256 experts, 8 of them a token, 7168 channels."""
MOST_NODES = 4
WARM_UP = 1


@dataclass(frozen=True)
class Setting:
    """``tokens`` of each rank; ``rounds`` that count."""

    nodes: int
    ranks_per_node: int
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Sent:
    """What a rank sends, and gets from other nodes, in one hop of one pass, in bytes, itself excepted."""

    between: int
    received_between: int
    inside: int


def routing(tokens: int, nodes: int, generator: torch.Generator) -> Tensor:
    """[T, K] experts of tokens that like all experts alike, of at most ``MOST_NODES`` nodes each."""
    config = replace(MODEL, n_group=nodes, topk_group=min(nodes, MOST_NODES))
    scores_TE = torch.rand(tokens, config.n_routed_experts, generator=generator)
    return choose(scores_TE, torch.zeros(config.n_routed_experts), config)


class Contestant:
    """One way to dispatch, on this rank. ``hops``: the ranks that this one sends to in each hop."""

    def __init__(self, exchange: GroupExchange, hops: list[list[int]], ranks_per_node: int) -> None:
        self.exchange, self.hops, self._ranks_per_node = exchange, hops, ranks_per_node

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> tuple[Tensor, Dispatched]:
        """Dispatch and combine, as if every expert gave back what it gets."""
        sent = self.exchange.dispatch(x_TD, weights_TK, indices_TK).wait()
        return self.exchange.combine(sent.rows_RD, sent.layout).wait(), sent

    def backward(self, gz_TD: Tensor, sent: Dispatched) -> Tensor:
        """Their gradients."""
        grows_RD = self.exchange.dispatch_gradient(gz_TD, sent.layout).wait()
        return self.exchange.combine_gradient(grows_RD, sent.weights_R, sent.layout).wait()[0]

    def traffic(self, layout: DispatchLayout, row_bytes: int, gate_bytes: int) -> dict[str, list[list[Sent]]]:
        """Forward and backward -> passes -> hops. Rows go with the gate values of the experts behind a hop on dispatch,
        and come with their gradients on its gradient; combine has rows alone."""
        bare = [row_bytes for _ in self.hops]
        packed = [row_bytes + self._behind(h) * gate_bytes for h in range(len(self.hops))]
        return {
            "forward": [self._pass(layout, packed, back=False), self._pass(layout, bare, back=True)],
            "backward": [self._pass(layout, bare, back=False), self._pass(layout, packed, back=True)],
        }

    def _behind(self, h: int) -> int:
        """Experts that a rank of hop ``h`` stands for."""
        return self.exchange.experts * math.prod(len(peers) for peers in self.hops[h + 1 :])

    def _pass(self, layout: DispatchLayout, widths: list[int], back: bool) -> list[Sent]:
        rank, found = dist.get_rank(), []
        for peers, way, width in zip(self.hops, layout.hops, widths, strict=True):
            sent, received = (way.received, way.sent) if back else (way.sent, way.received)
            near = [peer // self._ranks_per_node == rank // self._ranks_per_node for peer in peers]
            away = [p for p, of_node in enumerate(near) if not of_node]
            beside = [p for p, of_node in enumerate(near) if of_node and peers[p] != rank]
            rows = (sum(sent[p] for p in away), sum(received[p] for p in away), sum(sent[p] for p in beside))
            found.append(Sent(*(width * count for count in rows)))
        return found


def contestants(setting: Setting) -> dict[str, Contestant]:
    """Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = MODEL.n_routed_experts // world
    layout = Layout(1, world, world, setting.ranks_per_node)
    hops, groups = [], []
    for members in (layout.local_peers, layout.node_ranks):
        every = dict.fromkeys(tuple(members(r)) for r in range(world))
        made = {ranks: dist.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in every}
        hops.append(members(rank))
        groups.append(Hop(made[tuple(hops[-1])], [layout.far(rank, peer) for peer in hops[-1]]))
    everyone = dist.group.WORLD
    assert everyone is not None
    one = [Hop(everyone, [layout.far(rank, peer) for peer in range(world)])]
    return {
        "flat": Contestant(GroupExchange(everyone, experts, one), [list(range(world))], setting.ranks_per_node),
        "hierarchical": Contestant(GroupExchange(everyone, experts, groups), hops, setting.ranks_per_node),
    }


def measure(setting: Setting) -> dict[str, Any] | None:
    """The result, on rank 0. Both contestants must give the same."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(setting.tokens, MODEL.hidden_size, generator=generator).bfloat16()
    indices_TK = routing(setting.tokens, setting.nodes, generator)
    weights_TK = torch.rand(indices_TK.shape, generator=generator)
    of = contestants(setting)
    outcome, bytes_sent = {}, {}
    for name, contestant in of.items():
        before = counters()
        z_TD, sent = contestant.forward(x_TD, weights_TK, indices_TK)
        outcome[name] = z_TD, contestant.backward(z_TD, sent)
        after = counters()
        traffic = contestant.traffic(sent.layout, MODEL.hidden_size * x_TD.element_size(), weights_TK.element_size())
        bytes_sent[name] = traffic, {device: after[device] - before[device] for device in after}
    for flat_TD, hierarchical_TD in zip(*outcome.values(), strict=True):
        # BF16 sums in another order: two units in the last place of the largest sums.
        torch.testing.assert_close(flat_TD, hierarchical_TD, rtol=2**-6, atol=2**-4)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in of}
    for turn in range(WARM_UP + setting.rounds):
        for name in of if turn % 2 else reversed(of):
            seconds[name].append(timed(of[name], x_TD, weights_TK, indices_TK))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, bytes_sent)
    node_TK = indices_TK // (MODEL.n_routed_experts // setting.nodes)
    copies = torch.tensor(sum(len(set(row) - {rank // setting.ranks_per_node}) for row in node_TK.tolist()))
    dist.all_reduce(copies)
    if rank:
        return None
    # Once there and once back, in either direction.
    result: dict[str, Any] = {"least_between_bytes": 2 * int(copies) * MODEL.hidden_size * x_TD.element_size()}
    for name in of:
        result[name] = summary([ranks[name] for ranks in every], seconds[name][WARM_UP:], setting)
    return result


def timed(of: Contestant, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> tuple[float, float]:
    """Seconds of the slowest rank, forward and backward."""
    dist.barrier()
    begin = time.perf_counter()
    z_TD, sent = of.forward(x_TD, weights_TK, indices_TK)
    middle = time.perf_counter()
    dist.barrier()
    again = time.perf_counter()
    of.backward(z_TD, sent)
    seconds = torch.tensor([middle - begin, time.perf_counter() - again])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1])


def counters() -> dict[str, int]:
    """Bytes that this node has sent so far to others (eth0) and inside itself (lo), with headers. Collective: nothing
    is under way."""
    dist.barrier()
    found = {device: c.bytes_sent for device, c in psutil.net_io_counters(pernic=True).items()}
    dist.barrier()
    return {device: found[device] for device in ("eth0", "lo")}


def summary(ranks: list[Any], seconds: list[tuple[float, float]], setting: Setting) -> dict[str, Any]:
    """Median seconds; bytes, summed over the ranks and, for each hop, of the busiest node."""
    size = setting.ranks_per_node
    nodes = [ranks[n : n + size] for n in range(0, len(ranks), size)]
    found: dict[str, Any] = {"wire_bytes": {d: sum(of[0][1][d] for of in nodes) for d in ("eth0", "lo")}}
    for direction, medians in zip(
        ("forward", "backward"), map(statistics.median, zip(*seconds, strict=True)), strict=True
    ):
        passes = ranks[0][0][direction]
        hops = []
        for p, h in [(p, h) for p, of in enumerate(passes) for h in range(len(of))]:
            sent = [[traffic[direction][p][h] for traffic, _ in of] for of in nodes]
            hops.append(
                {
                    "between_bytes": sum(s.between for of in sent for s in of),
                    "inside_bytes": sum(s.inside for of in sent for s in of),
                    "busiest_between_bytes": max(
                        max(sum(s.between for s in of), sum(s.received_between for s in of)) for of in sent
                    ),
                    "busiest_inside_bytes": max(sum(s.inside for s in of) for of in sent),
                }
            )
        found[direction] = {"seconds": medians, "hops": hops}
    return found


def main() -> int:
    torch.set_num_threads(1)
    setting = Setting(**json.loads(sys.argv[1]))
    dist.init_process_group("gloo")
    assert int(os.environ["LOCAL_WORLD_SIZE"]) == setting.ranks_per_node, asdict(setting)
    result = measure(setting)
    if result is not None:
        Path(sys.argv[2]).write_text(json.dumps(result))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
