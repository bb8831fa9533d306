"""Expert-parallel dispatch and combine over process groups, in one hop (flat) or two (hierarchical).

A token's row crosses once to each rank that owns some of its experts (flat), or once to each *node*, to the rank there
with the sender's own local index, which passes it on to the owners inside the node (hierarchical). With every row go
the gate values of the experts behind the hop, from which the next hop and the owner work out where it belongs. Combine
takes the same way back and sums before each hop, so that one row returns for each that came. The gradients follow the
layout of the forward: the gradient of combine is dispatched, the gradient of dispatch is combined.

One all-gather carries the row counts of all hops, and reading them is the one host synchronisation of a dispatch. A
rank or an expert without a token takes part like any other. Sums have a fixed order.

T rows before a hop, D model, K experts a token, G ranks of the expert group, P peers of a hop, X experts behind a hop,
N rows sent, M rows received, E experts held here, R (row, expert) pairs held here, sorted by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.exchange import Dispatched, Pending
from model.fp8 import payload
from model.fp8.quantise import dequantise

ABSENT = -torch.inf
"""The gate value of an expert that was not chosen."""


@dataclass(frozen=True)
class Bags:
    """Sums of chosen rows: bag b has the rows ``places[offsets[b] : offsets[b + 1]]``, summed in that order."""

    places: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, member_BX: Tensor, place_BX: Tensor, members: int) -> "Bags":
        """Bag b holds ``place_BX[b, x]`` for every x with ``member_BX[b, x]``, of which there are ``members``."""
        sizes_B = member_BX.sum(1)
        places = place_BX.flatten().index_select(0, _places(member_BX, members))
        return cls(places, sizes_B.cumsum(0) - sizes_B)

    def sum(self, rows: Tensor) -> Tensor:
        """[rows, D] -> [bags, D]; an empty bag is zero."""
        if not rows.numel():
            return rows.new_zeros(len(self.offsets), *rows.shape[1:])
        return F.embedding_bag(self.places, rows, self.offsets, mode="sum")


@dataclass(frozen=True)
class HopLayout:
    """The way of one hop. ``sent``/``received``: rows to and from each peer. ``row_N``, ``peer_N``: which row went to
    which peer, by peer, then row. ``rows_T``: the bags that sum what comes back."""

    sent: list[int]
    received: list[int]
    row_N: Tensor
    peer_N: Tensor
    rows_T: Bags


@dataclass(frozen=True)
class DispatchLayout:
    """The way of one dispatch: its hops, and what its last rank does. ``row_R``, ``expert_R``: row received and expert
    of each pair; ``pairs_M``: the bags that sum pairs into rows received. ``gate_TK``: each token's experts."""

    hops: list[HopLayout]
    row_R: Tensor
    expert_R: Tensor
    pairs_M: Bags
    gate_TK: Tensor


@dataclass
class Traffic:
    """What exchanges sent, to ranks of the own node and to those of other nodes, and for how long their rank waited for
    what was to arrive: communication that no computation hid. On CUDA the host does not wait, and that stays zero."""

    inside_bytes: int = 0
    between_bytes: int = 0
    waited_s: float = 0.0

    def clear(self) -> None:
        self.inside_bytes = self.between_bytes = 0
        self.waited_s = 0.0


