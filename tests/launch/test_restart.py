"""Ranks that die and are started again by the launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch import local
from launch.attempts import Alone
from launch.config import load
from launch.drills.fault import PLAN, Action, Fault, Plan, Point
from launch.launcher import LOST_SERVER, Failure, Flag
from launch.relay import Relay
from launch.train import DIVERGED, FAILED, USER_ERROR
from tests.launch.runs import ONE_RANK, ROOT, command, entries, train

TWO_RANKS = ["layout.pipeline=1", "layout.data=2"]


def test_a_run_goes_on_by_itself_until_its_restarts_are_used_up(config: Path, tmp_path: Path) -> None:
    raised, killed = Fault(Action.RAISE, 0, 4, Point.BACKWARD), Fault(Action.KILL, 1, 6, Point.FORWARD)
    plan = Plan(tmp_path / "plan.json", (raised, killed))
    plan.write()
    result = subprocess.run(
        command(config, *TWO_RANKS, "recovery.max_restarts=1", "checkpoint.asynchronous=false"),
        cwd=ROOT,
        env={**os.environ, PLAN: str(plan.file)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    own, *peers, last = result.stderr.splitlines()
    assert own.startswith("error: rank 0: InjectedError: raised by a drill (traceback in ")
    restart = "rank 0 failed: InjectedError: raised by a drill; restart 1 of 1, from the newest checkpoint"
    assert restart in peers
    peers.remove(restart)
    # Whoever waited for the dead one says so, unless it was ended before it could; nobody is told of a wish to stop.
    assert all(line.startswith(("error: rank 0: ", "error: rank 1: ")) for line in peers), peers
    assert last == (
        "error: rank 1 was ended by SIGKILL; recovery.max_restarts=1 is used up; to go on, give the same command"
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    kept = [event for event in events if event["event"] in ("failure", "resume", "recovery")]
    first, resume, recovery, second = kept
    assert (first["event"], first["rank"], first["step"]) == ("failure", 0, 3)
    assert (resume["event"], resume["step"]) == ("resume", 2)
    assert (recovery["event"], recovery["cause"], recovery["step"]) == ("recovery", first["cause"], 3)
    assert 0 < recovery["seconds"] < 60
    stages = recovery["stages"]
    assert list(stages) == ["stop", "regroup", "load", "step"] and min(stages.values()) > 0
    assert sum(stages.values()) == pytest.approx(recovery["seconds"], abs=0.01)
    assert (second["event"], second["rank"], second["step"]) == ("failure", 1, 5)
    assert [entry["step"] for entry in entries(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_run_that_has_nothing_to_go_on_from_says_that_it_begins_anew(config: Path, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan.json", (Fault(Action.KILL, 0, 2, Point.BACKWARD),))
    plan.write()
    result = subprocess.run(
        command(config, *ONE_RANK, "train.steps=2", "recovery.max_restarts=1"),
        cwd=ROOT,
        env={**os.environ, PLAN: str(plan.file)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    assert result.stdout.count("\nthere is nothing to go on from: the run begins anew\n") == 1
    assert [entry["step"] for entry in entries(tmp_path / "run")] == [1, 2]


def faulty(config: Path, plan: Plan, *overrides: str) -> subprocess.CompletedProcess[str]:
    plan.write()
    words = command(config, "recovery.max_restarts=2", "recovery.replicate_every=1", *overrides)
    environment = {**os.environ, PLAN: str(plan.file)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_stop_in_the_first_step_after_memory_leaves_a_checkpoint_though_that_step_is_bad(
    config: Path, tmp_path: Path
) -> None:
    kill, nan = Fault(Action.KILL, 3, 4, Point.FORWARD), Fault(Action.NAN, 2, 4, Point.REDUCE)
    plan = Plan(tmp_path / "plan.json", (kill, nan, Fault(Action.ASK, 0, 4, Point.BACKWARD)))
    result = faulty(config, plan, "checkpoint.every=0", "recovery.max_bad_steps=3")
    assert result.returncode == 143, result.stderr
    step = len(entries(tmp_path / "run"))
    assert f"stopped after step {step}, with a checkpoint of it" in result.stdout and step in (2, 3)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()


def test_a_checkpoint_that_was_due_is_written_though_memory_has_its_step(config: Path, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan.json", (Fault(Action.KILL, 1, 4, Point.SHARD),))
    result = faulty(config, plan, *TWO_RANKS, "train.steps=6", "checkpoint.every=4")
    assert result.returncode == 0, result.stderr
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000006"]
    assert [entry["step"] for entry in entries(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_who_dies_in_a_validation_costs_neither_it_nor_the_line_of_its_step(config: Path, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan.json", (Fault(Action.KILL, 1, 3, Point.FORWARD),))  # which comes after step 2
    result = faulty(config, plan, *TWO_RANKS, "train.steps=4", "train.validate_every=2", "checkpoint.every=0")
    assert result.returncode == 0, result.stderr
    found = entries(tmp_path / "run")
    assert [(entry["step"], "validation_bits_per_byte" in entry) for entry in found] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]
    failure = next(json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open() if '"failure"' in line)
    assert failure["step"] == 1, "it was in the validation"


def test_a_divergence_is_not_tried_again(config: Path, tmp_path: Path) -> None:
    diverging = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "recovery.max_restarts=2"]
    result = train(config, *ONE_RANK, *diverging)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "is not finite" in line and "; begin anew with another optimizer.learning_rate" in line
    assert (tmp_path / "run" / "events.jsonl").read_text().count('"start"') == 1


@pytest.mark.parametrize(
    ("status", "again"),
    [
        (-signal.SIGKILL, True),
        (-signal.SIGSEGV, True),
        (FAILED, True),
        (LOST_SERVER, True),
        (USER_ERROR, False),
        (DIVERGED, False),
        (128 + signal.SIGTERM, False),
    ],
)
def test_what_the_user_has_to_mend_or_asked_for_is_not_tried_again(status: int, again: bool) -> None:
    assert Failure(0, status, "", 0.0).can_recover == again


class _Server:
    """Ranks that hear no SIGTERM."""

    def __init__(self, count: int) -> None:
        words = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
        self.processes = [subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE) for _ in range(count)]
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == b"\n"

    def end_if_it_hides_an_end(self) -> None: ...

    def ranks(self) -> set[psutil.Process]:
        found = set()
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.poll() is None:
                    found.add(psutil.Process(process.pid))
        return found


@pytest.mark.parametrize("finished", [False, True])
def test_ranks_that_outlive_a_dead_one_are_killed_unless_they_all_left(
    finished: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    server = _Server(2)
    first, second = server.processes
    flag, regroup = Flag(tmp_path / "finished"), Flag(tmp_path / "regroup")
    with local._Watch(server, Alone(load(config)), flag, regroup, Relay(tmp_path, 1)) as watch:
        if finished:
            flag.set()
        while len(watch._seen) < 2:
            pass
        first.kill()
        if finished:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=1)
        else:
            assert second.wait(timeout=10) == -signal.SIGKILL
        assert watch.noticed is not None
    assert not psutil.pid_exists(second.pid)
