"""The verdict: a run that was broken has to end as the one that nobody disturbed, to the bit, with the culprit named
and nothing left behind."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from launch.drills.drive import Attempt, Evidence
from launch.drills.fault import Action
from launch.drills.scenarios import STEPS, Again, Scenario
from launch.metrics import read_jsonl
from launch.run_folder import RunFolder
from parallel.checkpoint import damage, published


@dataclass(frozen=True)
class Ending:
    """What a run came to. ``losses``: of every step, as hexadecimal; ``state``: SHA-256 over masters, moments, biases,
    RNG states and the data position in its newest checkpoint, None when that is not whole or not of the last step."""

    steps: list[int]
    losses: list[str]
    state: str | None


@dataclass
class Verdict:
    """``detected_s`` and ``recovered_s``: seconds from the fault until it was noticed, and until the first step after
    it was done; where the user starts the run again, ``recovered_s`` counts from that start, and so does
    ``detected_s`` for a damaged checkpoint. ``problems``: why it is not passed."""

    scenario: str
    bitwise_equal: bool
    culprit: str | None = None
    detected_s: float | None = None
    recovered_s: float | None = None
    lost_steps: int | None = None
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        keys = ("detected_s", "recovered_s", "lost_steps", "bitwise_equal", "culprit", "leftovers", "problems")
        return {"scenario": self.scenario, "passed": self.passed, **{key: getattr(self, key) for key in keys}}


def ending(folder: RunFolder) -> Ending:
    entries = read_jsonl(folder.metrics_file)
    newest = published(folder.checkpoints)[-1:]
    whole = bool(newest) and newest[0].name.endswith(f"{STEPS:08d}") and damage(newest[0]) is None
    losses = [float(entry["loss"]).hex() for entry in entries]
    return Ending([entry["step"] for entry in entries], losses, _state(newest[0]) if whole else None)


def judge(scenario: Scenario, evidence: Evidence, undisturbed: Ending) -> Verdict:
    """Compare a scenario's run with the one that nobody disturbed."""
    end = ending(evidence.folder)
    verdict = Verdict(scenario.name, bitwise_equal=end == undisturbed, leftovers=evidence.leftovers)
    problems = verdict.problems
    problems += _statuses(scenario, evidence.attempts)
    if None in evidence.struck:
        problems.append("the fault did not happen")
    if end.steps != list(range(1, STEPS + 1)):
        problems.append(f"the steps in its metrics are {end.steps}")
    elif end.losses != undisturbed.losses:
        first = next(step for step in end.steps if end.losses[step - 1] != undisturbed.losses[step - 1])
        problems.append(f"the losses differ from step {first}")
    if end.state is None:
        problems.append("it has no whole checkpoint of the last step")
    elif end.state != undisturbed.state:
        problems.append("the state after the last step differs")
    if evidence.leftovers:
        problems.append(f"left behind: {', '.join(evidence.leftovers)}")
    _time(verdict, scenario, evidence)
    if verdict.lost_steps is None:
        problems.append("it did not go on from a checkpoint")
    elif verdict.lost_steps > scenario.lost_steps:
        problems.append(f"{verdict.lost_steps} steps were lost, of {scenario.lost_steps} at most")
    verdict.culprit = _culprit(scenario, evidence)
    if verdict.culprit is None and scenario.interrupt is None:
        problems.append("the culprit was not named")
    return verdict


def _statuses(scenario: Scenario, attempts: list[Attempt]) -> Iterator[str]:
    """What is wrong with how the starts ended."""
    wanted = [scenario.status, 0] if scenario.again is Again.USER else [0]
    for start, (attempt, status) in enumerate(zip(attempts, wanted, strict=False), 1):
        if attempt.status is None:
            yield f"start {start} did not end in {attempt.ended - attempt.began:.0f} s"
        elif attempt.status != status:
            said = (attempt.output.strip().splitlines() or ["nothing"])[-1]
            yield f"start {start} ended with status {attempt.status}, not {status}, and said: {said}"


def _time(verdict: Verdict, scenario: Scenario, evidence: Evidence) -> None:
    """Fill in the seconds and the steps that were lost."""
    struck = min((when for when in evidence.struck if when is not None), default=None)
    first, again = evidence.attempts[0], evidence.attempts[1] if len(evidence.attempts) > 1 else None
    events = evidence.folder.events.entries()
    rolled = next((e for e in events if e.get("event") == "rollback"), None)
    resumed = next((e["step"] for e in events if e.get("event") == "resume"), None)
    noticed = {name: _when(events, name) for name in ("failure", "recovery", "skipped a checkpoint", "bad step")}
    if struck is not None:
        seen = noticed["failure"] if scenario.status in (0, 1) else first.ended
        if scenario.again is Again.NOBODY:
            seen = noticed["bad step"]
        verdict.detected_s = None if seen is None else _seconds(seen - struck)
    if again is None:
        done = next((e["step"] for e in events if e.get("event") == "failure"), None)
        if rolled is not None:
            done = rolled["step"]
        if struck is not None and noticed["recovery"] is not None:
            verdict.recovered_s = _seconds(noticed["recovery"] - struck)
    else:
        done = first.steps
        verdict.recovered_s = None if again.stepped is None else _seconds(again.stepped - again.began)
        if scenario.damage is not None:
            skipped = noticed["skipped a checkpoint"]
            verdict.detected_s = None if skipped is None else _seconds(skipped - again.began)
    if done is not None and resumed is not None:
        verdict.lost_steps = done - resumed


def _culprit(scenario: Scenario, evidence: Evidence) -> str | None:
    """Whom the run named, if that is who did it. A launcher that was ended from outside names nobody."""
    events = evidence.folder.events.entries()
    if evidence.damaged is not None:
        reasons = (e["reason"] for e in events if e.get("event") == "skipped a checkpoint")
        parts = evidence.damaged.split("/")
        return next((evidence.damaged for reason in reasons if all(part in reason for part in parts)), None)
    ranks = next((e["world_size"] for e in events if e.get("event") == "start"), 0)
    failures = [e for e in events if e.get("event") == "failure"]
    for fault in scenario.faults:
        word = fault.action.shows_as
        for bad in events if scenario.again is Again.NOBODY else ():
            owner = scenario.skips or any(fault.happens_to(rank, ranks) for rank in bad.get("ranks", []))
            if bad.get("event") == "bad step" and bad["step"] == fault.step and word in bad["why"] and owner:
                return f"{bad['why']} (step {fault.step})"
        if fault.action is Action.FULL_DISK and word in evidence.attempts[0].output:
            return f"checkpoint cannot be written: {word}"
        for failure in failures:
            if word in failure["cause"] and fault.happens_to(failure["rank"], ranks):
                return str(failure["cause"])
    return None


def _when(events: list[dict[str, Any]], name: str) -> float | None:
    """When the first event of this name was, in seconds of ``time.time``."""
    times = (datetime.fromisoformat(e["time"]).timestamp() for e in events if e.get("event") == name)
    return next(times, None)


def _seconds(duration: float) -> float:
    return round(max(0.0, duration), 2)


def _state(checkpoint: Path) -> str:
    """SHA-256 over every tensor of a checkpoint, by name, and its position in the data."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in stored.items()
        if isinstance(of, TensorStorageMetadata)
    }
    assert tensors.keys() == stored.keys(), "a checkpoint holds nothing but tensors"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
        load(tensors, checkpoint_id=checkpoint, no_dist=True)
    digest = hashlib.sha256((checkpoint / "state.json").read_bytes())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
