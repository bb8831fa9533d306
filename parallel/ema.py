"""An exponential moving average (EMA) of the parameters, in the host's memory.

After every step, with d the decay and w the owned FP32 masters,

    e = e + (1 - d) (w - e)

in FP32, sharded as the masters are. The masters stay as they are during the next forward and backward, and that is when
a thread does it: on a GPU it first waits for an asynchronous copy of them to pinned memory. Every step's update is done
before the next one changes the masters, so the result does not depend on when the thread runs (DeepSeek-V3 report,
3.2.3).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from parallel.bucket import Bucket

_BLOCK = 1 << 15  # elements up to which torch starts no threads of its own beside this one


class Average:
    """``shards``: of each bucket, laid out as its master is, FP32 on the host; they begin as the masters are.

    ``start`` after the masters changed, ``finish`` before they change again and before anyone reads the shards.
    """

    def __init__(self, decay: float, buckets: Sequence[Bucket]) -> None:
        self.decay, self.buckets = decay, buckets
        pinned = buckets[0].master.is_cuda
        self.shards = [_on_host(bucket.master, pinned) for bucket in buckets]
        self._copies = [_on_host(bucket.master, pinned) for bucket in buckets] if pinned else None
        self._stream = torch.cuda.Stream(buckets[0].master.device) if pinned else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._underway: Future[None] | None = None
        self.restart()

    def restart(self) -> None:
        """Begin anew, with the masters as they are."""
        self.finish()
        for shard, bucket in zip(self.shards, self.buckets, strict=True):
            shard.copy_(bucket.master)

    def start(self) -> None:
        """Take the masters into the average, behind whatever comes next."""
        self.finish()
        masters, copied = [bucket.master for bucket in self.buckets], None
        if self._stream is not None and self._copies is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                for copy, master in zip(self._copies, masters, strict=True):
                    copy.copy_(master, non_blocking=True)
            copied, masters = self._stream.record_event(), self._copies
        self._underway = self._thread.submit(self._update, masters, copied)

    def finish(self) -> None:
        """Wait for what was started. Raises what it raised. Any thread may call it."""
        if self._underway is not None:
            self._underway.result()

    @torch.no_grad()
    def _update(self, masters: Sequence[Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for shard, master in zip(self.shards, masters, strict=True):
            for part, values in zip(shard.split(_BLOCK), master.split(_BLOCK), strict=True):
                part.lerp_(values, 1 - self.decay)


def _on_host(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, pin_memory=pinned)