class Hop:
    """An all-to-all of rows over ``group``, whose ranks are this hop's peers in order; None for a hop to oneself.
    ``far``: for each peer, whether it is on another node."""

    def __init__(self, group: dist.ProcessGroup | None, far: Sequence[bool]) -> None:
        self.group, self.far = group, far
        self._me = 0 if group is None else dist.get_rank(group)

    def layout(self, gates_TPX: Tensor, sent: list[int], received: list[int]) -> HopLayout:
        goes_TP = (gates_TPX != ABSENT).any(-1)
        places = _places(goes_TP.t(), sum(sent))
        rows = max(1, len(goes_TP))
        rows_T = Bags.of(goes_TP, _numbered(goes_TP.t()).t(), sum(sent))
        return HopLayout(sent, received, places % rows, places // rows, rows_T)

    def forth(self, rows: Tensor, layout: HopLayout, traffic: Traffic) -> Pending[Tensor]:
        return self._start(rows, layout.sent, layout.received, traffic)

    def back(self, rows: Tensor, layout: HopLayout, traffic: Traffic) -> Pending[Tensor]:
        return self._start(rows, layout.received, layout.sent, traffic)

    def _start(self, rows: Tensor, sent: list[int], received: list[int], traffic: Traffic) -> Pending[Tensor]:
        if self.group is None:
            return Pending(lambda: rows)
        row_bytes = rows.element_size() * rows[:1].numel()
        for peer, (count, far) in enumerate(zip(sent, self.far, strict=True)):
            if far:
                traffic.between_bytes += count * row_bytes
            elif peer != self._me:
                traffic.inside_bytes += count * row_bytes
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.group, async_op=True)

        def finish() -> Tensor:
            start = perf_counter()
            work.wait()
            traffic.waited_s += perf_counter() - start
            return arrived

        return Pending(finish)


