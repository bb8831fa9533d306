"""The rank's side of a drill: the faults of a plan, at the points that it names.

Nothing here is imported unless a plan is given. Then the objects of this one process are wrapped at the computing
points, and Python's audit events, which tell of every file that is opened or renamed, give those of a save.
"""

import ctypes
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from launch.config import Config
from launch.drills.fault import Action, Fault, Plan, Point
from parallel import checkpoint
from parallel.replica import Replica
from parallel.worker import Worker

FULL_DISK_BYTES = 64
SPIKE_NATS = 1e5
_PARTIAL = re.compile(r"\.step-(\d+)\.partial")
_COMPUTING = {
    Point.FORWARD: ("forward", "overlapped"),
    Point.BACKWARD: ("backward", "backward_input", "overlapped"),
}


class InjectedError(RuntimeError):
    """The exception that a drill raises."""


def arm(
    plan: Plan, config: Config, rank: int, worker: Worker, replica: Replica | None, current_step: Callable[[], int]
) -> None:
    """Have the faults of this rank happen. ``current_step`` is the step being taken, from 1.

    Raises ConfigError for a fault that would never happen.
    """
    plan.check(config)
    if not plan.verify_checkpoints:
        checkpoint.damage = lambda path: None
    for fault in plan.faults:
        if fault.happens_to(rank, config.layout.world_size):
            _arm(fault, _once(plan.mark(fault), fault, replica, worker), rank, worker, current_step)


def _arm(fault: Fault, strike: Callable[[], None], rank: int, worker: Worker, current_step: Callable[[], int]) -> None:
    def reach() -> None:
        if current_step() == fault.step:
            strike()

    match fault.point:
        case Point.FORWARD | Point.BACKWARD:
            for held in worker.held.values():
                _wrap(held.stage, _COMPUTING[fault.point], before=reach)
        case Point.REDUCE:
            _wrap(worker.end, ("reduce",), before=reach)
        case Point.OPTIMIZER:
            _wrap(worker.optimizer, ("update",), after=reach)
        case Point.SHARD:
            _on_file("open", re.compile(rf"/__{rank}_[^/]*$"), fault.step, strike)
        case Point.PUBLISH:
            _on_file("os.rename", re.compile(r"\.partial$"), fault.step, strike)
        case _:
            raise AssertionError(fault.point)


def _wrap(
    target: Any,
    names: Sequence[str],
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Have methods of this one object call ``before`` and ``after``."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before()
            result = method(*args, **kwargs)
            after()
            return result

        return wrapped

    for name in names:
        setattr(target, name, around(getattr(target, name)))


def _on_file(event: str, name: re.Pattern[str], step: int, strike: Callable[[], None]) -> None:
    """Strike when a file of this name is opened or renamed in the save of ``step``."""

    def hook(what: str, args: tuple[Any, ...]) -> None:
        if what == event and isinstance(args[0], (str, os.PathLike)):
            path = os.fspath(args[0])
            saved = _PARTIAL.search(path) if isinstance(path, str) else None
            if saved and int(saved[1]) == step and name.search(path):
                strike()

    sys.addaudithook(hook)


def _once(happened: Path, fault: Fault, replica: Replica | None, worker: Worker) -> Callable[[], None]:
    """Strike the first time only, over all starts of the run, and leave the time of it in a file."""

    def strike() -> None:
        try:
            handle = os.open(happened, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(handle, repr(time.time()).encode())
        os.close(handle)
        if fault.action is Action.LOSE_MEMORY and replica is not None:
            replica.forget()
        _act(fault.action, worker)

    return strike


def _act(action: Action, worker: Worker) -> None:
    match action:
        case Action.KILL | Action.LOSE_MEMORY:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.SEGFAULT:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(0)
        case Action.ABORT:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        case Action.RAISE:
            raise InjectedError("raised by a drill")
        case Action.NAN:
            worker.optimizer.buckets[0].gradients[0] = math.nan
        case Action.SPIKE:
            for held in worker.held.values():
                held.stage.cross_entropy += SPIKE_NATS
            for bucket in worker.optimizer.buckets:
                bucket.gradients.mul_(-SPIKE_NATS)
        case Action.FLIP:
            words = worker.optimizer.buckets[0].master.view(torch.int32)
            words[worker.optimizer.buckets[0].master.abs().argmax()] ^= 1 << 23  # the lowest of the exponent
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.HANG:
            while True:
                time.sleep(60)
        case Action.FULL_DISK:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
        case _:
            raise AssertionError(action)
