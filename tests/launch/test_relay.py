"""A wish to stop reaches every rank once, is no wait for a run that is complete, and says so when time runs out."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch.attempts import Journal
from launch.config import load
from launch.drills.fault import PLAN, Action, Fault, Plan, Point
from launch.relay import Relay
from launch.run_folder import RunFolder
from tests.launch.runs import ONE_RANK, Start, assert_gone, descendants, wait_for


def test_asked_in_its_last_step_a_run_ends_at_once_with_status_0(config: Path, start: Start, tmp_path: Path) -> None:
    hold = Fault(Action.HOLD, rank=0, step=2, point=Point.FORWARD)
    plan = Plan(tmp_path / "plan.json", (hold,))
    plan.write()
    process = start(config, *ONE_RANK, "train.steps=2", env={**os.environ, PLAN: str(plan.file)})
    wait_for(plan.mark(hold).exists)
    everyone = descendants(process)
    process.terminate()
    assert process.stderr is not None
    said = "stopping after this step; asked once more, it stops at once\n"
    assert said in iter(process.stderr.readline, "")
    plan.released.touch()
    _, error = process.communicate(timeout=60)  # half of recovery.grace_seconds
    assert (process.returncode, error) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["step"]) == ("end", 2)
    assert_gone(everyone)


def test_every_rank_gets_each_request_once_and_who_is_deaf_is_killed_after_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = [], Relay._send

    def noted(rank: psutil.Process, number: int) -> None:
        sent.append((rank.pid, number))
        send(rank, number)

    monkeypatch.setattr(Relay, "_send", staticmethod(noted))

    def sleeping(deaf: bool) -> subprocess.Popen[bytes]:
        handler = signal.SIG_IGN if deaf else signal.SIG_DFL
        return subprocess.Popen(["sleep", "60"], preexec_fn=lambda: signal.signal(signal.SIGTERM, handler))

    relay = Relay(tmp_path, grace_seconds=1)
    deaf, first, late = sleeping(True), sleeping(False), sleeping(False)
    try:
        ranks = {psutil.Process(process.pid) for process in (deaf, first)}
        relay.pass_on(ranks)
        assert first.poll() is None and not relay.asked.is_set()
        assert relay.hear(signal.SIGTERM) and not relay.hear(signal.SIGINT), "from the terminal and from who passes on"
        assert relay.asked.is_set() and relay.signal == signal.SIGTERM
        relay.pass_on(ranks)
        relay.pass_on({psutil.Process(process.pid) for process in (deaf, late)})
        assert (first.wait(10), late.wait(10), deaf.poll()) == (-signal.SIGTERM, -signal.SIGTERM, None)
        assert not relay.out_of_time
        time.sleep(1)
        relay.pass_on({psutil.Process(deaf.pid)})
        assert deaf.wait(10) == -signal.SIGKILL and relay.out_of_time
        asked = [(process.pid, signal.SIGTERM) for process in (deaf, first, late)]
        assert sorted(sent) == sorted([*asked, (deaf.pid, signal.SIGKILL)])
    finally:
        for process in (deaf, first, late):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (None, "steps 1 to 7 have no checkpoint; there is no checkpoint: the same command begins anew"),
        (4, "steps 5 to 7 have no checkpoint; to go on from {}, give the same command"),
        (7, "their step is lost; to go on from {}, give the same command"),
    ],
)
def test_a_grace_that_is_over_says_what_is_lost_and_where_it_goes_on(
    saved: int | None, said: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(load(config))
    folder.path.mkdir()
    steps = "".join(f'{{"step": {step}}}\n' for step in range(1, 8))
    folder.metrics_file.write_text(steps + '{"not": "ours"}\n')
    newest = None if saved is None else folder.checkpoints / f"step-{saved:08d}"
    monkeypatch.setattr(RunFolder, "newest_checkpoint", lambda self: newest)
    Journal(load(config)).note_out_of_time(signal.SIGTERM)
    begins = "error: ranks were killed that were not done recovery.grace_seconds=120 after SIGTERM: "
    assert capsys.readouterr().err == begins + said.format(newest) + "\n"
    (event,) = folder.events.entries()
    assert (event["event"], event["seconds"], event["step"]) == ("out of time", 120, 7)
    assert event["checkpoint"] == (None if newest is None else str(newest))
