"""Expert-parallel dispatch and combine over a process group: one all-to-all over the expert group each.

Every rank sorts its (token, expert) pairs by expert, which sorts them by destination too, tells each peer how many
rows to expect per expert (the one host synchronisation), and sends. What arrives is sorted by (source, expert) and is
put into order of expert. Combine is the same way back; the gradients follow the layout of the forward. A rank or an
expert without a token takes part like any other.

T tokens, D model, K experts a token, N = T·K pairs, G ranks of the group, E experts held here, R rows received.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import Dispatched, Pending, Sorted, count_experts, sort_by_expert


@dataclass(frozen=True)
class FlatLayout:
    """The way of one dispatch. ``sent``/``received``: rows to and from each rank. ``by_expert_R``: for each row in
    order of expert, its place as received; ``as_received_R`` is the inverse; both None when nothing moves."""

    pairs: Sorted
    sent: list[int]
    received: list[int]
    by_expert_R: Tensor | None
    as_received_R: Tensor | None


class FlatExchange:
    """``dispatch.kind: flat``. Every rank holds ``experts`` of the layer's experts, in the order of the group."""

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self.group, self.experts = group, experts
        self.ranks = dist.get_world_size(group)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        pairs = sort_by_expert(indices_TK)
        counts_GE = count_experts(indices_TK, self.ranks * self.experts).view(self.ranks, -1)
        received_GE = torch.empty_like(counts_GE)
        dist.all_to_all_single(received_GE, counts_GE, group=self.group)
        sent, received = torch.stack([counts_GE.sum(1), received_GE.sum(1)]).tolist()
        layout = FlatLayout(pairs, sent, received, *self._order(received_GE))

        rows = self._start(pairs.spread(x_TD), sent, received)
        weights = self._start(weights_TK.flatten().index_select(0, pairs.order_N), sent, received)
        ends_E = received_GE.sum(0).cumsum(0).to(torch.int32)

        def finish() -> Dispatched:
            return Dispatched(
                _take(rows.wait(), layout.by_expert_R), _take(weights.wait(), layout.by_expert_R), ends_E, layout
            )

        return Pending(finish)

    def combine(self, y_RD: Tensor, layout: FlatLayout) -> Pending[Tensor]:
        rows = self._start(_take(y_RD, layout.as_received_R), layout.received, layout.sent)
        return Pending(lambda: layout.pairs.gather(rows.wait()))

    def dispatch_gradient(self, gz_TD: Tensor, layout: FlatLayout) -> Pending[Tensor]:
        rows = self._start(layout.pairs.spread(gz_TD), layout.sent, layout.received)
        return Pending(lambda: _take(rows.wait(), layout.by_expert_R))

    def combine_gradient(
        self, grows_RD: Tensor, gweights_R: Tensor, layout: FlatLayout
    ) -> Pending[tuple[Tensor, Tensor]]:
        rows = self._start(_take(grows_RD, layout.as_received_R), layout.received, layout.sent)
        weights = self._start(_take(gweights_R, layout.as_received_R), layout.received, layout.sent)
        pairs = layout.pairs

        def finish() -> tuple[Tensor, Tensor]:
            gweights_TK = weights.wait().index_select(0, pairs.place_N).unflatten(0, (-1, pairs.experts_a_token))
            return pairs.gather(rows.wait()), gweights_TK

        return Pending(finish)

    def _order(self, received_GE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.experts == 1:
            return None, None
        experts_R = torch.arange(self.experts, device=received_GE.device).repeat(self.ranks)
        experts_R = experts_R.repeat_interleave(received_GE.flatten())
        by_expert_R = torch.argsort(experts_R, stable=True)
        as_received_R = torch.empty_like(by_expert_R)
        as_received_R[by_expert_R] = torch.arange(by_expert_R.numel(), device=by_expert_R.device)
        return by_expert_R, as_received_R

    def _start(self, rows: Tensor, sent: list[int], received: list[int]) -> Pending[Tensor]:
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arrived, rows, received, sent, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return arrived

        return Pending(finish)


def _take(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.index_select(0, order)
