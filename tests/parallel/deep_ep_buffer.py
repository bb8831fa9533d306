"""``deep_ep.ElasticBuffer`` by its documentation, as far as it is used: on a CPU, all ranks see everything."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Handle:
    """``sources``: (rank, token) of each row received."""

    sources: list[tuple[int, int]]
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    num_sms: int = 4


class DocumentedBuffer:
    def __init__(self, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        self.group, self.options = group, options

    def everyones(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_sms: int = 0,
        handle: Handle | None = None,
    ) -> tuple[Any, Tensor | None, Tensor | None, Handle, None]:
        """Each row once to every rank that has one of its experts; experts of other ranks become -1, and the gate
        values are all there."""
        assert (handle is None) == (topk_idx is not None) == (num_experts is not None)
        parts = [
            t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (x if type(x) is tuple else (x,))
        ]
        sent = self.everyones((parts, topk_idx, topk_weights))
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        chosen = gates = None
        if handle is None:
            assert num_experts is not None and topk_idx is not None
            each = num_experts // world
            sources = [
                (source, token)
                for source, (_, indices, _) in enumerate(sent)
                for token in range(len(indices))
                if (indices[token] // each == rank).any()
            ]
            wanted = [(sent[source][1][token], sent[source][2][token]) for source, token in sources]
            chosen = torch.stack([i for i, _ in wanted]) if wanted else topk_idx.new_zeros(0, topk_idx.shape[1])
            gates = torch.stack([w for _, w in wanted]) if wanted else torch.zeros(0, topk_idx.shape[1])
            chosen = torch.where(chosen // each == rank, chosen % each, -1)
            handle = Handle(sources, topk_idx, [int((chosen == e).sum()) for e in range(each)])
        rows = [
            torch.stack([sent[source][0][number][token] for source, token in handle.sources])
            if handle.sources
            else part[:0]
            for number, part in enumerate(parts)
        ]
        if isinstance(x, tuple):
            return (rows[0].view(x[0].dtype), rows[1]), chosen, gates, handle, None
        return rows[0], chosen, gates, handle, None

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """For each token the sum of the rows that came of it, by rank, and of their gate values."""
        assert len(x) == len(handle.sources)
        back = self.everyones((handle.sources, x, topk_weights))
        mine = x.new_zeros(len(handle.topk_idx), x.shape[1])
        weights = None if topk_weights is None else torch.zeros(handle.topk_idx.shape)
        for sources, rows, of_rows in back:
            for number, (source, token) in enumerate(sources):
                if source == dist.get_rank(self.group):
                    mine[token] += rows[number]
                    if weights is not None:
                        weights[token] += of_rows[number]
        return mine, weights, None
