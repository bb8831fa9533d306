"""The rank's side of a drill: the faults of a plan, at the points that it names.

Nothing here is imported unless a plan is given. Then the objects of this one process are wrapped at the computing
points, and Python's audit events, which tell of every file that is opened or renamed, give those of a save.
"""

import ctypes
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import torch

from launch import hosts, local
from launch.config import Config
from launch.drills.fault import PLAN, Action, Fault, Plan, Point
from launch.drills.segments import segments_of
from launch.run_folder import RunFolder
from parallel import checkpoint
from parallel.replica import Replica
from parallel.worker import Worker

FULL_DISK_BYTES = 64
SPIKE_NATS = 1e5
HOLD_SECONDS = 600.0
"""How long a rank is held at most: what outlives its launcher, as in a control, must not outlive the drill for good."""
_POLL_SECONDS = 0.01
_COMPUTING = {
    Point.FORWARD: ("forward", "overlapped"),
    Point.BACKWARD: ("backward", "backward_input", "overlapped"),
}
_ALL_COMPUTING = ("forward", "backward", "backward_input", "backward_weight", "overlapped")


class InjectedError(RuntimeError):
    """The exception that a drill raises."""


@dataclass(frozen=True)
class _Here:
    """What faults of this rank act on. ``step``: the one being taken, from 1."""

    rank: int
    worker: Worker
    replica: Replica | None
    checkpoints: Path
    step: Callable[[], int]
    may_go_on: Callable[[], bool]


def arm(
    plan: Plan,
    config: Config,
    rank: int,
    worker: Worker,
    replica: Replica | None,
    current_step: Callable[[], int],
    is_regrouping: Callable[[], bool],
) -> None:
    """Have the faults of this rank happen. ``current_step`` is the step being taken, from 1; ``is_regrouping``: whether
    the launcher asks for the end of the attempt.

    Raises ConfigError for a fault that would never happen.
    """
    plan.check(config)
    if not plan.protected:
        _do_without_protection(hangs=any(fault.action is Action.HANG for fault in plan.faults))
    _say_when_it_begins(plan.forwards, worker)
    checkpoints = RunFolder(config).checkpoints
    here = _Here(rank, worker, replica, checkpoints, current_step, lambda: plan.released.exists() or is_regrouping())
    for fault in plan.faults:
        if fault.happens_to(rank, config.layout.world_size):
            _arm(fault, plan, here)


def _do_without_protection(hangs: bool) -> None:
    """``hangs``: whether a rank will; that one must not end at SIGTERM, or nobody would have to end it."""
    checkpoint.damage = lambda path: None
    if not hangs:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, 0)
    setattr(local, "end_now", lambda: None)  # noqa: B010


def _say_when_it_begins(file: Path, worker: Worker) -> None:
    """Have the rank write down when its first forward begins."""
    begun = False

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            with file.open("a") as stream:
                stream.write(f"{time.time()!r}\n")

    for held in worker.held.values():
        _wrap(held.stage, _COMPUTING[Point.FORWARD], before=begin)


def _arm(fault: Fault, plan: Plan, here: _Here) -> None:
    worker, step, mark = here.worker, f"0*{fault.step}", plan.mark(fault)
    is_due = _by_the_clock(fault, plan, here) if fault.wait_seconds else lambda: here.step() == fault.step

    def strike() -> None:
        if _first(mark):
            _act(fault.action, here)

    def reach() -> None:
        if is_due():
            strike()

    match fault.point:
        case Point.FORWARD if fault.action is Action.SLOW:
            _slow_down(fault, mark, here)
        case Point.FORWARD | Point.BACKWARD:
            for held in worker.held.values():
                _wrap(held.stage, _COMPUTING[fault.point], before=reach)
        case Point.DISPATCH:
            for held in worker.held.values():
                _wrap(held.stage.exchange, ("dispatch",), after=reach)
        case Point.REDUCE:
            _wrap(worker.end, ("reduce",), before=reach)
        case Point.OPTIMIZER:
            _wrap(worker.optimizer, ("update",), after=reach)
        case Point.GATHER:
            _leave_out_gather(fault, mark, here)
        case Point.SHARD:
            _on_file("open", re.compile(rf"/\.step-{step}\.partial/__{here.rank}_[^/]*$"), strike)
        case Point.PUBLISH:
            _on_file("os.rename", re.compile(rf"/\.step-{step}\.partial$"), strike)
        case Point.LOAD:
            _on_file("open", re.compile(rf"/step-{step}/__[^/]*$"), strike)
        case _:
            raise AssertionError(fault.point)


