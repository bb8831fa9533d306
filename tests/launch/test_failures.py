"""What ends a run in the middle: one line that says so, nothing left behind, and a way to go on."""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch import local
from launch.attempts import Attempts
from launch.config import load
from launch.drills.fault import PLAN, Action, Fault, Plan, Point
from launch.invocation import CLUSTER, ELSEWHERE, Invocation, of_training
from launch.local import GRACE_SECONDS, _scratch_folder
from launch.nodes.roster import NodeCount
from launch.run_folder import RunFolder
from tests.launch.runs import (
    ONE_RANK,
    ROOT,
    Start,
    assert_gone,
    command,
    descendants,
    entries,
    train,
    train_forked,
    wait_for,
)

TWO_RANKS = ["layout.pipeline=1", "layout.data=2"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of the commands that a test runs, whose path is too long for sockets in it."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_a_loss_that_is_not_finite_is_one_line(config: Path, tmp_path: Path, temporary: Path) -> None:
    failed = train(config, *TWO_RANKS, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "--json")
    assert failed.returncode == 1 and failed.stdout == ""
    *_, line = failed.stderr.splitlines()
    assert line.startswith("error: step 2 was not taken: loss or gradient is not finite (loss ")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["step"]) == ("diverged", 2)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("victim", ["fork server", "rank", "rank of a stopped server"])
def test_a_process_that_is_killed_is_named_and_takes_all_with_it(
    config: Path, start: Start, tmp_path: Path, victim: str
) -> None:
    process = start(config, *TWO_RANKS, "train.steps=100000")
    wait_for(lambda: len(entries(tmp_path / "run")) >= 1)
    everyone = descendants(process)
    (server,) = [one for one in everyone if any(other.ppid() == one.pid for other in everyone)]
    if "stopped" in victim:
        server.suspend()
    (server if victim == "fork server" else server.children()[0]).kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert ("was ended by SIGKILL" if victim == "rank" else "started the ranks") in line
    assert_gone(everyone)


def test_a_launcher_that_is_killed_takes_all_with_it(config: Path, start: Start, tmp_path: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # with room for the path of a socket
    process = start(config, *TWO_RANKS, "train.steps=100000", env={**os.environ, "TMPDIR": str(temporary)})
    wait_for(lambda: len(entries(tmp_path / "run")) >= 1)
    everyone = descendants(process)
    assert any(temporary.iterdir())
    process.kill()
    process.communicate(timeout=60)
    assert_gone(everyone)
    temporary.rmdir()


def test_a_rank_that_fails_while_the_run_stops_is_named(config: Path, start: Start, tmp_path: Path) -> None:
    hold = Fault(Action.HOLD, rank=0, step=3, point=Point.FORWARD)
    plan = Plan(tmp_path / "plan.json", (hold, Fault(Action.KILL, rank=1, step=3, point=Point.OPTIMIZER)))
    plan.write()
    process = start(config, *TWO_RANKS, env={**os.environ, PLAN: str(plan.file)})
    wait_for(plan.mark(hold).exists)
    process.terminate()
    assert process.stderr is not None
    assert "stopping after this step; asked once more, it stops at once\n" in iter(process.stderr.readline, "")
    plan.released.touch()
    _, error = process.communicate(timeout=60)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert (process.returncode, error.splitlines()[-1]) == (
        143,
        f"error: rank 1 was ended by SIGKILL while the run stopped; to go on from {newest}, give the same command",
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["rank"]) == ("failure", 1) and events[-1]["step"] in (2, 3)


def test_training_goes_on_without_a_checkpoint_if_the_user_said_so_but_does_not_end_without_one(
    config: Path, tmp_path: Path
) -> None:
    assert train_forked(config, *ONE_RANK, "train.steps=1", ranks=1).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 6):
        (checkpoints / f".step-0000000{step}.partial").write_text("a file in the way")
    result = train_forked(config, *ONE_RANK, "train.steps=6", "checkpoint.on_error=continue", ranks=1)
    assert result.returncode == 2
    cannot = f"checkpoint {checkpoints}/step-%s cannot be written: File exists"
    first, last = result.stderr.splitlines()
    assert (first, last) == (f"{cannot % '00000002'}; training goes on", f"error: {cannot % '00000006'}")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    kept = [(e["event"], e["step"]) for e in events if "checkpoint" in e["event"]]
    assert kept == [("checkpoint", 1), ("checkpoint failed", 2), ("checkpoint", 4), ("checkpoint failed", 6)]
    assert len(entries(tmp_path / "run")) == 6


def test_every_rank_names_the_one_that_was_stopped_within_the_timeout(
    config: Path, start: Start, tmp_path: Path
) -> None:
    process = start(config, "train.steps=100000", "train.timeout_seconds=5", "train.threads=1", "checkpoint.every=0")
    wait_for(lambda: len(entries(tmp_path / "run")) >= 1)
    everyone = descendants(process)
    (server,) = [one for one in everyone if any(other.ppid() == one.pid for other in everyone)]
    server.children()[1].suspend()
    stopped = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - stopped < 5 + GRACE_SECONDS + 5, error
    said = dict(re.findall(r"^error: rank (\d): (.*) \(traceback in ", error, re.MULTILINE))
    assert len(said) == 3, error
    (culprit,) = set("0123") - said.keys()
    for line in said.values():
        assert re.match(rf"[a-z].*: rank {culprit} is silent, dead or stopped, last heard of in ", line), line
    assert_gone(everyone)


