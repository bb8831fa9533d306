"""Collectives of a group, whatever carries them: torch.distributed, or memory that its ranks share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.lanes import Rows, SharedGroup

Group = dist.ProcessGroup | SharedGroup
Columns = tuple[Tensor, ...]
"""Tensors with a row for each that travels."""
Result = TypeVar("Result")

# torch 2.13 renamed both and warns of the old names; 2.10 to 2.12 have only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Transfer(Generic[Result]):
    """A collective under way. ``wait`` blocks until it is done, once; ``when_done`` has a function called with the time
    of that, by ``perf_counter``."""

    wait: Callable[[], Result]
    when_done: Callable[[Callable[[float], None]], None]


def members_of(group: Group) -> list[int]:
    """The ranks of the world, in the group's order."""
    return group.members if isinstance(group, SharedGroup) else dist.get_process_group_ranks(group)


def size_of(group: Group) -> int:
    return len(group.members) if isinstance(group, SharedGroup) else dist.get_world_size(group)


def position_in(group: Group) -> int:
    """Of this rank."""
    return group.position if isinstance(group, SharedGroup) else dist.get_rank(group)


def zeros(count: int, dtype: torch.dtype, device: torch.device, group: Group | None) -> Tensor:
    """What ``reduce_scatter`` sums, or ``all_gather`` fills, over ``group``: memory that its ranks share, if they share
    any. A rank then reads another's parts where they are, so that nobody may write to them until all have read them."""
    if isinstance(group, SharedGroup):
        return group.memory.zeros(count, dtype)
    return torch.zeros(count, dtype=dtype, device=device)


def all_to_all(columns: Sequence[Rows], sent: list[int], received: list[int], group: Group) -> Transfer[Columns]:
    """Rows to each member, one member's after the other's, and so many from each. They travel together: a message costs
    more than its bytes."""
    if isinstance(group, SharedGroup):
        return _shared_all_to_all(columns, sent, received, group)
    whole = [c.tensor if c.chosen is None else c.tensor.index_select(0, c.chosen) for c in columns]
    packed = whole[0].contiguous() if len(whole) == 1 else _pack(whole)
    arrived = packed.new_empty(sum(received), *packed.shape[1:])
    work = dist.all_to_all_single(arrived, packed, received, sent, group=group, async_op=True)
    return _transfer(work, lambda: (arrived,) if len(whole) == 1 else _unpack(arrived, whole))


def _shared_all_to_all(
    columns: Sequence[Rows], sent: list[int], received: list[int], group: SharedGroup
) -> Transfer[Columns]:
    leaving = list(zip(*(_split(rows, sent) for rows in columns), strict=True))
    arrived = tuple(rows.tensor.new_empty(sum(received), *rows.shape[1:]) for rows in columns)
    coming = list(zip(*(column.split(received) for column in arrived), strict=True))
    group.send(leaving)
    finish = group.receive(coming)
    with torch.no_grad():
        for rows, into in zip(leaving[group.position], coming[group.position], strict=True):
            rows.write(into)
    return _shared_transfer(finish, arrived)


def _split(rows: Rows, sizes: list[int]) -> list[Rows]:
    if rows.chosen is None:
        return [Rows(part) for part in rows.tensor.split(sizes)]
    return [Rows(rows.tensor, part) for part in rows.chosen.split(sizes)]


def all_gather(own: Tensor, whole: Tensor, group: Group) -> Transfer[None]:
    """``whole``, contiguous, gets every member's ``own``, one after the other; ``own`` may be its place there."""
    if not isinstance(group, SharedGroup):
        return _transfer(_all_gather(whole.view(-1), own.reshape(-1).clone(), group=group, async_op=True), lambda: None)
    parts = [part.view_as(own) for part in whole.view(-1).chunk(len(group.members))]
    group.send([[Rows(own)]] * len(parts))
    finish = group.receive([[part] for part in parts])
    parts[group.position].copy_(own)
    return _shared_transfer(finish, None)


def reduce_scatter(whole: Tensor, group: Group) -> Transfer[None]:
    """The own part of ``whole`` gets the sum of all members'. What becomes of the other parts is left open.

    On processors others' parts are added in the order of the members, whatever brought them: ranks of one host and the
    same ranks on several get the same bits. NCCL has orders of its own.
    """
    if isinstance(group, SharedGroup):
        parts = [[part] for part in whole.chunk(len(group.members))]
        group.send([[Rows(part)] for (part,) in parts])
        own = parts[group.position]
        return _shared_transfer(group.receive([own] * len(parts), add=True), None)
    if whole.is_cuda:
        own_part = whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        return _transfer(_reduce_scatter(own_part, whole, group=group, async_op=True), lambda: None)
    arrived, me = torch.empty_like(whole), dist.get_rank(group)
    work = dist.all_to_all_single(arrived, whole, group=group, async_op=True)

    def add() -> None:
        parts = arrived.chunk(dist.get_world_size(group))
        own = whole.chunk(len(parts))[me]
        for part in (*parts[:me], *parts[me + 1 :]):
            own.add_(part)

    return _transfer(work, add)


def all_reduce(values: Tensor, group: Group) -> Transfer[None]:
    """``values`` become the sum of all members', in one order everywhere; few of them."""
    if not isinstance(group, SharedGroup):
        return _transfer(dist.all_reduce(values, group=group, async_op=True), lambda: None)
    table = values.new_empty(len(group.members), *values.shape)
    gathering = all_gather(values, table, group)

    def finish() -> None:
        gathering.wait()
        torch.sum(table, 0, dtype=values.dtype, out=values)

    return Transfer(finish, gathering.when_done)


def _transfer(work: dist.Work, result: Callable[[], Result]) -> Transfer[Result]:
    def wait() -> Result:
        work.wait()
        return result()

    return Transfer(wait, lambda tell: work.get_future().add_done_callback(lambda _: tell(time.perf_counter())))


def _shared_transfer(finish: Callable[[], float], result: Result) -> Transfer[Result]:
    told: list[Callable[[float], None]] = []

    def wait() -> Result:
        left = finish()
        for tell in told:
            tell(left)
        return result

    return Transfer(wait, told.append)


def _pack(columns: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors as the bytes of one."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> Columns:
    """What ``_pack`` made, of columns as wide as those of ``like``."""
    widths = [column.shape[1] * column.element_size() for column in like]
    # A copy even of a single row, which is contiguous where it stands: the view needs aligned memory.
    parts = [part.clone(memory_format=torch.contiguous_format) for part in packed.split(widths, dim=1)]
    return tuple(part.view(column.dtype) for part, column in zip(parts, like, strict=True))
