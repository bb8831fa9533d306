"""Drills on real runs of two ranks; then what holds for fault plans, damage and verdicts of any kind."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

from launch import drill
from launch.config import ConfigError, load
from launch.drills import damage as damages
from launch.drills import drive, verdict
from launch.drills.damage import Damage
from launch.drills.drive import Attempt, Drive, Evidence
from launch.drills.fault import PLAN, Action, Fault, Plan, Point, read
from launch.drills.scenarios import SCENARIOS, STEPS
from launch.drills.segments import segments_of
from launch.drills.verdict import Ending, judge
from launch.run_folder import RunFolder
from parallel import checkpoint, manifest
from parallel.checkpoint import Progress
from tests.launch.runs import ROOT

pytestmark = pytest.mark.usefixtures("signals")

TWO_RANKS = {"layout: {pipeline: 2, data: 2, expert: 2}": "layout: {pipeline: 1, data: 2, expert: 2}"}


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; pytest's own has a path too long for the sockets in it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def two_ranks(config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = config.read_text()
    for old, new in TWO_RANKS.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    monkeypatch.chdir(ROOT)
    return config


def test_whatever_is_broken_does_not_show_in_the_end(
    two_ranks: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["kill-optimizer", "kill-restart", "bit-flip", "lose-memory", "stop", "nan", "flipped-moment", "slow-5x"]
    status = drill.main([*names, "--config", str(two_ranks), "--json"])
    out, error = capsys.readouterr()
    assert status == 0, out + error
    verdicts = {verdict["scenario"]: verdict for verdict in json.loads(out)}
    assert list(verdicts) == names
    for name, found in verdicts.items():
        assert found["passed"] and found["bitwise_equal"] and found["leftovers"] == [], name
        if name not in ("nan", "flipped-moment", "slow-5x"):
            assert 0 <= found["detected_s"] < found["recovered_s"] and 0 < found["forward_s"] < found["recovered_s"], (
                name
            )
    culprits = {name: found["culprit"] for name, found in verdicts.items()}
    assert culprits["kill-optimizer"] == "rank 1 was ended by SIGKILL"
    assert culprits["kill-restart"] == "rank 1 was ended by SIGKILL, then rank 0 was ended by SIGKILL"
    assert re.fullmatch(r"step-00000004/__\d_0.distcp", culprits["bit-flip"])
    assert re.fullmatch(r"rank 1 is slow: [3-9]\.\d times", culprits["slow-5x"])
    assert "rank 1 is silent, stopped by a signal" in culprits["stop"]
    assert culprits["nan"] == "loss or gradient is not finite (step 6)", "as if its batch had been left out as planned"
    assert culprits["flipped-moment"] == "bits changed by themselves: second moments of rank 1 (step 6)"
    lost = {name: found["lost_steps"] for name, found in verdicts.items()}
    assert lost["lose-memory"] <= 1, "no checkpoint was there, and the memory of the rank's peer was"
    # Step 5 was done and no checkpoint had it; the rank that lives may be done with 6. With the checkpoint of step 4
    # damaged, 3 and 4 go too.
    assert lost["kill-optimizer"] in (1, 2) and lost["bit-flip"] == 3
    assert (lost["nan"], lost["flipped-moment"], lost["kill-restart"], lost["slow-5x"]) == (1, 1, 1, 0)
    assert list(temporary.iterdir()) == []


def test_without_the_protection_the_drills_fail(two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["bit-flip", "kill-launcher", "terminate", "spike"]
    status = drill.main([*names, "--control", "--config", str(two_ranks)])
    out, error = capsys.readouterr()
    assert status == 1, out + error
    flipped, rest = out[out.index("\nbit-flip ") :].split("\nkill-launcher ")
    orphans, rest = rest.split("\nterminate ")
    terminated, spike = rest.split("\nspike ")
    assert re.fullmatch(r".* equal .* FAILED\n    left behind: process [^\n]*", orphans, re.DOTALL)
    assert re.fullmatch(r".* equal .* FAILED\n    it did not go on from a checkpoint", terminated, re.DOTALL)
    assert re.match(r"\nbit-flip .* differs .* FAILED\n", flipped)
    assert "\n    the state after the last step differs\n" in f"{flipped}\n"
    assert re.match(r".* differs .* FAILED\n", spike) and "\n    the culprit was not named\n" in spike


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kill-foward"], "SCENARIO='kill-foward' is not a scenario; did you mean kill-forward?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--nothing"], "--nothing"),
        (["--seed", "3", "--list"], "--seed=3 means nothing without --soak"),
        (["--soak", "", "--list"], "--soak= must be a time"),
        (["--soak", "2m", "--list", "--config", "nowhere.yaml"], "no --control and no --list"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_two_ranks_that_there_are_not_are_refused_before_anything_runs(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text().replace("layout: {pipeline: 2, data: 2, expert: 2}", "layout: {pipeline: 1}")
    config.write_text(text)
    for name, said in (
        ("kill-two", "2 faults must strike as many ranks; they strike 1 of 1"),
        ("slow-2x", "scenario slow-2x means nothing on 1 rank: it needs 2 at least"),
    ):
        assert drill.main([name, "--config", str(config)]) == 2
        assert said in capsys.readouterr().err


def test_the_list_has_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert drill.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SCENARIOS)


def test_every_scenario_would_happen_to_the_default_configuration() -> None:
    config = load(drill.DEFAULT, drill.SHRUNK)
    for scenario in SCENARIOS.values():
        Plan(Path(), scenario.faults).check(drive.drilled(config, Path("run"), scenario))


FAULTS = st.builds(
    Fault,
    st.sampled_from(Action),
    st.integers(-8, 8),
    st.integers(1, 1000),
    st.sampled_from(Point),
    st.floats(1, 100),
    st.floats(0, 100),
)


@given(st.lists(FAULTS).map(tuple), st.booleans())
def test_a_plan_reads_back_as_it_was_written(faults: tuple[Fault, ...], verify: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder) / "plan.json", faults, verify)
        plan.write()
        assert read(plan.file, Path(folder) / "run") == plan


def test_a_plan_that_was_left_in_the_environment_stops_any_other_run(tmp_path: Path) -> None:
    (tmp_path / "drill").mkdir()
    file = tmp_path / "drill" / "plan.json"
    Plan(file).write()
    with pytest.raises(ConfigError, match=f"{PLAN}=.* not for run.dir=.*unset it"):
        read(file, tmp_path / "run")
    one = {**asdict(Fault(Action.KILL, 1, 2, Point.FORWARD)), "action": "KILL", "point": "FORWARD"}
    changes = (
        {"rank": 1e999},
        {"rank": True},
        {"step": 1.9},
        {"times": float("nan")},
        {"wait_seconds": "1"},
        {"point": 3},
    )
    wrong = [json.dumps({"faults": [{**one, **change}], "protected": True}) for change in changes]
    for text in ("{}", "[" * 100000, '{"faults": [], "protected": 1}', *wrong):
        file.write_text(text)
        with pytest.raises(ConfigError, match="must be a fault plan"):
            read(file, tmp_path / "drill" / "run")


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (Fault(Action.KILL, 4, 6, Point.FORWARD), "the run has 4 ranks"),
        (Fault(Action.KILL, -5, 6, Point.FORWARD), "the run has 4 ranks"),
        (Fault(Action.KILL, 0, STEPS + 1, Point.FORWARD), f"train.steps={STEPS}"),
        (Fault(Action.KILL, 0, 5, Point.SHARD), "checkpoint.every=2"),
        (Fault(Action.KILL, 1, 6, Point.PUBLISH), "rank 0 publishes"),
        (Fault(Action.KILL, 0, 3, Point.LOAD), "checkpoint.every=2"),
        (Fault(Action.KILL, 0, 6, Point.LOAD), "nothing before it ends a rank"),
        (Fault(Action.SKIP, 0, 6, Point.FORWARD), "what is left out is a gather, and only that"),
        (Fault(Action.KILL, 0, 6, Point.SHARD, wait_seconds=9.0), "no clock is looked at there"),
        (Fault(Action.KILL, 0, 6, Point.FORWARD, wait_seconds=-1.0), "wait_seconds=-1"),
        (Fault(Action.SLOW, 0, 6, Point.FORWARD), "times=1 is no slower"),
    ],
)
def test_a_fault_that_would_never_happen_is_refused(fault: Fault, rule: str) -> None:
    config = drive.drilled(load(drill.DEFAULT, drill.SHRUNK), Path("run"))
    with pytest.raises(ConfigError, match=f"would never happen: {rule}"):
        Plan(Path(), (fault,)).check(config)
    point = Point.FORWARD if fault.point is Point.LOAD else fault.point
    Plan(Path(), (Fault(Action.KILL, 0, 6, point),)).check(config)


def test_a_fault_that_is_planned_twice_is_refused() -> None:
    config = drive.drilled(load(drill.DEFAULT, drill.SHRUNK), Path("run"))
    fault = Fault(Action.KILL, 0, 6, Point.FORWARD, wait_seconds=20.0)
    Plan(Path(), (fault, replace(fault, wait_seconds=30.0))).check(config)
    with pytest.raises(ConfigError, match=r"KILL of rank 0 at forward in step 6 would never happen twice: .* 2 times"):
        Plan(Path(), (fault, fault)).check(config)


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    state = {"master.weight": torch.randn(4096), "first_moment.weight": torch.zeros(8192)}
    save(state, checkpoint_id=path, no_dist=True)
    (path / "__1_0.distcp").write_bytes(torch.randn(4096).numpy().tobytes())  # another rank's
    checkpoint.seal(path, Progress(step, step), manifest.describe(path, (f.name for f in path.glob("*.distcp"))))
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", Damage)
def test_damage_is_seen_and_its_file_named(damage: Damage, tmp_path: Path) -> None:
    older, newest = _checkpoint(tmp_path, 2), _checkpoint(tmp_path, 4)
    assert checkpoint.damage(newest) is None
    before = verdict._state(newest)
    names = damages.apply(damage, newest, older)
    assert any(name in (checkpoint.damage(newest) or "") for name in names)
    assert checkpoint.damage(older) is None
    if damage in (Damage.BIT_FLIP, Damage.ZEROED_PAGE, Damage.STALE_SHARD):  # torch loads these without a word
        assert verdict._state(newest) != before


def _evidence(tmp_path: Path, **changes: object) -> Evidence:
    """Of a run whose last rank was killed in step 6, and that recovered as it should."""
    config = drive.drilled(load(drill.DEFAULT, drill.SHRUNK), tmp_path)
    folder = RunFolder(config)
    folder.events.path.unlink(missing_ok=True)
    folder.events.write("start", world_size=4)
    folder.events.write("failure", rank=3, cause="rank 3 was ended by SIGKILL", step=5)
    folder.events.write("resume", step=4)
    folder.events.write(
        "recovery", step=5, seconds=1.0, stages={"stop": 0.111, "regroup": 0.2, "load": 0.3, "step": 0.4}
    )
    whole = Evidence(folder, [Attempt(0.0, 9.0, 2.0, 0, STEPS, "")], [1.0], [0.5, 3.5], (), [])
    return replace(whole, **changes)


GOOD = Ending(list(range(1, STEPS + 1)), [float(step).hex() for step in range(STEPS)], "aa")


def test_a_verdict_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, end = SCENARIOS["kill-forward"], GOOD
    monkeypatch.setattr(verdict, "ending", lambda folder: end)
    good = judge(scenario, _evidence(tmp_path), GOOD)
    assert good.passed and good.bitwise_equal and (good.lost_steps, good.forward_s) == (1, 2.5)
    assert good.as_dict().items() >= {"stop_s": 0.11, "regroup_s": 0.2, "load_s": 0.3, "step_s": 0.4}.items()

    failed = Attempt(0.0, 9.0, 2.0, 1, 5, "error: no")
    for changes, problem in (
        ({"leftovers": ["process 7"]}, "left behind: process 7"),
        ({"struck": [None]}, "the fault did not happen"),
        ({"attempts": [failed]}, "start 1 ended with status 1, not 0, and said: error: no"),
    ):
        assert judge(scenario, _evidence(tmp_path, **changes), GOOD).problems == [problem]
    for old, new, problem in (
        ('"rank": 3', '"rank": 2', "the culprit was not named"),
        ("SIGKILL", "SIGSEGV", "the culprit was not named"),
        ('"resume"', '"start"', "it did not go on from a checkpoint"),
        ('"step": 4', '"step": 2', "3 steps were lost, of 1 at most"),
    ):
        wrong = _evidence(tmp_path)
        events = wrong.folder.events.path.read_text()
        assert old in events
        wrong.folder.events.path.write_text(events.replace(old, new))
        assert judge(scenario, wrong, GOOD).problems == [problem]

    losses = [*GOOD.losses[:-1], "0x0p+0"]
    for other, problem in (
        (replace(GOOD, steps=[*range(1, STEPS), STEPS - 1]), "the steps in its metrics are"),
        (replace(GOOD, losses=losses), f"the losses differ from step {STEPS}"),
        (replace(GOOD, state="ab"), "the state after the last step differs"),
        (replace(GOOD, state=None), "it has no whole checkpoint of the last step"),
    ):
        end = other
        found = judge(scenario, _evidence(tmp_path), GOOD)
        assert not found.bitwise_equal and len(found.problems) == 1 and found.problems[0].startswith(problem)


def _events(tmp_path: Path, *events: dict[str, object]) -> Evidence:
    whole = _evidence(tmp_path)
    whole.folder.events.path.unlink()
    for event in ({"event": "start", "world_size": 4, "layout": {"data": 2}}, *events):
        whole.folder.events.write(**event)
    return whole


def test_of_faults_in_succession_each_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "ending", lambda folder: GOOD)
    first = {"event": "failure", "rank": 3, "cause": "rank 3 was ended by SIGKILL", "step": 5}
    second = {"event": "failure", "rank": 0, "cause": "rank 0 was ended by SIGKILL", "step": 5}
    resume = {"event": "resume", "step": 4}
    both = judge(SCENARIOS["kill-restart"], _events(tmp_path, first, second, resume), GOOD)
    assert both.passed and both.culprit == f"{first['cause']}, then {second['cause']}"
    one = judge(SCENARIOS["kill-restart"], _events(tmp_path, first, resume), GOOD)
    assert one.problems == ["the culprit was not named"]
    at_once = judge(SCENARIOS["kill-two"], _events(tmp_path, first, resume), GOOD)
    assert at_once.passed, "of two at once the launcher sees one end first"


@pytest.mark.parametrize(
    ("name", "place", "what"),
    [("lose-node", 1, "was lost"), ("lose-node-store", 0, "was lost"), ("partition", 1, "was cut off")],
)
def test_a_lost_node_has_to_be_named(
    name: str, place: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "ending", lambda folder: GOOD)
    lost = {"event": "failure", "rank": None, "node": place, "cause": f"node {place} (host) {what}", "step": 5}
    resume = {"event": "resume", "step": 5}
    good = judge(SCENARIOS[name], _events(tmp_path, lost, resume), GOOD)
    assert good.passed and good.culprit == lost["cause"]
    for wrong in ({"node": 1 - place}, {"rank": 3 * place, "cause": "rank 3 was ended by SIGKILL"}):
        found = judge(SCENARIOS[name], _events(tmp_path, {**lost, **wrong}, resume), GOOD)
        assert found.problems == ["the culprit was not named"]


def test_a_run_that_was_to_shrink_has_to_and_to_grow_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "ending", lambda folder: GOOD)
    whole, half = ({"layout": {"data": data}, "world_size": 2 * data} for data in (2, 1))
    lost = {"event": "failure", "rank": None, "node": 1, "cause": "node 1 (host) was lost", "step": 3}
    smaller = [{"event": "start", **half}, {"event": "resume", "step": 2}]
    grown = [{"event": "start", **whole}, {"event": "resume", "step": 6}]
    for events, problems in (
        ([lost, *smaller, *grown], []),
        ([lost, *smaller], ["it never trained with all nodes again"]),
        ([lost, {"event": "resume", "step": 2}], ["it never trained with fewer nodes"]),
    ):
        evidence = _events(tmp_path, *events)
        assert judge(SCENARIOS["shrink"], evidence, GOOD).problems == problems
    evidence = _events(tmp_path, lost, {"event": "start", **half}, *smaller, *grown)
    taken = [layout["data"] for layout in drive.layouts(evidence.folder).values()]
    assert taken == [2, 2, 1, 1, 1, 1, 2, 2], "as the steps that count were taken, and no others"


def test_a_slow_rank_has_to_be_named_alone_and_the_run_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "ending", lambda folder: GOOD)
    scenario = SCENARIOS["slow-2x"]
    slow = {"event": "slow rank", "rank": 3, "times": 2.04}
    good = judge(scenario, _events(tmp_path, slow), GOOD)
    assert good.passed and (good.culprit, good.lost_steps) == ("rank 3 is slow: 2.0 times", 0)
    assert judge(scenario, _events(tmp_path), GOOD).problems == ["the culprit was not named"]
    two = judge(scenario, _events(tmp_path, slow, {**slow, "rank": 1}), GOOD)
    assert two.problems == ["rank 1 was called slow, too"]
    killed = {"event": "failure", "rank": 3, "cause": "ended as it hung", "step": 6}
    back = judge(scenario, _events(tmp_path, slow, killed, {"event": "resume", "step": 4}), GOOD)
    assert back.problems == ["2 steps were lost, of 0 at most"]


def test_shared_memory_that_outlives_all_processes_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock between processes, whose owner and whose tracker are killed."""
    monkeypatch.setattr(drive, "END_SECONDS", 0.2)
    code = "import multiprocessing as m, time; lock = m.get_context('spawn').Lock(); print(flush=True); time.sleep(60)"
    plan = Plan(tmp_path / "drill" / "plan.json")
    with Drive(drive.drilled(load(drill.DEFAULT, drill.SHRUNK), plan.file.with_name("run")), plan) as mine:
        environment = {**os.environ, PLAN: str(plan.file)}
        with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None and owner.stdout.readline() == b"\n"
            (segment,) = segments_of(owner.pid)
            mine._note_segments()
            (tracker,) = psutil.Process(owner.pid).children()
            tracker.suspend()  # or it may remove the segment before it is killed itself
            assert f"segment {segment.name}" in mine.leftovers() and not segment.exists()
        assert mine.leftovers() == [] and segments_of(owner.pid) == set()


def test_only_the_drills_own_processes_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "END_SECONDS", 0.2)
    config = load(drill.DEFAULT, drill.SHRUNK)
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]

    def started(plan: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(sleep, env={**os.environ, PLAN: str(plan)}, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        return process

    plan = Plan(tmp_path / "drill" / "plan.json")
    with Drive(drive.drilled(config, plan.file.with_name("run")), plan) as mine:
        own, other = started(mine.plan.file), started(tmp_path / "plan.json")
        try:
            (mine.temporary / "forgotten").touch()
            assert mine.leftovers() == [f"process {own.pid}", "forgotten"]
            assert not psutil.pid_exists(own.pid)
            assert psutil.Process(other.pid).is_running() and other.poll() is None
            assert mine.leftovers() == []
            interrupted = started(mine.plan.file)
        finally:
            other.kill()
            other.wait()
    assert not psutil.pid_exists(interrupted.pid)
