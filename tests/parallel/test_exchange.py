"""Dispatch and combine over ranks against one process that has all tokens and all experts."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.exchange import Dispatched, LocalExchange
from model.fp8.quantise import Scale, Tile, dequantise, quantise
from parallel.comm_stream import comm_stream
from parallel.exchange import DispatchLayout, GroupExchange
from parallel.hop import Hop, Traffic
from parallel.mesh import Layout
from tests.ranks import run_ranks

HIDDEN = 5


@dataclass(frozen=True)
class Case:
    """Tokens of each rank, experts a token, experts a rank, and the only experts that tokens choose (None: all)."""

    tokens: tuple[int, ...]
    chosen: int
    each: int
    only: tuple[int, ...] | None = None
    seed: int = 0


def edges(world: int) -> list[Case]:
    even = (4,) * world
    return [
        Case(even, 1, 1),  # one expert a rank: nothing has to be put into order
        Case(even, world, 1),  # everyone to everyone
        Case(even, 2, 3, (0, 1)),  # the first rank's experts alone, one of which gets nothing
        Case(even, 1, 2, (2 * world - 1,)),  # all tokens to the last expert of the last rank
        Case((0,) * (world - 1) + (6,), 2, 2),  # tokens on one rank only
        Case((0,) * world, 2, 2),  # none at all
    ]


@st.composite
def routings(draw: st.DrawFn, world: int = 4) -> Case:
    tokens = draw(st.tuples(*[st.integers(0, 9)] * world))
    each = draw(st.integers(1, 4))
    chosen = draw(st.integers(1, min(3, world * each)))
    experts = st.sets(st.integers(0, world * each - 1), min_size=chosen)
    only = draw(st.none() | experts.map(lambda some: tuple(sorted(some))))
    return Case(tokens, chosen, each, only, draw(st.integers(0, 99)))


def drawn(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, gate values and experts of all ranks' tokens, the gradient of the result, experts' matrices."""
    generator = torch.Generator().manual_seed(case.seed)
    total, experts = sum(case.tokens), len(case.tokens) * case.each
    x, gz = (torch.randn(total, HIDDEN, generator=generator) for _ in range(2))
    weights = torch.rand(total, case.chosen, generator=generator)
    liking = torch.rand(total, experts, generator=generator)
    if case.only is not None:
        liking[:, list(case.only)] += 10
    indices = liking.topk(case.chosen).indices
    return x, weights, indices, gz, torch.randn(experts, HIDDEN, HIDDEN, generator=generator)


def expert(sent: Dispatched, matrices: Tensor) -> Tensor:
    """Row by row: the row through its expert's matrix, bent, times its gate value."""
    starts = [0, *sent.ends_E.tolist()]
    parts = [torch.tanh(sent.rows_RD[a:b] @ m) for a, b, m in zip(starts, starts[1:], matrices, strict=False)]
    return torch.cat(parts) * sent.weights_R[:, None]


def alone(case: Case) -> list[Tensor]:
    """[result, gradients of hidden states, gate values and matrices], by autograd in one process."""
    x, weights, indices, gz, matrices = drawn(case)
    leaves = [t.requires_grad_() for t in (x, weights, matrices)]
    exchange = LocalExchange(len(matrices))
    sent = exchange.dispatch(x, weights, indices).wait()
    z = exchange.combine(expert(sent, matrices), sent.layout).wait()
    return [z.detach(), *torch.autograd.grad(z, leaves, gz)]


@dataclass(frozen=True)
class Way:
    """How rows travel: over so many emulated nodes, in so many chunks."""

    nodes: int
    chunks: int = 1
    fp8: bool = False


WAYS = [Way(1), Way(1, 2), Way(2), Way(2, 3), Way(4)]


