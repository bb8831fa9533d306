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
from model.fp8 import SIZE
from model.fp8.quantise import Quantised, dequantise
from model.router import choose
from parallel.exchange import DispatchLayout, GroupExchange
from parallel.hop import Hop
from parallel.mesh import Layout

MODEL = ModelConfig()
"""DeepSeek-V3: 256 experts, 8 of them a token, 7168 channels."""
FP8_ROW_BYTES = MODEL.hidden_size + 4 * MODEL.hidden_size // SIZE
"""A row and its scales."""
MOST_NODES = 4
WARM_UP = 1


@dataclass(frozen=True)
class Setting:
    """``tokens`` of each rank; ``rounds`` that count; ``chunks`` of a dispatch in two hops."""

    nodes: int
    ranks_per_node: int
    tokens: int
    rounds: int
    chunks: int


@dataclass(frozen=True)
class Sent:
    """What a rank sends, and gets from other nodes, in one pass, in bytes, itself excepted."""

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
        rows_RD = sent.rows_RD if sent.payload is None else dequantise(sent.payload).to(x_TD.dtype)
        return self.exchange.combine(rows_RD, sent.layout).wait(), sent

    def backward(self, gz_TD: Tensor, sent: Dispatched) -> Tensor:
        """Their gradients."""
        arrived = self.exchange.dispatch_gradient(gz_TD, sent.layout).wait()
        grows_RD = dequantise(arrived).to(gz_TD.dtype) if isinstance(arrived, Quantised) else arrived
        return self.exchange.combine_gradient(grows_RD, sent.weights_R, sent.layout).wait()[0]

    def traffic(self, layout: DispatchLayout) -> dict[str, list[Sent]]:
        """Forward and backward -> passes. On dispatch, rows go with gate values of the experts behind a hop, and its
        gradient brings theirs; combine has rows alone. What is combined is BF16 in any case."""
        row = MODEL.hidden_size * 2
        payload = FP8_ROW_BYTES if self.exchange.fp8 else row
        gates = [4 * self._behind(h) for h in range(len(self.hops))]
        return {
            "forward": [
                self._pass(layout, [payload + g for g in gates]),
                self._pass(layout, [row for _ in gates], True),
            ],
            "backward": [
                self._pass(layout, [payload for _ in gates]),
                self._pass(layout, [row + g for g in gates], True),
            ],
        }

    def _behind(self, h: int) -> int:
        """Experts that a rank of hop ``h`` stands for."""
        return self.exchange.experts * math.prod(len(peers) for peers in self.hops[h + 1 :])

    def _pass(self, layout: DispatchLayout, widths: list[int], back: bool = False) -> Sent:
        rank, node = dist.get_rank(), dist.get_rank() // self._ranks_per_node
        between = received_between = inside = 0
        for h, (peers, width) in enumerate(zip(self.hops, widths, strict=True)):
            for hops in layout.chunks:
                sent, received = (hops[h].received, hops[h].sent) if back else (hops[h].sent, hops[h].received)
                for p, peer in enumerate(peers):
                    if peer // self._ranks_per_node != node:
                        between += width * sent[p]
                        received_between += width * received[p]
                    elif peer != rank:
                        inside += width * sent[p]
        return Sent(between, received_between, inside)


