"""One hop of an exchange: rows to the peers of a group, each to those behind which it has experts, and back.

T rows before a hop, D model, P peers of a hop, X experts behind a hop, N rows sent, B bags, M rows received.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.exchange import Pending
from parallel.activity import Activity
from parallel.comm_stream import Chain, CommStream

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

    def __init__(self, group: dist.ProcessGroup, far: Sequence[bool]) -> None:
        self.group, self.far = group, far
        self._me = dist.get_rank(group)

    def layout(self, gates_TPX: Tensor, sent: list[int], received: list[int]) -> HopLayout:
        goes_TP = (gates_TPX != ABSENT).any(-1)
        places = true_places(goes_TP.t(), sum(sent))
        rows = max(1, len(goes_TP))
        rows_T = Bags.of(goes_TP, numbered(goes_TP.t()).t(), sum(sent))
        return HopLayout(sent, received, places % rows, places // rows, rows_T)

    def forth(self, rows: Tensor, layout: HopLayout, traffic: Traffic, stream: CommStream) -> Pending[Tensor]:
        return self._start(rows, layout.sent, layout.received, traffic, stream)

    def back(self, rows: Tensor, layout: HopLayout, traffic: Traffic, stream: CommStream) -> Pending[Tensor]:
        return self._start(rows, layout.received, layout.sent, traffic, stream)

    def _start(
        self, rows: Tensor, sent: list[int], received: list[int], traffic: Traffic, stream: CommStream
    ) -> Pending[Tensor]:
        row_bytes = rows.element_size() * rows[:1].numel()
        for peer, (count, far) in enumerate(zip(sent, self.far, strict=True)):
            if far:
                traffic.between_bytes += count * row_bytes
            elif peer != self._me:
                traffic.inside_bytes += count * row_bytes
        rows, arrived = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arrived, rows, received, sent, group=self.group, async_op=True)
        stream.track(work)

        def finish() -> Tensor:
            work.wait()
            return arrived

        return Pending(finish)


def awaited(
    stream: CommStream, chain: Chain, hops: int, activity: Activity, operation: str, members: Sequence[int]
) -> Pending[list[Tensor]]:
    """The chain of an exchange, started; this rank is known to wait for ``members`` in ``operation`` whenever it does.
    Raises LostPeer, now or in ``wait``."""
    with activity.waiting(operation, members):
        pending = stream.start(chain, hops)

    def finish() -> list[Tensor]:
        with activity.waiting(operation, members):
            return pending.wait()

    return Pending(finish)


def pack(rows: Tensor, gates: Tensor) -> Tensor:
    """Rows and gate values as the bytes of one message: a message costs more than its bytes."""
    return torch.cat([rows.contiguous().view(torch.uint8), gates.contiguous().view(torch.uint8)], dim=1)


def unpack(packed: Tensor, rows_like: Tensor, gates_like: Tensor) -> tuple[Tensor, Tensor]:
    width = rows_like.shape[1] * rows_like.element_size()
    rows, gates = packed.tensor_split([width], dim=1)
    # A copy even of a single row, which is contiguous where it stands: the view needs aligned memory.
    gates = gates.clone(memory_format=torch.contiguous_format)
    return rows.contiguous().view(rows_like.dtype), gates.view(gates_like.dtype)


def true_places(mask: Tensor, count: int) -> Tensor:
    """The flat indices of the ``count`` true entries, in order. A given count keeps a GPU from being waited for."""
    return torch.nonzero_static(mask.flatten(), size=count).view(-1)


def numbered(mask: Tensor) -> Tensor:
    """For each true entry its number among them, in flat order; meaningless elsewhere."""
    return (mask.flatten().cumsum(0) - 1).view(mask.shape)