class Exchanges:
    """Flat over the world, or hierarchical over some nodes, in groups that are made once. Collective."""

    def __init__(self, world: int, nodes: Sequence[int]) -> None:
        self.world, rank = world, dist.get_rank()
        self.hops: dict[int, list[Hop]] = {}
        for number in nodes:
            layout = Layout(1, world, world, ranks_per_node=world // number)
            self.hops[number] = []
            for members in [layout.expert_group] if number == 1 else [layout.local_peers, layout.node_ranks]:
                every = dict.fromkeys(tuple(members(r)) for r in range(world))
                made = {ranks: dist.new_group(ranks) for ranks in every if len(ranks) > 1}
                mine = tuple(members(rank))
                if mine in made:
                    self.hops[number].append(Hop(made[mine], [layout.far(rank, peer) for peer in mine]))

    def over(self, way: Way, each: int) -> GroupExchange:
        assert dist.group.WORLD is not None
        return GroupExchange(dist.group.WORLD, each, self.hops[way.nodes], fp8=way.fp8, chunks=way.chunks)


def mine(case: Case) -> slice:
    rank = dist.get_rank()
    return slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))


def through(exchange: GroupExchange, case: Case) -> list[Tensor]:
    """[result, gradients of hidden states, gate values and matrices, rows that the experts got], of this rank."""
    x, weights, indices, gz, matrices = drawn(case)
    own, rank = mine(case), dist.get_rank()
    held = matrices[rank * case.each : (rank + 1) * case.each].clone().requires_grad_()
    sent = exchange.dispatch(x[own], weights[own], indices[own]).wait()
    rows, gates = sent.rows_RD.requires_grad_(), sent.weights_R.requires_grad_()
    y = expert(Dispatched(rows, gates, sent.ends_E, None), held)
    z = exchange.combine(y.detach(), sent.layout).wait()
    gy = exchange.dispatch_gradient(gz[own], sent.layout).wait()
    grows, ggates, gheld = torch.autograd.grad(y, [rows, gates, held], gy)
    gx, gweights = exchange.combine_gradient(grows, ggates, sent.layout).wait()
    assert z.shape == gx.shape == x[own].shape and gweights.shape == weights[own].shape
    return [t.detach() for t in (z, gx, gweights, gheld, rows)]


def together(rank: int, world: int, ways: Sequence[Way], cases: Sequence[Case]) -> list[list[list[list[float]]]]:
    """For every case and way: result and gradients. On the way, what experts get and give is compared between ways."""
    exchanges = Exchanges(world, sorted({way.nodes for way in ways}))
    results = []
    for case in cases:
        found = {way: through(exchanges.over(way, case.each), case) for way in ways}
        for way, tensors in found.items():
            same = tensors[3:] if way.nodes > 1 else tensors  # nodes sum before they send
            for got, wanted in zip(same[::-1], found[ways[0]][::-1], strict=False):
                assert torch.equal(got, wanted), (case, way)
            for got, wanted in zip(tensors, found[Way(way.nodes)], strict=True):
                assert torch.equal(got, wanted), ("chunks must not matter", case, way)
        results.append([[t.flatten().tolist() for t in tensors[:4]] for tensors in found.values()])
    return results


def assert_alone(world: int, ways: Sequence[Way], cases: Sequence[Case]) -> None:
    ranks = run_ranks(together, world, world, ways, cases)
    for number, case in enumerate(cases):
        wanted = alone(case)
        for way, kind in product(range(len(ways)), range(4)):
            got = torch.cat([torch.tensor(rank[number][way][kind]) for rank in ranks])
            what = f"{case}, {ways[way]}, tensor {kind}"
            torch.testing.assert_close(
                got, wanted[kind].flatten(), rtol=1e-6, atol=1e-6, msg=lambda m, what=what: f"{what}: {m}"
            )


@settings(max_examples=2, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.lists(routings(), min_size=12, max_size=12))
def test_ranks_together_are_one_process_alone_whatever_the_way(cases: list[Case]) -> None:
    assert_alone(4, WAYS, [*edges(4), *cases])


def test_nodes_of_another_number_of_ranks() -> None:
    assert_alone(6, [Way(1), Way(3), Way(3, 2), Way(2)], edges(6))


