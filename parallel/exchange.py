"""Expert-parallel dispatch and combine over process groups, in one hop (flat) or two (hierarchical).

A token's row crosses once to each rank that owns some of its experts (flat), or once to each *node*, to the rank there
with the sender's own local index, which passes it on to the owners inside the node (hierarchical). With every row go
the gate values of the experts behind the hop, from which the next hop and the owner work out where it belongs. Combine
takes the same way back and sums before each hop, so that one row returns for each that came. The gradients follow the
layout of the forward: the gradient of combine is dispatched, the gradient of dispatch is combined.

Tokens may go in chunks: then the first hop of one is in flight beside the second hop of the one before, and the links
between nodes and inside them are busy together. What experts get, and in which order, is the same for any number of
chunks, and sums have a fixed order: so are the results, to the bit.

One all-gather carries the row counts of all hops and chunks, and reading them is the one host synchronisation of a
dispatch. A rank or an expert without a token takes part like any other.

T rows before a hop, D model, K experts a token, G ranks of the expert group, P peers of a hop, X experts behind a hop,
N rows sent, M rows received, C chunks, E experts held here, R (row, expert) pairs held here, sorted by expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import Dispatched, Pending
from model.fp8 import payload
from model.fp8.quantise import Quantised
from parallel.activity import Activity
from parallel.collectives import Columns, Group, all_gather, members_of, position_in
from parallel.comm_stream import CommStream, HostStream
from parallel.hop import ABSENT, Bags, Hop, HopLayout, Traffic, awaited, numbered, true_places

Splits = tuple[list[int], list[int]]
"""Rows sent to and received from each peer of a hop."""


@dataclass(frozen=True)
class DispatchLayout:
    """The way of one dispatch: the hops of each chunk, and what its last rank does with the rows received, which stand
    chunk by chunk. ``row_R``, ``expert_R``: row received and expert of each pair; ``pairs_M``: the bags that sum pairs
    into rows received. ``gate_TK``: each token's experts."""

    chunks: list[list[HopLayout]]
    row_R: Tensor
    expert_R: Tensor
    pairs_M: Bags
    gate_TK: Tensor


@dataclass(frozen=True)
class RowCounts:
    """What a rank knows before it sends. ``splits``: of each chunk, hop by hop; ``pairs``: those that end here;
    ``sources_C``: rows that end here by chunk and by the digits of the rank that they come from."""

    splits: list[list[Splits]]
    pairs: int
    sources_C: Tensor

    @property
    def rows(self) -> int:
        """Rows that end here."""
        return sum(sum(hops[-1][1]) for hops in self.splits)


