"""The verdict: a run that was broken has to end as the one that nobody disturbed, to the bit, with the culprit named
and nothing left behind."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from launch.drills.drive import Attempt, Evidence
from launch.drills.fault import Action, Fault
from launch.drills.scenarios import STEPS, Again, Scenario
from launch.metrics import read_jsonl
from launch.resume import STAGES
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
    """``detected_s``, ``forward_s`` and ``recovered_s``: seconds from the fault until it was noticed, until the first
    rank that was started again began a forward, and until the first step after it was done; where the user starts the
    run again, the last two count from that start, and so does ``detected_s`` for a damaged checkpoint. ``stages_s``:
    what the launcher's recovery consisted of, from ``launch.resume.STAGES``. ``problems``: why it is not passed."""

    scenario: str
    bitwise_equal: bool
    culprit: str | None = None
    detected_s: float | None = None
    forward_s: float | None = None
    recovered_s: float | None = None
    stages_s: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    lost_steps: int | None = None
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        keys = ("forward_s", "recovered_s", "lost_steps", "bitwise_equal", "culprit", "leftovers", "problems")
        return {
            "scenario": self.scenario,
            "passed": self.passed,
            "detected_s": self.detected_s,
            **{f"{stage}_s": seconds for stage, seconds in self.stages_s.items()},
            **{key: getattr(self, key) for key in keys},
        }


def ending(folder: RunFolder, steps: int = STEPS) -> Ending:
    """What a run came to whose last step was to be ``steps``."""
    entries = read_jsonl(folder.metrics_file)
    newest = published(folder.checkpoints)[-1:]
    whole = bool(newest) and newest[0].name.endswith(f"{steps:08d}") and damage(newest[0]) is None
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
    problems += _others_named(scenario, evidence)
    if scenario.returns:
        problems += _regrouped(evidence)
    return verdict


def _regrouped(evidence: Evidence) -> Iterator[str]:
    """What is wrong with the numbers of ranks of a run that was to go on with fewer, then with all again."""
    events = evidence.folder.events.entries()
    ranks = [event["world_size"] for event in events if event.get("event") == "start"]
    if not ranks or min(ranks) == ranks[0]:
        yield "it never trained with fewer nodes"
    elif ranks[-1] != ranks[0]:
        yield "it never trained with all nodes again"


def _others_named(scenario: Scenario, evidence: Evidence) -> Iterator[str]:
    """Ranks that were called slow and are not."""
    events = evidence.folder.events.entries()
    ranks = next((e["world_size"] for e in events if e.get("event") == "start"), 0)
    for event in events if any(fault.action is Action.SLOW for fault in scenario.faults) else ():
        guilty = any(fault.happens_to(event.get("rank", 0), ranks) for fault in scenario.faults)
        if event.get("event") == "slow rank" and not guilty:
            yield f"rank {event['rank']} was called slow, too"


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
    happened = [when for when in evidence.struck if when is not None]
    struck = min(happened, default=None) if scenario.interrupt is None else evidence.struck[-1]
    first, again = evidence.attempts[0], evidence.attempts[1] if len(evidence.attempts) > 1 else None
    events = evidence.folder.events.entries()
    verdict.lost_steps = _lost(scenario, evidence, events)
    if again is not None:
        verdict.recovered_s = None if again.stepped is None else _seconds(again.stepped - again.began)
        verdict.forward_s = first_after(again.began, evidence.forwards)
    elif struck is not None and scenario.again is Again.LAUNCHER:
        verdict.forward_s = first_after(struck, evidence.forwards)
        recovery = next((event for event in events if event.get("event") == "recovery"), None)
        if recovery is not None:
            verdict.recovered_s = _seconds(time_of(recovery) - struck)
            verdict.stages_s = {stage: round(seconds, 2) for stage, seconds in recovery["stages"].items()}
    elif struck is not None and (recovered := _when(events, "recovery")) is not None:
        verdict.recovered_s = _seconds(recovered - struck)
    if scenario.damage is not None:
        since, seen = None if again is None else again.began, _when(events, "skipped a checkpoint")
    elif scenario.again is Again.NOBODY:
        since, seen = struck, _when(events, "bad step") or _when(events, "slow rank")
    else:
        since, seen = struck, _noticed(events) if scenario.status in (0, 1) else first.ended
    verdict.detected_s = None if since is None or seen is None else _seconds(seen - since)


