"""One hop of an exchange: rows to the peers of a group, each to those behind which it has experts, and back.

T rows before a hop, D model, P peers of a hop, X experts behind a hop, N rows sent, B bags, M rows received.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from model.exchange import Pending
from parallel.activity import Activity
from parallel.collectives import Columns, Group, all_to_all, position_in
from parallel.comm_stream import Brought, Chain, CommStream
from parallel.lanes import Rows

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
        places = place_BX.flatten().index_select(0, true_places(member_BX, members))
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


@dataclass
class Traffic:
    """Bytes that exchanges sent to ranks of the own node and to those of other nodes; tensors where only the device
    knows."""

    inside_bytes: int | Tensor = 0
    between_bytes: int | Tensor = 0

    def clear(self) -> None:
        self.inside_bytes = self.between_bytes = 0


class Hop:
    """An all-to-all of rows over ``group``, whose ranks are this hop's peers in order. ``far``: for each peer, whether
    it is on another node."""

    def __init__(self, group: Group, far: Sequence[bool]) -> None:
        self.group, self.far = group, far
        self._me = position_in(group)

    def layout(self, gates_TPX: Tensor, sent: list[int], received: list[int]) -> HopLayout:
        goes_TP = (gates_TPX != ABSENT).any(-1)
        places = true_places(goes_TP.t(), sum(sent))
        rows = max(1, len(goes_TP))
        rows_T = Bags.of(goes_TP, numbered(goes_TP.t()).t(), sum(sent))
        return HopLayout(sent, received, places % rows, places // rows, rows_T)

    def forth(
        self, rows_TD: Tensor, gates_TPX: Tensor | None, layout: HopLayout, traffic: Traffic, stream: CommStream
    ) -> Pending[Columns]:
        """Every row to its peers, each time with the gate values of the experts behind that peer, if any are given."""
        columns = [Rows(rows_TD, layout.row_N)]
        if gates_TPX is not None:
            columns.append(Rows(gates_TPX[layout.row_N, layout.peer_N]))
        return self._start(columns, layout.sent, layout.received, traffic, stream)

    def back(self, columns: Columns, layout: HopLayout, traffic: Traffic, stream: CommStream) -> Pending[Columns]:
        return self._start([Rows(column) for column in columns], layout.received, layout.sent, traffic, stream)

    def _start(
        self, columns: Sequence[Rows], sent: list[int], received: list[int], traffic: Traffic, stream: CommStream
    ) -> Pending[Columns]:
        row_bytes = sum(rows.tensor.element_size() * prod(rows.shape[1:]) for rows in columns)
        for peer, (count, far) in enumerate(zip(sent, self.far, strict=True)):
            if far:
                traffic.between_bytes += count * row_bytes
            elif peer != self._me:
                traffic.inside_bytes += count * row_bytes
        transfer = all_to_all(columns, sent, received, self.group)
        stream.track(transfer)
        return Pending(transfer.wait)


def awaited(
    stream: CommStream, chain: Chain[Brought], hops: int, activity: Activity, operation: str, members: Sequence[int]
) -> Pending[list[Brought]]:
    """The chain of an exchange, started; this rank is known to wait for ``members`` in ``operation`` whenever it does.
    Raises LostPeer, now or in ``wait``."""
    with activity.waiting(operation, members):
        pending = stream.start(chain, hops)

    def finish() -> list[Brought]:
        with activity.waiting(operation, members):
            return pending.wait()

    return Pending(finish)


def true_places(mask: Tensor, count: int) -> Tensor:
    """The flat indices of the ``count`` true entries, in order. A given count keeps a GPU from being waited for."""
    return torch.nonzero_static(mask.flatten(), size=count).view(-1)


def numbered(mask: Tensor) -> Tensor:
    """For each true entry its number among them, in flat order; meaningless elsewhere."""
    return (mask.flatten().cumsum(0) - 1).view(mask.shape)
