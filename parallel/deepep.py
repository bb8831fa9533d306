"""``dispatch.kind: deepep``: dispatch and combine by DeepSeek's kernels, the package ``deep_ep`` from version 2.

A row crosses once to each node and is passed on inside it, as in the hierarchical exchange; the kernels of both hops
need a few SMs, and the messages in between no host. They run on the communication stream of the rank, like every
exchange. Rows arrive once with the K experts of their token, of which those of other ranks are -1, and are put in order
and summed here as in ``exchange.py``.

None of this has run on a GPU: it is tested over a buffer that keeps to the documented interface on a CPU.

T tokens, D model, K experts a token, G ranks of the expert group, M rows received, E experts held here, R (row, expert)
pairs held here, sorted by expert.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.exchange import Dispatched, Pending
from model.fp8 import SIZE, payload
from model.fp8.formats import E4M3
from model.fp8.quantise import Quantised, Scale, Tile, quantise
from parallel.activity import Activity
from parallel.comm_stream import Chain, CommStream
from parallel.hop import Bags, Traffic, awaited
from parallel.mesh import Layout

Sent = Tensor | tuple[Tensor, Tensor]
"""Rows in BF16, or in FP8 with their scales."""
GATE_BYTES = 8 + 4
"""What goes with a row for each of its token's experts: the number and the gate value."""


class Handle(Protocol):
    """The way of one dispatch, as the package keeps it."""

    num_sms: int
    num_recv_tokens_per_expert_list: list[int]


class Buffer(Protocol):
    """What is used of ``deep_ep.ElasticBuffer``."""

    def dispatch(self, x: Sent, **options: Any) -> tuple[Sent, Tensor, Tensor | None, Handle, Any]:
        """With ``topk_idx``, ``topk_weights`` and ``num_experts``, or with the ``handle`` of a dispatch before -> rows,
        experts, gate values, handle, event."""
        ...

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor, Any]: ...


def check(device: torch.device, compute: str) -> None:
    """Raises ValueError saying what is missing."""
    needs = "dispatch.kind='deepep' needs {}; dispatch.kind=hierarchical goes the same way without"
    if device.type != "cuda":
        raise ValueError(needs.format(f"CUDA with NVLink, and RDMA between nodes, not {device.type}"))
    if compute == "fp32":
        raise ValueError(needs.format("precision.compute=bf16 or fp8"))
    try:
        found = importlib.import_module("deep_ep")
    except ImportError as error:
        raise ValueError(needs.format(f"the package deep_ep, github.com/deepseek-ai/DeepEP ({error})")) from None
    if not hasattr(found, "ElasticBuffer"):
        raise ValueError(needs.format(f"deep_ep from version 2, not {getattr(found, '__version__', 'an older one')}"))


def make_buffer(group: dist.ProcessGroup, model: ModelConfig, tokens: int, fp8: bool, timeout_s: float) -> Buffer:
    """Memory for one dispatch or combine of at most ``tokens`` a rank. Rows arrive in the order of their tokens, so
    that a step has the same bits each time. Collective over ``group``, which is NCCL's."""
    buffer: Buffer = importlib.import_module("deep_ep").ElasticBuffer(
        group,
        num_max_tokens_per_rank=tokens,
        hidden=model.hidden_size,
        num_topk=model.num_experts_per_tok,
        use_fp8_dispatch=fp8,
        deterministic=True,
        num_cpu_timeout_secs=max(1, int(timeout_s)),
        num_gpu_timeout_secs=max(1, int(timeout_s)),
    )
    return buffer


@dataclass(frozen=True)
class DeepEPLayout:
    """``order_R``: which flat (row, slot) each pair is; ``rows_M``: the bags that sum pairs into rows received.
    ``crossings``: rows that this rank's tokens send to other ranks of their nodes, and to other nodes."""

    handle: Handle
    order_R: Tensor
    rows_M: Bags
    experts_a_token: int
    crossings: tuple[Tensor, Tensor]

    @property
    def row_R(self) -> Tensor:
        return self.order_R // self.experts_a_token