def in_fp8(rank: int, cases: Sequence[Case]) -> list[tuple[float, float, float]]:
    """For every case, how far what experts get, what returns and its gradient are from quantising at the experts; what
    they get is the same bits on every way."""
    found = []
    exchanges = Exchanges(4, [1, 2])
    for case in cases:
        x, weights, indices, gz, _ = drawn(case)
        own, got = mine(case), []
        for way in (Way(1), Way(2), Way(2, 3)):
            plain, fp8 = exchanges.over(way, case.each), exchanges.over(replace(way, fp8=True), case.each)
            sent = fp8.dispatch(x[own], weights[own], indices[own]).wait()
            wanted = plain.dispatch(x[own], weights[own], indices[own]).wait()
            assert sent.payload is not None and sent.rows_RD.shape == wanted.rows_RD.shape
            assert torch.equal(sent.ends_E, wanted.ends_E) and torch.equal(sent.weights_R, wanted.weights_R)
            got.append((sent.payload.stored.view(torch.uint8), sent.payload.scales))
            there = quantise(wanted.rows_RD, Tile.ROW, Scale.POWER_OF_TWO)
            gy = dequantise(fp8.dispatch_gradient(gz[own], sent.layout).wait())
            gy_wanted = quantise(plain.dispatch_gradient(gz[own], wanted.layout).wait(), Tile.ROW, Scale.POWER_OF_TWO)
            z = fp8.combine(dequantise(sent.payload), sent.layout).wait()
            z_wanted = plain.combine(dequantise(there), wanted.layout).wait()
            pairs = [(dequantise(sent.payload), dequantise(there)), (gy, dequantise(gy_wanted)), (z, z_wanted)]
            found.append(tuple(float((one - other).abs().sum()) for one, other in pairs))
        for stored, scales in got[1:]:
            assert torch.equal(stored, got[0][0]) and torch.equal(scales, got[0][1]), case
    return found


@settings(max_examples=1, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.lists(routings(), min_size=8, max_size=8))
def test_what_travels_in_fp8_is_what_the_experts_would_have_made_of_it(cases: list[Case]) -> None:
    for rank in run_ranks(in_fp8, 4, [*edges(4), *cases]):
        assert rank == [(0.0, 0.0, 0.0)] * len(rank)


def uneven(rank: int, way: Way) -> bool:
    """Dispatches and combines under way at once, waited for in another order."""
    torch.manual_seed(rank)
    exchange = Exchanges(4, [way.nodes]).over(way, 2)
    x, weights = torch.randn(3, 6, HIDDEN), torch.ones(6, 1)
    indices = [torch.randint(0, 8, (6, 1)) for _ in x]
    pending = [exchange.dispatch(x[i], weights, indices[i]) for i in range(3)]
    sent = [p.wait() for p in reversed(pending)][::-1]
    back = [exchange.combine(2 * s.rows_RD, s.layout) for s in sent]
    return all(torch.equal(back[i].wait(), 2 * x[i]) for i in (2, 0, 1))


@pytest.mark.parametrize("way", [Way(1), Way(2, 2)])
def test_exchanges_under_way_at_once_do_not_mix(way: Way) -> None:
    assert run_ranks(uneven, 4, way) == [True] * 4


def unattended(rank: int) -> tuple[bool, float, float]:
    """Nobody waits for the first hop of a dispatch -> whether the second one left all the same and then, of a combine,
    how long it was waited for and in flight."""
    exchange = Exchanges(4, [2]).over(Way(2, 2), 2)
    dist.barrier()
    indices = torch.arange(8).expand(6, 8)
    pending = exchange.dispatch(torch.randn(6, HIDDEN), torch.ones(6, 8), indices)
    deadline = time.monotonic() + 30
    while exchange.stream.times().communication_s == 0 or exchange.traffic.inside_bytes == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(exchange.traffic)
        time.sleep(0.01)
    sent = pending.wait()
    exchange.stream.clear()
    start = time.perf_counter()
    exchange.combine(sent.rows_RD, sent.layout).wait()
    seconds, times = time.perf_counter() - start, exchange.stream.times()
    return times.exposed_s <= seconds and times.communication_s <= seconds, times.exposed_s, times.communication_s