class GroupExchange:
    """``dispatch.kind: flat`` or ``hierarchical``, by its hops.

    ``group``: the expert group; every rank of it holds ``experts`` of the layer's experts, in its order. The rank of
    the expert group is the number whose digits are the ranks in the ``hops``, the first hop's digit standing first.
    Flat is one hop over the group itself; hierarchical is two, over the ranks of this local index, one on each node,
    and over the ranks of this node. The first hop is under way when ``dispatch`` returns; a second one starts when it
    is waited for. ``traffic`` counts what is sent.

    ``fp8``: what is dispatched, forward and as a gradient, travels in FP8 with a scale of 1x128 numbers, and goes to
    the experts as it came. What is combined is a sum, and stays in the dtype of its rows (report, 3.3.3).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        experts: int,
        hops: Sequence[Hop],
        traffic: Traffic | None = None,
        fp8: bool = False,
    ) -> None:
        self.group, self.experts, self.hops, self.fp8 = group, experts, hops, fp8
        self.traffic = Traffic() if traffic is None else traffic
        self.ranks = dist.get_world_size(group)
        self.sizes = [len(hop.far) for hop in hops]
        assert prod(self.sizes) == self.ranks, (self.sizes, self.ranks)
        me = dist.get_rank(group)
        self.digits = tuple(me // prod(self.sizes[h + 1 :]) % size for h, size in enumerate(self.sizes))

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        gates_TX = weights_TK.new_full((len(weights_TK), self.ranks * self.experts), ABSENT)
        gates_TX.scatter_(1, indices_TK, weights_TK)
        splits, pairs = self._count(gates_TX != ABSENT)
        way: list[HopLayout] = []
        sent = payload.pack(x_TD) if self.fp8 else x_TD
        pending = self._go(0, sent, gates_TX, splits, way)

        def finish() -> Dispatched:
            rows_MD, gates_MX = _unpack(pending.wait(), sent, weights_TK)
            for h in range(1, len(self.hops)):
                arrived = self._go(h, rows_MD, gates_MX, splits, way).wait()
                rows_MD, gates_MX = _unpack(arrived, sent, weights_TK)
            return self._sorted(rows_MD, gates_MX, pairs, way, indices_TK, x_TD)

        return Pending(finish)

    def combine(self, y_RD: Tensor, layout: DispatchLayout) -> Pending[Tensor]:
        return self._return(layout.pairs_M.sum(y_RD), layout)

    def dispatch_gradient(self, gz_TD: Tensor, layout: DispatchLayout) -> Pending[Tensor]:
        sent = payload.pack(gz_TD) if self.fp8 else gz_TD
        pending = self.hops[0].forth(sent.index_select(0, layout.hops[0].row_N), layout.hops[0], self.traffic)

        def finish() -> Tensor:
            rows = pending.wait()
            for hop, way in zip(self.hops[1:], layout.hops[1:], strict=True):
                rows = hop.forth(rows.index_select(0, way.row_N), way, self.traffic).wait()
            rows = rows.index_select(0, layout.row_R)
            return dequantise(payload.unpack(rows, gz_TD.shape[1])).to(gz_TD.dtype) if self.fp8 else rows

        return Pending(finish)

    def combine_gradient(
        self, grows_RD: Tensor, gweights_R: Tensor, layout: DispatchLayout
    ) -> Pending[tuple[Tensor, Tensor]]:
        grows_MD = layout.pairs_M.sum(grows_RD)
        gweights_MX = gweights_R.new_zeros(len(grows_MD), self.experts)
        gweights_MX.view(-1)[layout.row_R * self.experts + layout.expert_R] = gweights_R
        pending = self.hops[-1].back(_pack(grows_MD, gweights_MX), layout.hops[-1], self.traffic)

        def finish() -> tuple[Tensor, Tensor]:
            arrived = pending.wait()
            for h in reversed(range(len(self.hops))):
                rows_ND, gates_NX = _unpack(arrived, grows_RD, gweights_R)
                rows_TD, gates_TX = self._come_home(rows_ND, gates_NX, layout.hops[h], self.sizes[h])
                if h > 0:
                    packed = _pack(rows_TD, gates_TX)
                    arrived = self.hops[h - 1].back(packed, layout.hops[h - 1], self.traffic).wait()
            return rows_TD, gates_TX.gather(1, layout.gate_TK)

        return Pending(finish)

    def _count(self, chosen_TX: Tensor) -> tuple[list[tuple[list[int], list[int]]], int]:
        """(rows sent to, rows received from) each peer, hop by hop, and the pairs that end here: from what every rank
        of the group knows of its own tokens."""
        counts = []
        for h in range(len(self.sizes)):
            behind = chosen_TX.unflatten(1, (prod(self.sizes[: h + 1]), -1))
            counts.append(behind.any(-1).sum(0))
        counts.append(chosen_TX.unflatten(1, (self.ranks, -1)).sum((0, 2)))
        own = torch.cat(counts)
        table = own.new_empty(self.ranks, len(own))
        dist.all_gather(list(table.unbind()), own, group=self.group)
        *hops, pairs = table.split([len(c) for c in counts], dim=1)
        wanted = [t for h, of in enumerate(hops) for t in self._splits(of, h)]
        wanted.append(pairs[:, dist.get_rank(self.group)].sum().view(1))
        numbers = torch.cat(wanted).tolist()
        splits = []
        for size in self.sizes:
            splits.append((numbers[:size], numbers[size : 2 * size]))
            numbers = numbers[2 * size :]
        return splits, numbers[0]

    def _splits(self, rows: Tensor, h: int) -> tuple[Tensor, Tensor]:
        """Rows sent and received in hop ``h``. ``rows``: for each source rank, how many of its tokens have an expert
        behind each choice of the first h + 1 digits. A row of a source stands, before hop h, where the digits from h
        on are the source's and the digits before it are its goal's."""
        by_source = rows.view(*self.sizes, *self.sizes[: h + 1])
        me, any_source, every = self.digits, (slice(None),) * h, (slice(None),)
        sent = by_source[any_source + me[h:] + me[:h]]
        received = by_source[any_source + every + me[h + 1 :] + me[: h + 1]]
        return sent.reshape(-1, self.sizes[h]).sum(0), received.reshape(-1, self.sizes[h]).sum(0)

    def _go(
        self,
        h: int,
        rows_TD: Tensor,
        gates_TX: Tensor,
        splits: list[tuple[list[int], list[int]]],
        way: list[HopLayout],
    ) -> Pending[Tensor]:
        """Start hop ``h`` of rows and, with each row, the gate values of the experts behind its peer."""
        gates_TPX = gates_TX.unflatten(1, (self.sizes[h], -1))
        layout = self.hops[h].layout(gates_TPX, *splits[h])
        way.append(layout)
        packed = _pack(rows_TD.index_select(0, layout.row_N), gates_TPX[layout.row_N, layout.peer_N])
        return self.hops[h].forth(packed, layout, self.traffic)

    def _sorted(
        self, rows_MD: Tensor, gates_ME: Tensor, pairs: int, way: list[HopLayout], indices_TK: Tensor, x_TD: Tensor
    ) -> Dispatched:
        """The rows that arrived, once for each of their experts here, by expert, then in the order of arrival."""
        chosen_ME = gates_ME != ABSENT
        place_R = _places(chosen_ME.t(), pairs)
        expert_R, row_R = place_R // max(1, len(rows_MD)), place_R % max(1, len(rows_MD))
        pairs_M = Bags.of(chosen_ME, _numbered(chosen_ME.t()).t(), pairs)
        ends_E = chosen_ME.sum(0).cumsum(0).to(torch.int32)
        layout = DispatchLayout(way, row_R, expert_R, pairs_M, indices_TK)
        rows, weights_R = rows_MD.index_select(0, row_R), gates_ME[row_R, expert_R]
        if not self.fp8:
            return Dispatched(rows, weights_R, ends_E, layout)
        quantised = payload.unpack(rows, x_TD.shape[1])
        return Dispatched(payload.anchor(quantised, x_TD.dtype), weights_R, ends_E, layout, quantised)

    def _return(self, rows: Tensor, layout: DispatchLayout) -> Pending[Tensor]:
        pending = self.hops[-1].back(rows, layout.hops[-1], self.traffic)

        def finish() -> Tensor:
            rows = layout.hops[-1].rows_T.sum(pending.wait())
            for hop, way in zip(self.hops[-2::-1], layout.hops[-2::-1], strict=True):
                rows = way.rows_T.sum(hop.back(rows, way, self.traffic).wait())
            return rows

        return Pending(finish)

    def _come_home(self, rows_ND: Tensor, gates_NX: Tensor, way: HopLayout, peers: int) -> tuple[Tensor, Tensor]:
        """Sum the rows that came back from a hop, and put their gate values' gradients side by side, peer by peer."""
        rows_TD = way.rows_T.sum(rows_ND)
        gates_TPX = gates_NX.new_zeros(len(rows_TD), peers, gates_NX.shape[1])
        gates_TPX[way.row_N, way.peer_N] = gates_NX
        return rows_TD, gates_TPX.flatten(1)


def _pack(rows: Tensor, gates: Tensor) -> Tensor:
    """Rows and gate values as the bytes of one message: a message costs more than its bytes."""
    return torch.cat([rows.contiguous().view(torch.uint8), gates.contiguous().view(torch.uint8)], dim=1)


def _unpack(packed: Tensor, rows_like: Tensor, gates_like: Tensor) -> tuple[Tensor, Tensor]:
    width = rows_like.shape[1] * rows_like.element_size()
    rows, gates = packed.tensor_split([width], dim=1)
    # A copy even of a single row, which is contiguous where it stands: the view needs aligned memory.
    gates = gates.clone(memory_format=torch.contiguous_format)
    return rows.contiguous().view(rows_like.dtype), gates.view(gates_like.dtype)


def _places(mask: Tensor, count: int) -> Tensor:
    """The flat indices of the ``count`` true entries, in order. A given count keeps a GPU from being waited for."""
    return torch.nonzero_static(mask.flatten(), size=count).view(-1)


def _numbered(mask: Tensor) -> Tensor:
    """For each true entry its number among them, in flat order; meaningless elsewhere."""
    return (mask.flatten().cumsum(0) - 1).view(mask.shape)
