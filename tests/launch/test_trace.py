"""``run.trace=true``: what is recorded, the file, and what is made of it."""

import json
import time
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path

import pytest

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import dump, dump_slot, parse_slot
from dualpipe.schedules import generate
from dualpipe.simulate import simulate
from launch.simulate import main
from launch.trace import NAME, STEPS, Recorder, clock_ahead, document, read
from parallel.mesh import Layout
from tests.dualpipe.recordings import as_run
from tests.launch.runs import train_forked
from tests.ranks import run_ranks

PROGRAM = lower(generate("dualpipe", 4, 8))
LAYOUT = Layout(pipeline=4, data=2, expert=1)
SLOW = (5, 1, 2, PROGRAM.slots[2].index(parse_slot("F2.3&B1.5")))  # step, replica, pipeline rank, slot
SLOW_BY = 3.0  # in the unit of the costs


def write(folder: Path) -> Path:
    """A run's folder with the trace of two steps as simulated, one millisecond a unit, but for one slot."""
    run = as_run(PROGRAM, simulate(PROGRAM, Costs(2, 2, 1, overlapped=4, message=0.5, step=3)))
    ranks = []
    for rank in range(LAYOUT.world_size):
        steps = []
        for step in (4, 5):
            spans = run[LAYOUT.pipeline_index(rank)]
            times = [((span.start + 100 * step) / 1e3, (span.end + 100 * step) / 1e3) for span in spans]
            if (step, LAYOUT.data_index(rank), LAYOUT.pipeline_index(rank)) == SLOW[:3]:
                start, end = times[SLOW[3]]
                times[SLOW[3]] = start, end + SLOW_BY / 1e3
            steps.append((step, times))
        ranks.append(steps)
    (folder / NAME).write_text(json.dumps(document(PROGRAM, LAYOUT, ranks)))
    return folder


def test_a_trace_is_read_back(tmp_path: Path) -> None:
    recording = read(write(tmp_path))
    assert recording.program == PROGRAM
    assert list(recording.steps) == [4, 5]
    run = as_run(PROGRAM, simulate(PROGRAM, Costs(2, 2, 1, overlapped=4, message=0.5, step=3)))
    for step, replicas in recording.steps.items():
        assert len(replicas) == LAYOUT.data
        for executed in replicas:
            assert [[span.slot for span in spans] for spans in executed] == [list(slots) for slots in PROGRAM.slots]
            for spans, expected in zip(executed, run, strict=True):
                starts = [span.start - 100 * (step - 4) for span in spans]
                assert starts == pytest.approx([span.start for span in expected], abs=1e-5)