def test_a_run_survives_the_terminal_only_under_nohup(config: Path, start: Start, tmp_path: Path) -> None:
    for nohup, status in ((True, 143), (False, 129)):
        process = start(
            config,
            *ONE_RANK,
            "train.steps=100000",
            "checkpoint.every=0",
            stderr=subprocess.STDOUT,
            preexec_fn=lambda nohup=nohup: signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL),
            start_new_session=True,
        )
        done = len(entries(tmp_path / "run"))
        wait_for(lambda: len(entries(tmp_path / "run")) > done)  # noqa: B023, it is called at once
        ranks = descendants(process)
        os.killpg(process.pid, signal.SIGHUP)
        if nohup:
            done = len(entries(tmp_path / "run"))
            wait_for(lambda: len(entries(tmp_path / "run")) > done + 1)  # noqa: B023, it is called at once
            process.terminate()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == status, out
        assert "with a checkpoint of it" in out and "Traceback" not in out
        assert_gone(ranks)


def test_what_torchs_launcher_leaves_behind_goes_with_it(tmp_path: Path) -> None:
    before = tempfile.tempdir
    with _scratch_folder(str(tmp_path)) as scratch:
        _, left = tempfile.mkstemp()
        assert Path(left).parent == Path(scratch)
    assert not Path(left).exists() and not Path(scratch).exists()
    assert tempfile.tempdir == before


def test_ctrl_c_before_there_is_a_rank_says_so_and_leaves_nothing(config: Path, start: Start, temporary: Path) -> None:
    process = start(config, *ONE_RANK)
    wait_for(lambda: any("forkserver" in " ".join(one.cmdline()) for one in descendants(process)))
    everyone = descendants(process)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "stopped before the first step\n")
    assert_gone(everyone)
    assert list(temporary.iterdir()) == []


def test_a_signal_when_all_ranks_are_gone_stops_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last that goes is the fork server, and before it the folder with the flag that says who asked to stop."""

    class Server:
        folder = str(tmp_path)

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def all_steps(_config: object, _arguments: object, _: object, attempts: Attempts, node: local._Node) -> int:
        local._pass_signals_on(node.relay, attempts, RunFolder(load(config)))
        return 0

    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setenv("TORCH_ELASTIC_WORKER_IDENTICAL", "1")  # and back to what it was
    monkeypatch.setattr(local, "ForkServer", Server)
    monkeypatch.setattr(local, "_start", all_steps)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert local.start(load(config), argparse.Namespace(nnodes=NodeCount())) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_training_goes_on_when_nobody_reads(config: Path, tmp_path: Path) -> None:
    words = " ".join(command(config, *ONE_RANK, "train.steps=3"))
    result = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} | head -1"], cwd=ROOT, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert len(entries(tmp_path / "run")) == 3


def test_what_to_run_next_is_how_it_was_run(tmp_path: Path) -> None:
    for name in ("bin", "else where"):
        (tmp_path / name).mkdir()
        script = tmp_path / name / "dualpipe"
        script.write_text("")
        script.chmod(0o755)
    on_path, script = {"PATH": str(tmp_path / "bin")}, str(tmp_path / "bin" / "dualpipe")
    assert of_training(script, on_path, tmp_path) == Invocation("dualpipe train")
    assert of_training(script, {"PATH": "/usr/bin"}, tmp_path) == Invocation("bin/dualpipe train")
    assert of_training(str(tmp_path / "else where" / "dualpipe"), on_path, tmp_path / "bin") == Invocation(
        f"'{tmp_path / 'else where' / 'dualpipe'}' train"
    )
    assert of_training("/x/launch/cli.py", on_path, tmp_path) == Invocation(f"{sys.executable} -m launch.cli train")
    nodes = ["--nnodes", "2:3"]
    assert of_training(script, on_path, tmp_path, nodes) == Invocation("dualpipe train --nnodes 2:3", ELSEWHERE)
    cluster = {**on_path, CLUSTER: "bin/dualpipe hosts --nodes 2"}
    inside = of_training(script, cluster, tmp_path, nodes)
    assert inside is not None
    assert inside.of(["a b"]) == "bin/dualpipe hosts --nodes 2 -- dualpipe train --nnodes 2:3 'a b'"


def test_what_to_run_next_under_torchrun_is_what_its_agent_was_started_with(tmp_path: Path) -> None:
    rank, script = {"RANK": "0", "GROUP_WORLD_SIZE": "1", "PATH": "/usr/bin"}, "/x/launch/train.py"
    agent = ["/v/bin/python", str(tmp_path / "bin" / "torchrun"), "--nproc-per-node", "2", "-m", "launch.train", "c"]
    again = "bin/torchrun --nproc-per-node 2 -m launch.train"
    assert of_training(script, rank, tmp_path, agent=agent) == Invocation(again)
    assert of_training(script, {**rank, "GROUP_WORLD_SIZE": "2"}, tmp_path, agent=agent) == Invocation(again, ELSEWHERE)
    module = ["/v/bin/python", "-m", "torch.distributed.run", "-m", "launch.train", "c"]
    assert of_training(script, rank, tmp_path, agent=module) == Invocation(" ".join(module[:-1]))
    assert of_training(script, rank, tmp_path, agent=["srun", "python", "train.py"]) is None
