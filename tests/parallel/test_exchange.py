"""Dispatch and combine over ranks against one process that has all tokens and all experts."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import Dispatched, LocalExchange
from model.fp8.quantise import Scale, Tile, dequantise, quantise
from parallel.exchange import DispatchLayout, GroupExchange, Hop, Traffic
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


def cases(world: int) -> list[Case]:
    generator = torch.Generator().manual_seed(world)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    drawn = []
    for seed in range(8):
        each = number(1, 4)
        tokens = tuple(number(1, 9) for _ in range(world))
        drawn.append(Case(tokens, number(1, min(3, world * each)), each, None, seed))
    even = (4,) * world
    return [
        *drawn,
        Case(even, 1, 1),  # one expert a rank: nothing has to be put into order
        Case(even, world, 1),  # everyone to everyone
        Case(even, 2, 3, (0, 1)),  # the first rank's experts alone, one of which gets nothing
        Case(even, 1, 2, (2 * world - 1,)),  # all tokens to the last expert of the last rank
        Case((0,) * (world - 1) + (6,), 2, 2),  # tokens on one rank only
        Case((0,) * world, 2, 2),  # none at all
    ]


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


def flat(each: int, fp8: bool = False) -> GroupExchange:
    hop = Hop(dist.group.WORLD, [False] * dist.get_world_size())
    return GroupExchange(dist.group.WORLD, each, [hop], fp8=fp8)


def exchange_over(world: int, nodes: int, each: int, fp8: bool = False) -> GroupExchange:
    """Flat over the world, or hierarchical over so many nodes. Collective."""
    if nodes == 1:
        return flat(each, fp8)
    layout = Layout(1, world, world, ranks_per_node=world // nodes)
    hops = []
    for members in (layout.local_peers, layout.node_ranks):
        groups = {tuple(members(r)): None for r in range(world)}
        made = {ranks: dist.new_group(ranks) if len(ranks) > 1 else None for ranks in groups}
        mine = tuple(members(dist.get_rank()))
        hops.append(Hop(made[mine], [layout.far(dist.get_rank(), rank) for rank in mine]))
    return GroupExchange(dist.group.WORLD, each, hops, fp8=fp8)


def together(rank: int, world: int, nodes: int) -> list[list[list[float]]]:
    """The same of this rank's tokens and experts, for every case."""
    results = []
    exchanges = {case.each: exchange_over(world, nodes, case.each) for case in cases(world)}
    for case in cases(world):
        x, weights, indices, gz, matrices = drawn(case)
        first = sum(case.tokens[:rank])
        mine = slice(first, first + case.tokens[rank])
        held = matrices[rank * case.each : (rank + 1) * case.each].clone().requires_grad_()
        exchange = exchanges[case.each]
        sent = exchange.dispatch(x[mine], weights[mine], indices[mine]).wait()
        rows, gates = sent.rows_RD.requires_grad_(), sent.weights_R.requires_grad_()
        y = expert(Dispatched(rows, gates, sent.ends_E, None), held)
        z = exchange.combine(y.detach(), sent.layout).wait()
        gy = exchange.dispatch_gradient(gz[mine], sent.layout).wait()
        grows, ggates, gheld = torch.autograd.grad(y, [rows, gates, held], gy)
        gx, gweights = exchange.combine_gradient(grows, ggates, sent.layout).wait()
        assert z.shape == gx.shape == x[mine].shape and gweights.shape == weights[mine].shape
        results.append([t.flatten().tolist() for t in (z, gx, gweights, gheld)])
    return results