def contestants(setting: Setting) -> dict[str, Contestant]:
    """Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = MODEL.n_routed_experts // world
    layout = Layout(1, world, world, setting.ranks_per_node)
    two: list[tuple[list[int], Hop]] = []
    for members in (layout.local_peers, layout.node_ranks):
        every = dict.fromkeys(tuple(members(r)) for r in range(world))
        made = {ranks: dist.new_group(list(ranks)) for ranks in every if len(ranks) > 1}
        peers = members(rank)
        if tuple(peers) in made:
            two.append((peers, Hop(made[tuple(peers)], [layout.far(rank, peer) for peer in peers])))
    everyone = dist.group.WORLD
    assert everyone is not None
    all_ranks = list(range(world))
    one = [(all_ranks, Hop(everyone, [layout.far(rank, peer) for peer in all_ranks]))]
    found = {}
    for kind, ways, chunks in (("flat", one, 1), ("hierarchical", two, setting.chunks)):
        for payload in ("bf16", "fp8"):
            hops = [hop for _, hop in ways]
            exchange = GroupExchange(everyone, experts, hops, fp8=payload == "fp8", chunks=chunks)
            found[f"{kind} {payload}"] = Contestant(exchange, [peers for peers, _ in ways], setting.ranks_per_node)
    return found


def measure(setting: Setting) -> dict[str, Any] | None:
    """The result, on rank 0. With the same payload, both kinds must give the same."""
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
        bytes_sent[name] = contestant.traffic(sent.layout), {device: after[device] - before[device] for device in after}
    for payload in ("bf16", "fp8"):
        for flat_TD, two_hops_TD in zip(outcome[f"flat {payload}"], outcome[f"hierarchical {payload}"], strict=True):
            # BF16 sums in another order: two units in the last place of the largest sums.
            torch.testing.assert_close(flat_TD, two_hops_TD, rtol=2**-6, atol=2**-4)
    turns: dict[str, list[Turn]] = {name: [] for name in of}
    for turn in range(WARM_UP + setting.rounds):
        for name in of if turn % 2 else reversed(of):
            turns[name].append(timed(of[name], x_TD, weights_TK, indices_TK))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, bytes_sent)
    node_TK = indices_TK // (MODEL.n_routed_experts // setting.nodes)
    copies = torch.tensor(sum(len(set(row) - {rank // setting.ranks_per_node}) for row in node_TK.tolist()))
    dist.all_reduce(copies)
    if rank:
        return None
    result: dict[str, Any] = {"copies_between": int(copies)}
    for name in of:
        result[name] = summary([ranks[name] for ranks in every], turns[name][WARM_UP:], setting)
    return result


@dataclass(frozen=True)
class Turn:
    """Seconds of the slowest rank, forward and backward; ``busy_cores``: CPU time of all ranks over that time."""

    forward: float
    backward: float
    busy_cores: float


def timed(of: Contestant, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Turn:
    dist.barrier()
    cpu, begin = time.process_time(), time.perf_counter()
    z_TD, sent = of.forward(x_TD, weights_TK, indices_TK)
    middle, cpu_forward = time.perf_counter(), time.process_time()
    dist.barrier()
    cpu_again, again = time.process_time(), time.perf_counter()
    of.backward(z_TD, sent)
    seconds = torch.tensor([middle - begin, time.perf_counter() - again])
    busy = torch.tensor(time.process_time() - cpu_again + cpu_forward - cpu)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(busy)
    return Turn(float(seconds[0]), float(seconds[1]), float(busy / seconds.sum()))


def counters() -> dict[str, int]:
    """Bytes that this node has sent so far to others (eth0) and inside itself (lo), with headers. Collective: nothing
    is under way."""
    dist.barrier()
    found = {device: c.bytes_sent for device, c in psutil.net_io_counters(pernic=True).items()}
    dist.barrier()
    return {device: found[device] for device in ("eth0", "lo")}


def summary(ranks: list[Any], turns: list[Turn], setting: Setting) -> dict[str, Any]:
    """Medians; bytes, summed over the ranks and, for each pass, of the busiest node."""
    size = setting.ranks_per_node
    nodes = [ranks[n : n + size] for n in range(0, len(ranks), size)]
    found: dict[str, Any] = {
        "wire_bytes": {d: sum(of[0][1][d] for of in nodes) for d in ("eth0", "lo")},
        "busy_cores": statistics.median(turn.busy_cores for turn in turns),
    }
    for direction in ("forward", "backward"):
        passes = []
        for p in range(len(ranks[0][0][direction])):
            sent = [[traffic[direction][p] for traffic, _ in of] for of in nodes]
            passes.append(
                {
                    "between_bytes": sum(s.between for of in sent for s in of),
                    "inside_bytes": sum(s.inside for of in sent for s in of),
                    "busiest_between_bytes": max(
                        max(sum(s.between for s in of), sum(s.received_between for s in of)) for of in sent
                    ),
                    "busiest_inside_bytes": max(sum(s.inside for s in of) for of in sent),
                }
            )
        seconds = statistics.median(getattr(turn, direction) for turn in turns)
        found[direction] = {"seconds": seconds, "passes": passes}
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