class GroupExchange:
    """``dispatch.kind: flat`` or ``hierarchical``, by its hops.

    ``group``: the expert group; every rank of it holds ``experts`` of the layer's experts, in its order. The rank of
    the expert group is the number whose digits are the ranks in the ``hops``, the first hop's digit standing first.
    Flat is one hop over the group itself; hierarchical is two, over the ranks of this local index, one on each node,
    and over the ranks of this node, and either alone where the other would be a hop to oneself. Two hops have groups
    that nothing else uses: what is started on them is in the order of ``stream``, and not of the calling thread.
    ``traffic`` counts what is sent; ``chunks`` is the same on every rank. Raises LostPeer when a rank does not come.

    ``fp8``: what is dispatched, forward and as a gradient, travels in FP8 with a scale of 1x128 numbers, and goes into
    the products of the experts as it came. What is combined is a sum, in the dtype of its rows (report, 3.3.3).
    """

    def __init__(
        self,
        group: Group,
        experts: int,
        hops: Sequence[Hop],
        traffic: Traffic | None = None,
        stream: CommStream | None = None,
        fp8: bool = False,
        chunks: int = 1,
        activity: Activity | None = None,
    ) -> None:
        self.group, self.experts, self.hops, self.fp8, self.chunks = group, experts, hops, fp8, chunks
        self.traffic = Traffic() if traffic is None else traffic
        self.stream = HostStream() if stream is None else stream
        self.activity = Activity(dist.get_rank()) if activity is None else activity
        self.members, self.me = members_of(group), position_in(group)
        self.ranks = len(self.members)
        self.sizes = [len(hop.far) for hop in hops]
        assert prod(self.sizes) == self.ranks, (self.sizes, self.ranks)
        self.digits = tuple(self.me // prod(self.sizes[h + 1 :]) % size for h, size in enumerate(self.sizes))

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        gates_TX = weights_TK.new_full((len(weights_TK), self.ranks * self.experts), ABSENT)
        gates_TX.scatter_(1, indices_TK, weights_TK)
        counts = self._count(gates_TX != ABSENT)
        sent = payload.pack(x_TD) if self.fp8 else x_TD
        chunks: list[list[HopLayout]] = [[] for _ in range(self.chunks)]
        parts = list(zip(self._split(sent), self._split(gates_TX), strict=True))

        def start(h: int, c: int, arrived: Columns | None) -> Pending[Columns]:
            rows_TD, gates_TX = parts[c] if arrived is None else arrived
            gates_TPX = gates_TX.unflatten(1, (self.sizes[h], -1))
            way = self.hops[h].layout(gates_TPX, *counts.splits[c][h])
            chunks[c].append(way)
            return self.hops[h].forth(rows_TD, gates_TPX, way, self.traffic, self.stream)

        pending = self._start("dispatch", start, range(len(self.hops)))

        def finish() -> Dispatched:
            rows_MD, gates_MX = _joined(pending.wait())
            return self._sorted(rows_MD, gates_MX, counts, chunks, indices_TK, x_TD)

        return Pending(finish)

    def combine(self, y_RD: Tensor, layout: DispatchLayout) -> Pending[Tensor]:
        def home(arrived: Columns, h: int, way: HopLayout) -> Columns:
            return (way.rows_T.sum(arrived[0]),)

        pending = self._return("combine", (layout.pairs_M.sum(y_RD),), layout, home)

        def finish() -> Tensor:
            (rows_TD,) = _joined([home(rows, 0, c[0]) for rows, c in zip(pending.wait(), layout.chunks, strict=True)])
            return rows_TD

        return Pending(finish)

    def dispatch_gradient(self, gz_TD: Tensor, layout: DispatchLayout) -> Pending[Tensor | Quantised]:
        parts = self._split(payload.pack(gz_TD) if self.fp8 else gz_TD)

        def start(h: int, c: int, arrived: Columns | None) -> Pending[Columns]:
            (rows,) = (parts[c],) if arrived is None else arrived
            return self.hops[h].forth(rows, None, layout.chunks[c][h], self.traffic, self.stream)

        pending = self._start("gradient of combine", start, range(len(self.hops)))

        def finish() -> Tensor | Quantised:
            rows = _joined(pending.wait())[0].index_select(0, layout.row_R)
            return payload.unpack(rows, gz_TD.shape[1]) if self.fp8 else rows

        return Pending(finish)

    def combine_gradient(
        self, grows_RD: Tensor, gweights_R: Tensor, layout: DispatchLayout
    ) -> Pending[tuple[Tensor, Tensor]]:
        grows_MD = layout.pairs_M.sum(grows_RD)
        gweights_MX = gweights_R.new_zeros(len(grows_MD), self.experts)
        gweights_MX.view(-1)[layout.row_R * self.experts + layout.expert_R] = gweights_R

        def home(arrived: Columns, h: int, way: HopLayout) -> Columns:
            """Sum the rows that came back, and put their gate values' gradients side by side, peer by peer."""
            rows_ND, gates_NX = arrived
            rows_TD = way.rows_T.sum(rows_ND)
            gates_TPX = gates_NX.new_zeros(len(rows_TD), self.sizes[h], gates_NX.shape[1])
            gates_TPX[way.row_N, way.peer_N] = gates_NX
            return rows_TD, gates_TPX.flatten(1)

        pending = self._return("gradient of dispatch", (grows_MD, gweights_MX), layout, home)

        def finish() -> tuple[Tensor, Tensor]:
            parts = [home(arrived, 0, c[0]) for arrived, c in zip(pending.wait(), layout.chunks, strict=True)]
            rows_TD, gates_TX = _joined(parts)
            return rows_TD, gates_TX.gather(1, layout.gate_TK)

        return Pending(finish)

    def _split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each chunk."""
        return rows.tensor_split(self.chunks)

    def _start(
        self, operation: str, start: Callable[[int, int, Columns | None], Pending[Columns]], order: Sequence[int]
    ) -> Pending[list[Columns]]:
        """Take every chunk through the hops in ``order``: ``start(hop, chunk, what the hop before brought)``."""

        def chain() -> list[Pending[Columns]]:
            pending = [start(order[0], c, None) for c in range(self.chunks)]
            for h in order[1:]:
                pending = [start(h, c, before.wait()) for c, before in enumerate(pending)]
            return pending

        return awaited(self.stream, chain, len(order), self.activity, operation, self.members)

    def _return(
        self,
        operation: str,
        columns: Columns,
        layout: DispatchLayout,
        home: Callable[[Columns, int, HopLayout], Columns],
    ) -> Pending[list[Columns]]:
        """Take rows received back the way they came, up to the sums at the first hop's beginning; ``home(arrived, hop,
        its layout)`` sums what a hop brought back."""
        sizes = [sum(hops[-1].received) for hops in layout.chunks]
        parts = list(zip(*(column.split(sizes) for column in columns), strict=True))

        def start(h: int, c: int, arrived: Columns | None) -> Pending[Columns]:
            hops = layout.chunks[c]
            leaving = parts[c] if arrived is None else home(arrived, h + 1, hops[h + 1])
            return self.hops[h].back(leaving, hops[h], self.traffic, self.stream)

        return self._start(operation, start, range(len(self.hops))[::-1])

    def _count(self, chosen_TX: Tensor) -> RowCounts:
        """From what every rank of the group knows of its own tokens."""
        own = []
        for chosen in self._split(chosen_TX):
            for h in range(len(self.sizes)):
                behind = chosen.unflatten(1, (prod(self.sizes[: h + 1]), -1))
                own.append(behind.any(-1).sum(0))
        own.append(chosen_TX.unflatten(1, (self.ranks, -1)).sum((0, 2)))
        numbers = torch.cat(own)
        table = numbers.new_empty(self.ranks, len(numbers))
        with self.stream.exposed(), self.activity.waiting("dispatch", self.members):
            transfer = all_gather(numbers, table, self.group)
            self.stream.track(transfer)
            transfer.wait()
        *by_hop, pairs = table.split([len(counts) for counts in own], dim=1)
        me, hops = self.me, len(self.sizes)
        wanted = [t for i, of in enumerate(by_hop) for t in self._splits(of, i % hops)]
        found = torch.cat([*wanted, pairs[:, me].sum().view(1)]).tolist()
        splits: list[list[Splits]] = [[] for _ in range(self.chunks)]
        at = 0
        for chunk in splits:
            for size in self.sizes:
                chunk.append((found[at : at + size], found[at + size : at + 2 * size]))
                at += 2 * size
        sources_CG = torch.stack([of[:, me] for of in by_hop[hops - 1 :: hops]])
        return RowCounts(splits, found[at], sources_CG.unflatten(1, self.sizes))

    def _splits(self, rows: Tensor, h: int) -> tuple[Tensor, Tensor]:
        """Rows sent and received in hop ``h``. ``rows``: for each source rank, how many of its tokens have an expert
        behind each choice of the first h + 1 digits. A row of a source stands, before hop h, where the digits from h
        on are the source's and the digits before it are its goal's."""
        by_source = rows.view(*self.sizes, *self.sizes[: h + 1])
        me, any_source, every = self.digits, (slice(None),) * h, (slice(None),)
        sent = by_source[any_source + me[h:] + me[:h]]
        received = by_source[any_source + every + me[h + 1 :] + me[: h + 1]]
        return sent.reshape(-1, self.sizes[h]).sum(0), received.reshape(-1, self.sizes[h]).sum(0)

    def _sorted(
        self,
        rows_MD: Tensor,
        gates_ME: Tensor,
        counts: RowCounts,
        chunks: list[list[HopLayout]],
        indices_TK: Tensor,
        x_TD: Tensor,
    ) -> Dispatched:
        """The rows that arrived, once for each of their experts here, by expert, then by the rank and the token that
        they come from, however they came."""
        chosen_ME = gates_ME != ABSENT
        as_arrived = len(self.hops) == self.chunks == 1
        order_M = None if as_arrived else _by_source(counts.sources_C, counts.rows)
        ordered_ME = chosen_ME if order_M is None else chosen_ME.index_select(0, order_M)
        place_R = true_places(ordered_ME.t(), counts.pairs)
        expert_R, row_R = place_R // max(1, len(rows_MD)), place_R % max(1, len(rows_MD))
        number_ME = numbered(ordered_ME.t()).t()
        if order_M is not None:
            row_R = order_M.index_select(0, row_R)
            number_ME = torch.empty_like(number_ME).index_copy_(0, order_M, number_ME)
        ends_E = chosen_ME.sum(0).cumsum(0).to(torch.int32)
        layout = DispatchLayout(chunks, row_R, expert_R, Bags.of(chosen_ME, number_ME, counts.pairs), indices_TK)
        rows, weights_R = rows_MD.index_select(0, row_R), gates_ME[row_R, expert_R]
        if not self.fp8:
            return Dispatched(rows, weights_R, ends_E, layout)
        quantised = payload.unpack(rows, x_TD.shape[1])
        hung = payload.anchor(quantised, x_TD.dtype)
        return Dispatched(hung, weights_R, ends_E, layout, quantised, payload.Handover())


def _by_source(sources_C: Tensor, rows: int) -> Tensor:
    """Where the rows that arrived stand, rank by rank of those that they come from, then chunk by chunk. They arrived
    chunk by chunk, and every hop put its peers in front: in a chunk, the last digit of the rank stands first."""
    backwards = (0, *range(sources_C.ndim - 1, 0, -1))
    arrived = sources_C.permute(backwards)
    ends = arrived.flatten().cumsum(0).view_as(arrived).permute(backwards)
    counts, starts = (t.flatten(1).t().flatten() for t in (sources_C, ends - sources_C))
    moved = starts - (counts.cumsum(0) - counts)
    return torch.arange(rows, device=counts.device) + moved.repeat_interleave(counts, output_size=rows)


def _joined(parts: Sequence[Columns]) -> Columns:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