@pytest.mark.parametrize("world,nodes", [(2, 1), (4, 1), (2, 2), (4, 2), (4, 4), (6, 3)])
def test_ranks_together_are_one_process_alone(world: int, nodes: int) -> None:
    ranks = run_ranks(together, world, world, nodes)
    for number, case in enumerate(cases(world)):
        wanted = alone(case)
        for kind, want in enumerate(wanted):
            got = torch.cat([torch.tensor(rank[number][kind]) for rank in ranks])
            torch.testing.assert_close(got, want.flatten(), rtol=1e-6, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")


def in_fp8(rank: int, world: int, nodes: int) -> list[tuple[float, float, float]]:
    """For every case, how far what experts get, what returns and its gradient are from quantising at the experts."""
    found = []
    for case in cases(world):
        x, weights, indices, gz, _ = drawn(case)
        mine = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
        plain, fp8 = (exchange_over(world, nodes, case.each, fp8) for fp8 in (False, True))
        sent = fp8.dispatch(x[mine], weights[mine], indices[mine]).wait()
        wanted = plain.dispatch(x[mine], weights[mine], indices[mine]).wait()
        assert sent.payload is not None and sent.rows_RD.shape == wanted.rows_RD.shape
        assert torch.equal(sent.ends_E, wanted.ends_E) and torch.equal(sent.weights_R, wanted.weights_R)
        there = quantise(wanted.rows_RD, Tile.ROW, Scale.POWER_OF_TWO)
        gy = fp8.dispatch_gradient(gz[mine], sent.layout).wait()
        gy_wanted = quantise(plain.dispatch_gradient(gz[mine], wanted.layout).wait(), Tile.ROW, Scale.POWER_OF_TWO)
        z = fp8.combine(dequantise(sent.payload), sent.layout).wait()
        z_wanted = plain.combine(dequantise(there), wanted.layout).wait()
        pairs = [(dequantise(sent.payload), dequantise(there)), (gy, dequantise(gy_wanted)), (z, z_wanted)]
        found.append(tuple(float((got - want).abs().sum()) for got, want in pairs))
    return found


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_travels_in_fp8_is_what_the_experts_would_have_made_of_it(nodes: int) -> None:
    for rank in run_ranks(in_fp8, 4, 4, nodes):
        assert rank == [(0.0, 0.0, 0.0)] * len(rank)


def uneven(rank: int) -> bool:
    """Two dispatches and two combines under way at once, waited for in another order."""
    torch.manual_seed(rank)
    exchange = flat(2)
    x, weights = torch.randn(2, 6, HIDDEN), torch.ones(6, 1)
    indices = [torch.randint(0, 4, (6, 1)) for _ in range(2)]
    pending = [exchange.dispatch(x[i], weights, indices[i]) for i in range(2)]
    sent = [p.wait() for p in reversed(pending)][::-1]
    back = [exchange.combine(2 * s.rows_RD, s.layout) for s in sent]
    return all(torch.equal(back[i].wait(), 2 * x[i]) for i in (1, 0))


def test_two_exchanges_under_way_at_once_do_not_mix() -> None:
    assert run_ranks(uneven, 2) == [True, True]


def expected_traffic(exchange: GroupExchange, layout: DispatchLayout, hidden: int, waited_s: float) -> Traffic:
    """FP32 rows of so many channels, each with the gates of the experts behind its hop; what stays with its rank is no
    traffic."""
    total = {True: 0, False: 0}
    for h, (hop, way) in enumerate(zip(exchange.hops, layout.hops, strict=True)):
        behind = exchange.experts * math.prod(len(later.far) for later in exchange.hops[h + 1 :])
        for peer, count in enumerate(way.sent):
            if peer != exchange.digits[h]:
                total[hop.far[peer]] += count * 4 * (hidden + behind)
    return Traffic(total[False], total[True], waited_s)


def crossings(rank: int, world: int, nodes: int) -> list[tuple[list[int], list[int]]]:
    """Rows sent in each hop and case, and how many (token, node) and (token, rank) pairs there are in the routing."""
    found = []
    size = world // nodes
    exchanges = {case.each: exchange_over(world, nodes, case.each) for case in cases(world)}
    for case in cases(world):
        x, weights, indices, _, _ = drawn(case)
        mine = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
        exchange = exchanges[case.each]
        exchange.traffic.clear()
        layout = exchange.dispatch(x[mine], weights[mine], indices[mine]).wait().layout
        assert exchange.traffic == expected_traffic(exchange, layout, x.shape[1], exchange.traffic.waited_s)
        sent = torch.tensor([sum(hop.sent) for hop in layout.hops])
        dist.all_reduce(sent)
        ranks = indices // case.each
        to_nodes = sum(len(set(row)) for row in (ranks // size).tolist())
        to_ranks = sum(len(set(row)) for row in ranks.tolist())
        found.append((sent.tolist(), [to_ranks] if nodes == 1 else [to_nodes, to_ranks]))
    return found


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_token_crosses_once_to_each_of_its_ranks_or_nodes(nodes: int) -> None:
    for rank in run_ranks(crossings, 4, 4, nodes):
        assert any(sum(sent) for sent, _ in rank)
        for sent, wanted in rank:
            assert sent == wanted
