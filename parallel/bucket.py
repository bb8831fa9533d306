"""The parameters of one stage that share a replica group, as flat buffers, and their sums and gathers.

Every rank of the group holds the whole bucket in the compute dtype and its gradients in FP32, and owns one contiguous
shard of it: the FP32 masters and moments (ZeRO-1). A step of the bucket is: sum the gradients over the group, update
the own shard, gather the shards. Copies of a parameter, data-parallel or twin, are therefore the same bits afterwards:
they are one rank's result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.collectives import Group, Transfer, all_gather, members_of, position_in, reduce_scatter, size_of, zeros

ALIGNMENT = 64


@dataclass(frozen=True)
class Segment:
    """One parameter's place: elements ``start`` .. ``start + numel`` of the bucket are elements ``offset`` ..
    ``offset + numel`` of the parameter ``name``, which has ``total`` elements in the whole model."""

    name: str
    start: int
    numel: int
    offset: int
    total: int
    decayed: bool


class Bucket:
    """``named``: (name, parameter, first element of the whole parameter, elements of the whole parameter), in FP32;
    their data moves into the flat buffer. ``group``: the ranks that hold the bucket, or None when this is the only one.
    ``written``: called after each write to the parameters, for whoever keeps what is derived from them.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter, int, int]],
        group: Group | None,
        dtype: torch.dtype,
    ) -> None:
        # Matrices first: weight decay then applies to one range of every shard.
        named = sorted(named, key=lambda item: item[1].ndim < 2)
        self.group = group
        self.replicas = 1 if group is None else size_of(group)
        position = 0 if group is None else position_in(group)
        self.segments: list[Segment] = []
        used = 0
        for name, parameter, offset, total in named:
            self.segments.append(Segment(name, used, parameter.numel(), offset, total, parameter.ndim >= 2))
            used += parameter.numel()
        unit = self.replicas * ALIGNMENT
        size = -(-used // unit) * unit
        device = named[0][1].device
        self.start, self.stop = position * size // self.replicas, (position + 1) * size // self.replicas
        self.decay_stop = sum(s.numel for s in self.segments if s.decayed)
        # Others have read both when they come to the sums of the step, which is before anyone writes to them again.
        self.parameters = zeros(size, dtype, device, group)
        self.gradients = zeros(size, torch.float32, device, group)
        whole = torch.zeros(size, device=device)
        self.buffers: dict[nn.Parameter, Tensor] = {}
        for segment, (_, parameter, _, _) in zip(self.segments, named, strict=True):
            place = slice(segment.start, segment.start + segment.numel)
            whole[place] = parameter.detach().flatten()
            parameter.data = self.parameters[place].view(parameter.shape)
            self.buffers[parameter] = self.gradients[place].view(parameter.shape)
        self.parameters.copy_(whole)
        self.master = whole[self.start : self.stop].clone()
        self.written: list[Callable[[], None]] = []
        self._reducing: Transfer[None] | None = None
        self._gathering: Transfer[None] | None = None

    @property
    def shard(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def gradient(self) -> Tensor:
        """The own shard's gradient, summed once ``reduced`` has returned. FP32, a view."""
        return self.gradients[self.shard]

    def reduce(self) -> None:
        """Start summing the gradients over the group."""
        if self.group is not None:
            self._reducing = reduce_scatter(self.gradients, self.group)

    def reduced(self) -> None:
        """Wait for ``reduce``."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None

    def publish(self) -> None:
        """Round the masters into the own part of the parameters."""
        self.parameters[self.shard].copy_(self.master)
        self.changed()

    def gather(self) -> None:
        """Start making the bucket whole on every rank of the group."""
        if self.group is not None:
            self._gathering = all_gather(self.parameters[self.shard], self.parameters, self.group)

    def gathered(self) -> None:
        """Wait for ``gather``: nothing may use the parameters before."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            self.changed()

    def changed(self) -> None:
        """Tell ``written``: for who writes the parameters otherwise."""
        for forget in self.written:
            forget()

    @property
    def peers(self) -> list[int]:
        """The ranks of the group."""
        return [] if self.group is None else members_of(self.group)

    def owned_segments(self) -> list[Segment]:
        """The parts of parameters that lie in the own shard, ``start`` counted from the shard's beginning."""
        owned = []
        for s in self.segments:
            first, last = max(s.start, self.start), min(s.start + s.numel, self.stop)
            if first < last:
                moved = first - s.start
                owned.append(Segment(s.name, first - self.start, last - first, s.offset + moved, s.total, s.decayed))
        return owned
