"""Bits that changed by themselves: copies of parameters are compared with each other and with their masters.

After GATHER all copies of a bucket are the same bits, the rounding of the masters, until the next update. So right
before it, while the copies of a rank are still what it computed with, every shard has a witness more than it has
copies: its owner's rounded master. What differs from the most frequent sum is wrong, which names a rank even where
there are two copies only, as of a twin. The next gather would hide a wrong copy, and spread a wrong master to all.

A flip in the bits of a master that rounding drops, and flips in moments, are not seen here, but by who has a snapshot
of them (``replica.py``); nor is one in FP8 blocks of a weight, which are made anew after every gather.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.activity import Activity
from parallel.bucket import Bucket
from parallel.collectives import all_gather


@dataclass(frozen=True)
class Flip:
    """``rank`` of the world, and which of its values are not what they were: "master weights", "parameters", or others
    of which it has a snapshot."""

    rank: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} of rank {self.rank}"


def find(buckets: Iterable[Bucket], activity: Activity) -> list[Flip]:
    """The flips in these buckets, as every rank of their groups finds them. Collective over each bucket's group."""
    return [flip for bucket in buckets for flip in _find(bucket, activity)]


def everybodys(own: Sequence[Flip], activity: Activity) -> list[Flip]:
    """What all ranks found, each flip once. Collective over the world."""
    found: list[Sequence[Flip]] = [own]
    if dist.is_initialized():
        found *= dist.get_world_size()
        with activity.waiting("report of flips", activity.ranks):
            dist.all_gather_object(found, list(own))
    return sorted({flip for each in found for flip in each}, key=lambda flip: (flip.rank, flip.what))


def _find(bucket: Bucket, activity: Activity) -> list[Flip]:
    copies = bucket.parameters.view(bucket.replicas, -1)
    own = torch.cat([_sums(copies), _sums(bucket.master.to(copies.dtype).view(1, -1))])
    if bucket.group is None:
        rows, ranks = [own.tolist()], [dist.get_rank() if dist.is_initialized() else 0]
    else:
        table = own.new_empty(bucket.replicas, len(own))
        with activity.waiting("comparison of parameters", bucket.peers):
            all_gather(own, table, bucket.group).wait()
        rows, ranks = table.tolist(), bucket.peers
    found = []
    for shard, owner in enumerate(ranks):
        claims = {Flip(owner, "master weights"): rows[shard][-1]}
        claims |= {Flip(rank, "parameters"): row[shard] for rank, row in zip(ranks, rows, strict=True)}
        right, votes = Counter(claims.values()).most_common(1)[0]
        found += [flip for flip, value in claims.items() if value != right or votes == 1]  # without a majority, all
    return found


def _sums(values: Tensor) -> Tensor:
    """A sum for each row, int64: of its bits as 32-bit words, in which one flip never cancels."""
    return values.contiguous().view(torch.int32).sum(1, dtype=torch.int64)