def _noticed(events: list[dict[str, Any]]) -> float | None:
    """When the first failure was. Its entry is written once all ranks have ended; the recovery from it knows better,
    where no other failure came between."""
    names = [event.get("event") for event in events]
    if names.count("failure") == 1 and "recovery" in names:
        recovery = events[names.index("recovery")]
        return time_of(recovery) - float(recovery["seconds"])
    return _when(events, "failure")


def _lost(scenario: Scenario, evidence: Evidence, events: list[dict[str, Any]]) -> int | None:
    """The most steps that were taken again after one fault; None when the run went on from nothing that was saved."""
    moments = [(time_of(e), e["event"], e) for e in events if e.get("event") in ("failure", "resume", "rollback")]
    moments += [(a.ended, "ended", {"step": a.steps}) for a in evidence.attempts[:-1]]
    done, lost = None, []
    for _, name, event in sorted(moments, key=lambda moment: moment[0]):
        match name:
            case "failure" | "ended":
                done = event["step"]
            case "resume" if done is not None:
                lost.append(done - event["step"])
                done = None
            case "rollback":
                lost.append(event["step"] - event["to"])
    if not lost and scenario.again is Again.NOBODY and scenario.lost_steps == 0 and done is None:
        return 0
    return max(lost, default=None)


def _culprit(scenario: Scenario, evidence: Evidence) -> str | None:
    """Whom the run named, if that is who did it: of faults at once, one of them. A launcher that was ended from outside
    names nobody."""
    events = evidence.folder.events.entries()
    if evidence.damaged:
        reasons = [e["reason"] for e in events if e.get("event") == "skipped a checkpoint"]
        for damaged in evidence.damaged:
            if any(all(part in reason for part in damaged.split("/")) for reason in reasons):
                return damaged
        return None
    found = []
    breaking = (fault for fault in scenario.faults if fault.action is not Action.HOLD)
    for _, at_once in groupby(breaking, key=lambda fault: fault.step):
        named = [words for fault in at_once if (words := _named(fault, scenario, evidence, events)) is not None]
        if not named:
            return None
        found.append(named[0])
    return ", then ".join(found) or None


def _named(fault: Fault, scenario: Scenario, evidence: Evidence, events: list[dict[str, Any]]) -> str | None:
    """How the run named this fault, None if it did not."""
    ranks = next((e["world_size"] for e in events if e.get("event") == "start"), 0)
    word = fault.action.shows_as
    if fault.action in (Action.FULL_DISK, Action.READ_ONLY):
        return f"checkpoint cannot be written: {word}" if word in evidence.attempts[0].output else None
    for event in events:
        match event.get("event"):
            case "bad step" if scenario.again is Again.NOBODY:
                owner = scenario.skips or any(fault.happens_to(rank, ranks) for rank in event.get("ranks", []))
                if event["step"] == fault.step and word in event["why"] and owner:
                    return f"{event['why']} (step {fault.step})"
            case "slow rank" if fault.action is Action.SLOW and fault.happens_to(event["rank"], ranks):
                return f"rank {event['rank']} is slow: {event['times']:.1f} times"
            case "failure" if fault.action in (Action.LOSE_NODE, Action.CUT) and event["rank"] is None:
                owners = range(ranks)[event["node"] * ranks // scenario.nodes :][: ranks // scenario.nodes]
                if word in event["cause"] and any(fault.happens_to(rank, ranks) for rank in owners):
                    return str(event["cause"])
            case "failure" if word in event["cause"] and fault.happens_to(event["rank"], ranks):
                return str(event["cause"])
    return None


def _when(events: list[dict[str, Any]], name: str) -> float | None:
    """When the first event of this name was, in seconds of ``time.time``."""
    return next((time_of(e) for e in events if e.get("event") == name), None)


def time_of(event: dict[str, Any]) -> float:
    """When an event was, in seconds of ``time.time``; it is written in milliseconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def first_after(since: float, moments: list[float]) -> float | None:
    """Seconds from ``since`` until the first of the moments behind it."""
    later = min((moment for moment in moments if moment > since), default=None)
    return None if later is None else _seconds(later - since)


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
