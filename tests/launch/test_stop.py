"""A rank that is asked to stop says so at once, finishes its step, and ends at once when it is asked again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The main thread is in a call that no signal interrupts, as in a collective.
RANK = """
import ctypes, os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
if sys.argv[2] == "pending":
    os.kill(os.getpid(), signal.SIGTERM)
from launch import stop
stop.ONE_REQUEST_SECONDS = 0.5
class Asked:
    def is_set(self):
        return sys.argv[2] == "asked"
    def wait(self, seconds):
        return self.is_set()
asked = Asked() if sys.argv[2] in ("asked", "outlived") else None
request = stop.StopRequest(sys.argv[1] == "leads", lambda: "there is nothing", asked)
request.graceful = "graceful" in sys.argv
print("ready", flush=True)
if asked is not None:
    while not request.terminated.wait(0.1):
        pass
    time.sleep(0.2)
    request.hush()
    print(request.wait_to_be_ended(0.7), flush=True)
    sys.exit(0 if request.wait_to_be_ended(20) else 1)
lock = ctypes.pythonapi.PyThread_allocate_lock
lock.restype = ctypes.c_void_p
acquire = ctypes.CDLL(None).PyThread_acquire_lock
acquire.argtypes = [ctypes.c_void_p, ctypes.c_int]
held = lock()
acquire(held, 1)
acquire(held, 1)
"""


def rank(
    leads: bool = True, state: str = "early", ignored: tuple[int, ...] = (), graceful: bool = False
) -> subprocess.Popen[str]:
    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-c", RANK, "leads" if leads else "follows", state, "graceful" if graceful else ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=begin,
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def ends(process: subprocess.Popen[str], status: int) -> str:
    _, error = process.communicate(timeout=20)
    assert process.returncode == status, error
    return error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_the_first_step_a_rank_ends_at_once(number: signal.Signals) -> None:
    process = rank()
    ready(process)
    process.send_signal(number)
    assert ends(process, 128 + number) == "stopped before the first step\n"


def test_a_signal_from_before_the_first_line_is_not_lost() -> None:
    assert ends(rank(state="pending"), 128 + signal.SIGTERM) == "stopped before the first step\n"


def test_asked_twice_a_rank_ends_though_its_step_does_not() -> None:
    process = rank(state="graceful")
    ready(process)
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping after this step; asked once more, it stops at once\n"
    process.send_signal(signal.SIGTERM)  # the launcher passes on what the terminal has sent already
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    process.send_signal(signal.SIGINT)
    assert ends(process, 130).endswith("stopped at once; there is nothing\n")


def test_a_rank_that_fails_while_it_stops_waits_to_be_ended() -> None:
    process = rank(state="asked", graceful=True)
    ready(process)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize("graceful", [False, True])
def test_a_rank_that_outlives_another_is_not_asked_to_stop_and_says_nothing(graceful: bool) -> None:
    process = rank(state="outlived", graceful=graceful)
    ready(process)
    process.terminate()
    out, error = process.communicate(timeout=20)
    if graceful:
        assert (out, error, process.returncode) == ("True\n", "", 0), "it need not wait until it missed the other"
    else:
        assert (out, error, process.returncode) == ("", "", 143)


def test_one_rank_speaks_for_all() -> None:
    process = rank(leads=False)
    ready(process)
    process.send_signal(signal.SIGTERM)
    assert ends(process, 143) == ""


def test_nohup_keeps_a_run_alive() -> None:
    process = rank(ignored=(signal.SIGHUP,))
    ready(process)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert ends(process, 143) == "stopped before the first step\n"
