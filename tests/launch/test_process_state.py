"""What a process does is told from what it does not do, all of its threads counted."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from launch.process_state import ProcessState, state_of

PROGRAM = """
import sys, threading, time

def work(until):
    while time.monotonic() < until:
        pass

if sys.argv[1] == "thread works":
    threading.Thread(target=work, args=[time.monotonic() + 60], daemon=True).start()
print(*(thread.native_id for thread in threading.enumerate() if thread is not threading.main_thread()), flush=True)
work(time.monotonic() + 60) if sys.argv[1] == "works" else time.sleep(60)
"""


@contextmanager
def running(what: str) -> Iterator[tuple[psutil.Process, list[int]]]:
    """A process, and its threads but for the main one."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, what], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), [int(thread) for thread in process.stdout.readline().split()]
        finally:
            process.kill()


def becomes(wanted: ProcessState, process: psutil.Process, besides: list[int]) -> bool:
    """Within 10 seconds."""
    deadline = time.monotonic() + 10
    while (found := state_of(process.pid, besides)) is not wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return found is wanted


def test_a_process_is_asleep_only_when_all_of_its_threads_are_that_count() -> None:
    with running("sleeps") as (process, _):
        assert becomes(ProcessState.ASLEEP, process, [])
        process.suspend()
        assert becomes(ProcessState.STOPPED, process, [])
        process.resume()
        assert becomes(ProcessState.ASLEEP, process, [])
    assert state_of(process.pid) is ProcessState.AT_WORK, "nothing is known of who is gone"
    with running("thread works") as (process, threads):
        assert becomes(ProcessState.ASLEEP, process, threads)
        assert {state_of(process.pid) for _ in range(20)} == {ProcessState.AT_WORK}


def test_a_process_that_waits_for_a_core_is_at_work() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with running("works") as (process, _), running("works"), running("works"):
            assert {state_of(process.pid) for _ in range(50)} == {ProcessState.AT_WORK}
    finally:
        os.sched_setaffinity(0, cores)
