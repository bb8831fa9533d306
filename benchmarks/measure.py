"""Timing on a machine that is not ours alone: contestants take turns, and medians are compared. And memory in use.

A step is measured twice: by the wall clock, and by the CPU time of the process, which a neighbour's load distorts less
because it does not count while another process has the core.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Sample:
    """One step, in seconds. ``cpu_s``: user and system time of all threads of the process."""

    wall_s: float
    cpu_s: float


def timed(step: Callable[[], object]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Sample]]:
    """A step of each a round, every other round in reverse, so that nobody always follows the same one."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for turn in range(rounds):
        order = list(contestants)
        for name in order if turn % 2 == 0 else reversed(order):
            samples[name].append(timed(contestants[name]))
    return samples


def median(samples: Sequence[Sample]) -> Sample:
    return Sample(statistics.median(s.wall_s for s in samples), statistics.median(s.cpu_s for s in samples))


def fastest(samples: Sequence[Sample]) -> float:
    """The shortest CPU time, for a choice among candidates: noise only adds."""
    return min(s.cpu_s for s in samples)


def top_operators(step: Callable[[], object], rows: int = 15) -> str:
    """The operators of one step that took the most CPU time themselves, as torch's profiler prints them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    table: str = profile.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=44, header=None
    )
    return table


class Alive(TorchDispatchMode):
    """Inside it, which memory that tensors were given since it was entered is still held, by whom ever: also what
    autograd saved, which Python's own collector cannot see."""

    def __init__(self, ignoring: Iterable[Tensor] = ()) -> None:
        """``ignoring``: tensors of before, whose views count for nothing; others of before count once viewed."""
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignoring}
        self._born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ignored:
                    self._born[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        self._born = {key: entry for key, entry in self._born.items() if not entry[0].expired()}
        return sum(size for _, size in self._born.values())