class DeepEPExchange:
    """``experts``: of a layer, held by each rank of the expert group in ``layout``. ``fp8`` and what is counted as in
    ``exchange.GroupExchange``; what a kernel says after its timeout is raised as LostPeer."""

    def __init__(
        self,
        buffer: Buffer,
        layout: Layout,
        rank: int,
        experts: int,
        traffic: Traffic,
        stream: CommStream,
        fp8: bool,
        activity: Activity,
        device: torch.device,
    ) -> None:
        self.buffer, self.experts, self.fp8 = buffer, experts, fp8
        self.traffic, self.stream, self.activity = traffic, stream, activity
        self.members = layout.expert_group(rank)
        size = layout.ranks_per_node or layout.world_size
        nodes = sorted({member // size for member in self.members})
        self._nodes, self._node, self._local = len(nodes), nodes.index(rank // size), rank % size
        self._node_G = torch.tensor([nodes.index(member // size) for member in self.members], device=device)
        self._local_G = torch.tensor([member % size for member in self.members], device=device)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        crossings, handles = self._crossings(indices_TK), []
        sent, gates_TK, experts = self._sent(x_TD), weights_TK.contiguous(), len(self.members) * self.experts
        self._count(crossings, self._row_bytes(x_TD, narrow=True) + indices_TK.shape[1] * GATE_BYTES)

        def chain() -> Sequence[Pending[Tensor]]:
            rows, chosen_MK, gates_MK, handle, _ = self.buffer.dispatch(
                sent, topk_idx=indices_TK, topk_weights=gates_TK, num_experts=experts
            )
            assert gates_MK is not None
            handles.append(handle)
            return _arrived(chosen_MK, gates_MK, *(rows if isinstance(rows, tuple) else (rows,)))

        pending = self._start("dispatch", chain)

        def finish() -> Dispatched:
            chosen_MK, gates_MK, *rows = pending.wait()
            return self._sorted(rows, chosen_MK, gates_MK, handles[0], crossings, x_TD)

        return Pending(finish)

    def combine(self, y_RD: Tensor, layout: DeepEPLayout) -> Pending[Tensor]:
        y_MD = layout.rows_M.sum(y_RD)
        self._count(layout.crossings, self._row_bytes(y_RD))
        pending = self._start("combine", lambda: _arrived(self.buffer.combine(y_MD, layout.handle)[0]))
        return Pending(lambda: pending.wait()[0])

    def dispatch_gradient(self, gz_TD: Tensor, layout: DeepEPLayout) -> Pending[Tensor | Quantised]:
        sent, handle = self._sent(gz_TD), layout.handle
        self._count(layout.crossings, self._row_bytes(gz_TD, narrow=True))

        def chain() -> Sequence[Pending[Tensor]]:
            rows, *_ = self.buffer.dispatch(sent, handle=handle, num_sms=handle.num_sms)
            return _arrived(*(rows if isinstance(rows, tuple) else (rows,)))

        pending = self._start("gradient of combine", chain)

        def finish() -> Tensor | Quantised:
            rows = [part.index_select(0, layout.row_R) for part in pending.wait()]
            return self._quantised(rows) if self.fp8 else rows[0]

        return Pending(finish)

    def combine_gradient(
        self, grows_RD: Tensor, gweights_R: Tensor, layout: DeepEPLayout
    ) -> Pending[tuple[Tensor, Tensor]]:
        grows_MD = layout.rows_M.sum(grows_RD)
        gweights_MK = gweights_R.new_zeros(len(grows_MD), layout.experts_a_token)
        gweights_MK.view(-1)[layout.order_R] = gweights_R
        self._count(layout.crossings, self._row_bytes(grows_RD) + 4 * layout.experts_a_token)

        def chain() -> Sequence[Pending[Tensor]]:
            return _arrived(*self.buffer.combine(grows_MD, layout.handle, topk_weights=gweights_MK)[:2])

        pending = self._start("gradient of dispatch", chain)

        def finish() -> tuple[Tensor, Tensor]:
            gx_TD, gweights_TK = pending.wait()
            return gx_TD, gweights_TK

        return Pending(finish)

    def _start(self, operation: str, chain: Chain) -> Pending[list[Tensor]]:
        return awaited(self.stream, chain, 1, self.activity, operation, self.members)

    def _sent(self, x_TD: Tensor) -> Sent:
        if not self.fp8:
            return x_TD.contiguous()
        quantised = quantise(x_TD, Tile.ROW, Scale.POWER_OF_TWO)
        return quantised.stored, quantised.scales

    def _quantised(self, rows: Sequence[Tensor]) -> Quantised:
        stored, scales = rows
        return Quantised(stored, scales.contiguous(), Tile.ROW, E4M3, stored.shape[1])

    def _row_bytes(self, rows: Tensor, narrow: bool = False) -> int:
        width = rows.shape[1]
        return width + 4 * -(-width // SIZE) if narrow and self.fp8 else width * rows.element_size()

    def _count(self, crossings: tuple[Tensor, Tensor], row_bytes: int) -> None:
        """Whoever sends: what returns to a rank is counted by it too, and only sums over ranks are reported. The sums
        stay on the device, which nobody waits for."""
        inside, between = crossings
        self.traffic.inside_bytes += inside * row_bytes
        self.traffic.between_bytes += between * row_bytes

    def _crossings(self, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(token, rank) pairs that are passed on inside a node, and (token, node) pairs of other nodes."""
        ranks_TK = indices_TK // self.experts
        to_TG = ranks_TK.new_zeros(len(ranks_TK), len(self.members)).scatter_(1, ranks_TK, 1)
        to_TN = to_TG.new_zeros(len(to_TG), self._nodes).scatter_(1, self._node_G[ranks_TK], 1)
        inside = (to_TG * (self._local_G != self._local)).sum()
        return inside, to_TN.sum() - to_TN[:, self._node].sum()

    def _sorted(
        self,
        rows: Sequence[Tensor],
        chosen_MK: Tensor,
        gates_MK: Tensor,
        handle: Handle,
        crossings: tuple[Tensor, Tensor],
        x_TD: Tensor,
    ) -> Dispatched:
        """Rows once for each of their experts here, by expert and then as they arrived."""
        pairs, here_MK = sum(handle.num_recv_tokens_per_expert_list), chosen_MK >= 0
        key = torch.where(here_MK, chosen_MK, self.experts).flatten()
        order = torch.argsort(key, stable=True)
        place_MK = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        order_R = order[:pairs]
        rows_M = Bags.of(here_MK, place_MK.view_as(chosen_MK), pairs)
        layout = DeepEPLayout(handle, order_R, rows_M, chosen_MK.shape[1], crossings)
        ends_E = (key[:, None] == torch.arange(self.experts, device=key.device)).sum(0).cumsum(0).to(torch.int32)
        weights_R = gates_MK.flatten().index_select(0, order_R)
        parts = [part.index_select(0, layout.row_R) for part in rows]
        if not self.fp8:
            return Dispatched(parts[0], weights_R, ends_E, layout)
        quantised = self._quantised(parts)
        hung = payload.anchor(quantised, x_TD.dtype)
        return Dispatched(hung, weights_R, ends_E, layout, quantised, payload.Handover())


def _arrived(*tensors: Tensor) -> list[Pending[Tensor]]:
    """What a kernel that is queued will have written."""
    return [_there(tensor) for tensor in tensors]


def _there(tensor: Tensor) -> Pending[Tensor]:
    return Pending(lambda: tensor)