def test_the_second_hop_follows_the_first_without_anybody_waiting() -> None:
    for plausible, exposed_s, communication_s in run_ranks(unattended, 4):
        assert plausible and exposed_s > 0 and communication_s > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts how often the host waits for a GPU: needs CUDA")
def test_a_dispatch_waits_for_the_gpu_once_and_nothing_else_does(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        world = dist.group.WORLD
        assert world is not None
        exchange = GroupExchange(world, 4, [Hop(world, [False])], stream=comm_stream(device))
        x, weights = torch.randn(6, HIDDEN, device=device), torch.rand(6, 2, device=device)
        indices = torch.rand(6, 4, device=device).topk(2).indices

        def waits(run: Callable[[], Any]) -> tuple[Any, int]:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    result = run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return result, sum("synchronizing CUDA" in str(warning.message) for warning in caught)

        exchange.dispatch(x, weights, indices).wait()  # the first one makes the communicator
        sent, dispatching = waits(lambda: exchange.dispatch(x, weights, indices).wait())
        _, combining = waits(lambda: exchange.combine(sent.rows_RD, sent.layout).wait())
        gradients, back = waits(lambda: exchange.dispatch_gradient(x, sent.layout).wait())
        _, home = waits(lambda: exchange.combine_gradient(gradients, sent.weights_R, sent.layout).wait())
        assert (dispatching, combining, back, home) == (1, 0, 0, 0)
    finally:
        dist.destroy_process_group()


def expected_traffic(exchange: GroupExchange, layout: DispatchLayout, hidden: int) -> Traffic:
    """FP32 rows of so many channels, each with the gates of the experts behind its hop; what stays with its rank is no
    traffic."""
    total = {True: 0, False: 0}
    for hops in layout.chunks:
        for h, (hop, way) in enumerate(zip(exchange.hops, hops, strict=True)):
            behind = exchange.experts * math.prod(len(later.far) for later in exchange.hops[h + 1 :])
            for peer, count in enumerate(way.sent):
                if peer != exchange.digits[h]:
                    total[hop.far[peer]] += count * 4 * (hidden + behind)
    return Traffic(total[False], total[True])


def crossings(rank: int, ways: Sequence[Way], cases: Sequence[Case]) -> list[tuple[list[int], list[int]]]:
    """Rows sent in each hop, case and way, and how many (token, node) and (token, rank) pairs are in the routing."""
    found = []
    exchanges = Exchanges(4, [1, 2])
    for case, way in product(cases, ways):
        x, weights, indices, _, _ = drawn(case)
        exchange, own = exchanges.over(way, case.each), mine(case)
        layout = exchange.dispatch(x[own], weights[own], indices[own]).wait().layout
        assert exchange.traffic == expected_traffic(exchange, layout, x.shape[1])
        sent = torch.tensor([sum(sum(hop.sent) for hop in hops) for hops in zip(*layout.chunks, strict=True)])
        dist.all_reduce(sent)
        ranks = indices // case.each
        to_nodes = sum(len(set(row)) for row in (ranks // (4 // way.nodes)).tolist())
        to_ranks = sum(len(set(row)) for row in ranks.tolist())
        found.append((sent.tolist(), [to_ranks] if way.nodes == 1 else [to_nodes, to_ranks]))
    return found


@settings(max_examples=1, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.lists(routings(), min_size=8, max_size=8))
def test_a_token_crosses_once_to_each_of_its_ranks_or_nodes(cases: list[Case]) -> None:
    for rank in run_ranks(crossings, 4, [Way(1), Way(2), Way(2, 3)], [*edges(4), *cases]):
        assert any(sum(sent) for sent, _ in rank)
        for sent, wanted in rank:
            assert sent == wanted
