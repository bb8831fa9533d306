"""What a process needs to know and do to be one rank: its place, its device, its group."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from launch.config import Config, ConfigError
from model.fp8.gemm import choose
from parallel import deepep
from parallel.activity import collective_timeout
from parallel.cores import own_cores

Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place(environment: Mapping[str, str]) -> Place:
    """This process's place. Raises ConfigError when torchrun's variables are not all there."""
    try:
        return Place(*(int(environment[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the environment has RANK but not all of torchrun's variables: {error}") from None


def device_of(config: Config, here: Place) -> torch.device:
    """The device of a rank. Raises ConfigError or PrecisionError, on all ranks of a node alike, when there are too few
    GPUs, or not what FP8 or dispatch needs."""
    device = _device_of(config, here)
    if config.precision.compute == "fp8":
        choose(config.precision.backend, device)
    if config.dispatch.kind == "deepep":
        try:
            deepep.check(device, config.precision.compute)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return device


def _device_of(config: Config, here: Place) -> torch.device:
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if here.local_world_size > count:
        raise ConfigError(
            f"train.device={wanted} needs a GPU for each of the {here.local_world_size} ranks on this node; "
            f"it has {count}"
        )
    return torch.device("cuda", here.local_rank)


def prepare(config: Config, here: Place, device: torch.device) -> None:
    """Threads, memory and the process group."""
    torch.set_num_threads(config.train.threads or max(1, len(own_cores()) // here.local_world_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
        run_in_long_slices()
    die_with_parent()
    timeout = collective_timeout(config.train.timeout_seconds)
    if device.type == "cuda":
        # With its device named, NCCL makes every communicator at once. Made at its first message instead, a channel
        # would hold the host until the peer sends, and receives that are posted early would wait for each other.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def store_of_the_job() -> Store:
    """A connection of its own to the store of the process group: one thread's waiting does not hold up another's."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def leave() -> None:
    """Leave the group together: a process that ends while a peer's threads still listen to it can abort the peer."""
    dist.barrier()
    dist.destroy_process_group()


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back, in one heap for all threads: activations of megabytes
    come and go all the time, and zeroing fresh pages for each of them costs more than computing it. Elsewhere than on
    glibc, do nothing."""
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)


def run_in_long_slices() -> None:
    """Have the kernel let a rank run on when a message wakes another one: where ranks share a core, every switch costs
    them the cache. Linux only; elsewhere do nothing."""
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends: a killed launcher leaves no orphans.
    Linux only; elsewhere do nothing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def together(function: Callable[[], Result], errors: tuple[type[Exception], ...]) -> Result:
    """Call ``function`` on every rank; when any rank raises one of ``errors``, all raise the first of them, so that
    nobody goes on alone into a collective. Collective."""
    failure, result = None, None
    try:
        result = function()
    except errors as error:
        failure = error
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, None if failure is None else str(failure))
    first = next((text for text in box if text is not None), None)
    if first is not None:
        raise ConfigError(first) from failure
    return result  # type: ignore[return-value]