def test_a_trace_opens_in_a_viewer(tmp_path: Path) -> None:
    events = json.loads((write(tmp_path) / NAME).read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads[5] == "rank 5 (pipeline 2, data 1)" and len(threads) == LAYOUT.world_size
    slices = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in slices) == 0
    for rank in range(LAYOUT.world_size):
        own = [event for event in slices if event["tid"] == rank and event["args"]["step"] == 4]
        assert [event["name"] for event in own] == [dump_slot(slot) for slot in PROGRAM.slots[rank // LAYOUT.data]]
        for one, other in pairwise(own):  # or a viewer would nest them
            assert round(one["ts"] + one["dur"], 3) <= other["ts"]


def test_only_the_last_steps_are_kept() -> None:
    recorder = Recorder(PROGRAM, LAYOUT, 0)
    for step in range(1, 8):
        recorder.add(step, [], PROGRAM)
    assert [step for step, _ in recorder._steps] == list(range(8 - STEPS, 8))
    recorder.add(6, [], PROGRAM)  # of a run that went back to step 5
    assert [step for step, _ in recorder._steps] == list(range(8 - STEPS, 7))
    recorder.add(7, [], replace(PROGRAM, microbatches=PROGRAM.microbatches + 2))
    assert [step for step, _ in recorder._steps] == [7]


def ahead_of(rank: int) -> float:
    """Ranks 1 and 2 share a machine, whose clock is 1000 seconds ahead; that of rank 3 is 5 behind."""
    machine, ahead = [("a", 0.0), ("b", 1000.0), ("b", 1000.0), ("c", -5.0)][rank]
    return clock_ahead(machine, lambda: time.perf_counter() + ahead)


def test_clocks_of_other_machines_are_read() -> None:
    ahead = run_ranks(ahead_of, 4)
    assert ahead[0] == 0
    assert ahead[1:] == pytest.approx([1000, 1000, -5], abs=0.05)
    assert ahead[1] == ahead[2]


def test_a_run_records_what_it_executes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.parent / "run"
    done = train_forked(config, "train.steps=4", "run.trace=true", "data.validation_sequences=0")
    assert done.returncode == 0, done.stderr
    recording = read(run)
    # The configuration's: two pipeline ranks, and 8 sequences over 2 replicas.
    assert dump(recording.program) == dump(lower(generate("dualpipe", 2, 4)))
    assert list(recording.steps) == [2, 3, 4]
    for _, _, executed in recording.runs():
        for spans, slots in zip(executed, recording.program.slots, strict=True):
            assert tuple(span.slot for span in spans) == slots
            assert all(one.end <= other.start + 1e-6 for one, other in pairwise(spans))
    seconds = {step["step"]: step["step_seconds"] for step in map(json.loads, (run / "metrics.jsonl").open())}
    for step, replica, executed in recording.runs():
        if replica == 0:  # whose first rank writes the metrics
            assert executed[0][-1].end - executed[0][0].start < 1e3 * seconds[step]
    assert main(["--compare-run", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["runs"], found["measured"]["schedule"]) == ([2, 3, 4], 6, "dualpipe")
    assert found["simulated"]["operations"] == found["measured"]["operations"]
    assert 0 < max(found["simulated"]["busy"]) < found["simulated"]["makespan"]


def test_the_planted_slow_slot_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path)
    files = [tmp_path / name for name in ("both.svg", "both.html", "both.json")]
    options = [f"--{path.suffix[1:].replace('json', 'trace')}={path}" for path in files]
    assert main(["--compare-run", str(run), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["differences"][0]
    slot = dump_slot(PROGRAM.slots[SLOW[2]][SLOW[3]])
    assert (first["step"], first["replica"], first["rank"], first["slot"]) == (*SLOW[:3], slot)
    assert first["world_rank"] == LAYOUT.rank(SLOW[2], SLOW[1])
    assert first["excess"] == pytest.approx(SLOW_BY, abs=1e-4)
    assert found["simulated"]["makespan"] == pytest.approx(found["measured"]["makespan"], abs=1e-3)
    assert all(f'data-slot="{escape(slot)}"' in file.read_text() for file in files[:2])
    events = json.loads(files[2].read_text())["traceEvents"]
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.split(", ")[1] for name in processes] == ["measured", "simulated"]

    assert main(["--compare-run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if slot in line.split() and "+3" in line)
    assert row[:3] == ["5", str(LAYOUT.rank(SLOW[2], SLOW[1])), slot]
    assert lines[-1].startswith("dualpipe: 4 ranks, 8 micro-batches, measured ")


def damaged(run: Path, change: object) -> None:
    found = json.loads((run / NAME).read_text())
    change(found)  # type: ignore[operator]
    (run / NAME).write_text(json.dumps(found))


def drop_a_slot(found: dict) -> None:
    found["traceEvents"].remove(next(event for event in found["traceEvents"] if event["ph"] == "X"))


def drop_a_line(found: dict) -> None:
    found["dualpipe"]["program"] = found["dualpipe"]["program"].rsplit("\n", 2)[0]


def drop_a_send(found: dict) -> None:
    found["dualpipe"]["program"] = found["dualpipe"]["program"].replace(" send:A1.0>1", "")
    found["traceEvents"] = [event for event in found["traceEvents"] if event["name"] != "send:A1.0>1"]


def negative(found: dict) -> None:
    found["traceEvents"][-1]["dur"] = -1.0


def foreign(found: dict) -> None:
    del found["dualpipe"]


def no_text(found: dict) -> None:
    found["dualpipe"]["program"] = 3


@pytest.mark.parametrize("change", [drop_a_slot, drop_a_line, drop_a_send, negative, foreign, no_text])
def test_a_damaged_trace_is_refused(change: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged(write(tmp_path), change)
    refused(tmp_path, f"error: {tmp_path / NAME} is damaged: ", capsys)


def refused(run: Path, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare-run", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(start) and error.count("\n") == 1


def test_no_run_and_no_trace_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "none", f"error: {tmp_path / 'none'} must be the folder of a run", capsys)
    refused(tmp_path, f"error: {tmp_path} has no trace.json: a run records one with run.trace=true", capsys)
    (tmp_path / NAME).write_text('{"traceEvents": [')
    refused(tmp_path, f"error: {tmp_path / NAME} is damaged: ", capsys)
    (tmp_path / NAME).write_bytes(b"\xff")
    refused(tmp_path, f"error: {tmp_path / NAME} must be readable: ", capsys)


@pytest.mark.parametrize(
    "options",
    [["--compare"], ["--cost", "F=2,I=1,W=1"], ["--p2p", "1"], ["--text"], ["--schedule", "zbv"], ["x.yaml"]],
)
def test_a_run_says_it_all(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare-run", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    name = "CONFIG" if options == ["x.yaml"] else options[0]
    assert error == f"error: --compare-run {tmp_path} and {name} exclude each other: the run says it all\n"