def _by_the_clock(fault: Fault, plan: Plan, here: _Here) -> Callable[[], bool]:
    """Whether its time has come; asked from the first step of this start on."""
    started: int | None = None

    def is_due() -> bool:
        nonlocal started
        started = here.step() if started is None else started
        if here.step() - started + 1 < fault.step or plan.mark(fault).exists() or plan.spared.exists():
            return False
        due = plan.due(fault)
        return due is not None and time.time() >= due

    return is_due


def _slow_down(fault: Fault, mark: Path, here: _Here) -> None:
    """Have the rank rest after all that it computes, from the step on: ``times`` - 1 times as long as that took."""
    clock = here.worker.activity.compute_time

    def slowly(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = clock.seconds()
            result = method(*args, **kwargs)
            if here.step() >= fault.step:
                _first(mark)
                time.sleep((fault.times - 1) * (clock.seconds() - before))
            return result

        return wrapped

    for held in here.worker.held.values():
        for name in _ALL_COMPUTING:
            setattr(held.stage, name, slowly(getattr(held.stage, name)))


def _leave_out_gather(fault: Fault, mark: Path, here: _Here) -> None:
    """Once, the rank does not take part: what it computes next, it computes with the parameters that it has."""
    bucket = here.worker.optimizer.buckets[0]
    gather = bucket.gather

    def left_out() -> None:
        if here.step() != fault.step or not _first(mark):
            gather()

    setattr(bucket, "gather", left_out)  # noqa: B010


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


def _on_file(event: str, name: re.Pattern[str], strike: Callable[[], None]) -> None:
    """Strike when a file of this name is opened or renamed."""

    def hook(what: str, args: tuple[Any, ...]) -> None:
        if what == event and isinstance(args[0], (str, os.PathLike)):
            path = os.fspath(args[0])
            if isinstance(path, str) and name.search(path):
                strike()

    sys.addaudithook(hook)


def _first(mark: Path) -> bool:
    """Whether this is the first time, over all starts of the run; then the time of it is in the file ``mark``."""
    try:
        handle = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, repr(time.time()).encode())
    os.close(handle)
    return True


def _lose_node() -> None:
    """None of its processes may see another one end, so all are stopped first. They are the drill's own: the launcher
    was given its plan. What they share by name goes with the node's memory."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None and launcher.pid is not None
    node = psutil.Process(launcher.pid)
    assert node.environ()[PLAN] == os.environ[PLAN], node
    others = [process for process in (node, *node.children(recursive=True)) if process.pid != os.getpid()]
    for process in others:
        process.suspend()
    for segment in {segment for process in others for segment in segments_of(process.pid)}:
        segment.unlink(missing_ok=True)
    for process in others:
        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _act(action: Action, here: _Here) -> None:
    worker = here.worker
    match action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.LOSE_MEMORY:
            if here.replica is not None:
                here.replica.forget()
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.LOSE_NODE:
            _lose_node()
        case Action.CUT:
            assert hosts.is_node(), "not the machine's own network"
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
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
        case Action.FLIP_MOMENT:
            if here.replica is not None:
                here.replica.finish()  # what changes before it is copied, the copy has too
            moment = worker.optimizer.second[0]
            moment.view(torch.int16 if moment.element_size() == 2 else torch.int32)[moment.argmax()] ^= 1
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.HANG:
            while True:
                time.sleep(60)
        case Action.HOLD:
            deadline = time.monotonic() + HOLD_SECONDS
            while not here.may_go_on() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        case Action.FULL_DISK:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
        case Action.ASK:
            os.kill(os.getpid(), signal.SIGTERM)
            while not here.worker.end.stop():  # a thread hears it
                time.sleep(_POLL_SECONDS)
        case Action.READ_ONLY:
            here.checkpoints.chmod(0o555)
            _obey_permissions()
        case _:
            raise AssertionError(action)


def _obey_permissions() -> None:
    """Have this thread heed the permissions of files, which root does not: drop its CAP_DAC_OVERRIDE. Linux only."""
    libc, version_3, dac_override = ctypes.CDLL(None, use_errno=True), 0x20080522, 1
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: capabilities 0 to 31, then 32 to 63
    for call in (libc.capget, libc.capset):
        if call(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities cannot be changed")
        sets[0] &= ~(1 << dac_override)
