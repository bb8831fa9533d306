"""Buckets: the shards hold every element of every parameter once, and are summed and gathered over the group."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.bucket import Bucket
from tests.ranks import run_ranks

Shape = tuple[int, ...]
shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


def parameters(shapes: list[Shape], seed: int = 0) -> list[tuple[str, nn.Parameter, int, int]]:
    """As a rank gives them to its bucket; the odd ones are the second half of a parameter twice their size."""
    torch.manual_seed(seed)
    named = []
    for number, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.randn(shape))
        count = parameter.numel()
        named.append((f"p{number}", parameter, count * (number % 2), count * (1 + number % 2)))
    return named


def member(position: int, ranks: int, named: list[tuple[str, nn.Parameter, int, int]], dtype: torch.dtype) -> Bucket:
    """The bucket of one rank of a group, without the other ranks."""
    group: Any = object()
    with (
        patch.object(dist, "get_world_size", lambda group: ranks),
        patch.object(dist, "get_rank", lambda group: position),
    ):
        return Bucket(named, group, dtype)


@settings(deadline=None)
@given(shapes, st.integers(1, 7), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_element_is_owned_once(shapes: list[Shape], ranks: int, dtype: torch.dtype) -> None:
    original = {name: (p.detach().clone(), offset, total) for name, p, offset, total in parameters(shapes)}
    seen = {name: torch.zeros(p.numel(), dtype=torch.int64) for name, (p, _, _) in original.items()}
    end = 0
    for position in range(ranks):
        bucket = member(position, ranks, parameters(shapes), dtype)
        assert (bucket.start, bucket.stop - bucket.start) == (end, len(bucket.master))
        end = bucket.stop
        for s in bucket.owned_segments():
            value, offset, total = original[s.name]
            place = slice(s.offset - offset, s.offset - offset + s.numel)
            assert s.total == total and s.decayed == (value.ndim >= 2)
            # Masters keep FP32 whatever the parameters are rounded to.
            assert torch.equal(bucket.master[s.start : s.start + s.numel], value.flatten()[place])
            seen[s.name][place] += 1
    assert end == len(bucket.parameters) == len(bucket.gradients)
    assert all((count == 1).all() for count in seen.values())


@settings(deadline=None)
@given(shapes)
def test_weight_decay_applies_to_the_matrices_and_to_nothing_else(shapes: list[Shape]) -> None:
    bucket = Bucket(parameters(shapes), None, torch.float32)
    mark = torch.zeros(len(bucket.parameters), dtype=torch.bool)
    mark[: bucket.decay_stop] = True
    for s in bucket.segments:
        assert (mark[s.start : s.start + s.numel] == (len(shapes[int(s.name[1:])]) >= 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_are_views_of_the_flat_buffers(dtype: torch.dtype) -> None:
    named = parameters([(3, 5), (7,), (2, 2, 2)])
    before = {name: p.detach().clone() for name, p, _, _ in named}
    bucket = Bucket(named, None, dtype)
    for name, parameter, _, _ in named:
        assert torch.equal(parameter.detach(), before[name].to(dtype))
        bucket.buffers[parameter].fill_(1.0)
    assert bucket.gradients.sum() == sum(p.numel() for _, p, _, _ in named)
    assert bucket.gradients.dtype == torch.float32

    bucket.master.add_(1.0)
    bucket.publish()
    bucket.gather()
    bucket.gathered()
    for name, parameter, _, _ in named:
        assert torch.equal(parameter.detach(), (before[name] + 1.0).to(dtype))


def sum_and_gather(rank: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(own shard's summed gradient and the exact sum of that shard, the parameters and what all masters round to)."""
    group = dist.group.WORLD
    bucket = Bucket(parameters([(9, 11), (30,), (4, 5)]), group, dtype)
    torch.manual_seed(10)
    every = torch.randn(dist.get_world_size(), len(bucket.gradients))
    bucket.gradients.copy_(every[rank])
    bucket.reduce()
    bucket.reduced()
    summed = [bucket.gradient.clone(), every.double().sum(0).float()[bucket.shard]]
    masters = torch.randn(len(bucket.parameters))
    bucket.master.copy_(masters[bucket.shard])
    bucket.publish()
    whole: list[list[float]] = []
    bucket.written.append(lambda: whole.append(bucket.parameters.float().tolist()))
    bucket.gather()
    bucket.gathered()
    bucket.gathered()
    assert whole == [bucket.parameters.float().tolist()], "told once, when all are there"
    return [t.tolist() for t in summed], [bucket.parameters.float().tolist(), masters.to(dtype).float().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sums_over_the_group_and_gathers_the_shards(dtype: torch.dtype) -> None:
    for (gradient, exact), (gathered, published) in run_ranks(sum_and_gather, 3, dtype):
        assert gradient == pytest.approx(exact, rel=1e-5, abs=1e-6)
        assert gathered == published
