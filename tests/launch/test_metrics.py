"""What a run writes down and shows: each step once, each event whole, and a view that leaves the terminal as it was."""

import io
import json
import math
import re
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.invocation import ELSEWHERE, Invocation
from launch.metrics import EventLog, LiveView, MetricsLog, median, print_summary
from launch.whole_file import write_whole


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_step_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1, "loss": 0.1 + 0.2})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line) == {"step": 1, "loss": 0.1 + 0.2}


@given(written=st.integers(0, 12), resumed=st.integers(0, 12), torn=st.booleans())
def test_each_step_appears_once_however_often_a_run_resumes(
    tmp_path_factory: pytest.TempPathFactory, written: int, resumed: int, torn: bool
) -> None:
    resumed = min(resumed, written)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, written + 1):
            log.append({"step": step})
    if torn:
        with path.open("a") as file:
            file.write('{"step": 99, "lo')
    with MetricsLog(path, resumed_step=resumed) as log:
        for step in range(resumed + 1, 15):
            log.append({"step": step})
        assert [entry["step"] for entry in log.entries()] == list(range(1, 15))
    assert steps_in(path) == list(range(1, 15))


def test_resuming_keeps_the_numbers_of_earlier_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": 1 / 3, "experts": [1.5, 2.0]})
    before = path.read_bytes()
    MetricsLog(path, resumed_step=1).close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "damage", ['{"loss": 3.5}', '{"step": "2"}', "[2]", "3", "null", "[" * 100_000, "\\", '{"step"']
)
def test_a_line_that_is_no_step_is_dropped_on_resuming(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + damage + '\n{"step": 2}\n')
    with MetricsLog(path, resumed_step=2) as log:
        assert [entry["step"] for entry in log.entries()] == [1, 2]
    assert steps_in(path) == [1, 2]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            write_whole(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_number_that_json_has_no_word_for_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1, "loss": math.nan, "parts": {"main": math.inf}})
    assert '"loss": null, "parts": {"main": null}' in (tmp_path / "metrics.jsonl").read_text()


def test_events_carry_their_time_and_survive_a_torn_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("start", world_size=8)
    with log.path.open("a") as file:
        file.write('{"time": "2')
    EventLog(log.path).write("resume", step=5)
    start, resume = log.entries()
    assert (start["event"], start["world_size"]) == ("start", 8)
    assert (resume["event"], resume["step"]) == ("resume", 5)
    assert start["time"].endswith("+00:00") and start["time"] <= resume["time"]


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def watch(view: LiveView, clock: Clock, steps: range, seconds_per_step: float) -> None:
    with view:
        for step in steps:
            clock.seconds += seconds_per_step
            numbers = {"loss": 5.5 / step, "grad_norm": 1.25, "tokens_per_second": 12345.6}
            view.update(step, **numbers, expert_load=1.5, hidden=0.927)


def test_without_a_terminal_it_prints_the_first_step_some_and_the_last() -> None:
    out, clock = io.StringIO(), Clock()
    view = LiveView(20, console=Console(file=out, width=40), interval_seconds=5, clock=clock)
    watch(view, clock, range(1, 21), seconds_per_step=2)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "4/20", "7/20", "10/20", "13/20", "16/20", "19/20", "20/20"]
    assert lines[0] == (
        "step 1/20  loss 5.5000  12,346 tokens/s  gradient norm 1.250  expert load 1.50x mean  dispatch 93% hidden  "
        "0:00:38 left"
    )
    assert lines[-1].endswith("0:00:00 left")


def test_time_left_counts_only_the_steps_of_this_start() -> None:
    out, clock = io.StringIO(), Clock()
    view = LiveView(100, start=90, console=Console(file=out), clock=clock)
    watch(view, clock, range(91, 92), seconds_per_step=3)
    assert "0:00:27 left" in out.getvalue()


def test_quiet_prints_nothing() -> None:
    for terminal in (False, True):
        out, clock = io.StringIO(), Clock()
        view = LiveView(3, quiet=True, console=Console(file=out, force_terminal=terminal), clock=clock)
        watch(view, clock, range(1, 4), seconds_per_step=9)
        view.message("unheard")
        assert out.getvalue() == ""


SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def test_ctrl_c_passes_through_and_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=20)
    with pytest.raises(KeyboardInterrupt), LiveView(3, console=console) as view:
        view.update(1, loss=2.5, grad_norm=0.5, tokens_per_second=10.0)
        view.message("a checkpoint was written")
        raise KeyboardInterrupt
    text = out.getvalue()
    assert HIDE_CURSOR in text and text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR)
    assert "1/3" in text and "loss 2.5000" in text and "a checkpoint was written" in text


def entries(*losses: float | None) -> list[dict[str, object]]:
    return [
        {"step": step, "loss": loss, "step_seconds": float(seconds), "tokens_per_second": 4096.0 / seconds}
        for step, (loss, seconds) in enumerate(zip(losses, (9, 2, 3, 2, 2), strict=False), start=1)
    ]


def summary(lines: list[dict[str, object]], **changes: object) -> str:
    out = io.StringIO()
    options = {"validation_bits_per_byte": 2.345, "run_dir": "runs/a b", "config_path": "configs/x.yaml"}
    options = {**options, "invocation": Invocation("bin/dualpipe train"), **changes}
    print_summary(lines, console=Console(file=out, width=30), **options)
    return out.getvalue()


def test_the_summary_tells_what_came_of_it_and_what_to_run_next() -> None:
    text = summary(entries(5.5, 4.0, 3.0, 2.0, 1.25), overrides=["train.steps=5", "layout.data=2", "run.dir=runs/a b"])
    assert "5.5000 at step 1, 1.2500 at step 5" in text
    assert "2.3450 bits per byte" in text
    assert "2.000 s (median)" in text and "2,048 tokens/s" in text
    command = "bin/dualpipe train configs/x.yaml layout.data=2 'run.dir=runs/a b' train.steps=10"
    assert command in text.splitlines()[-1]
    elsewhere = summary(entries(5.5), invocation=Invocation("dualpipe train --nnodes 2", ELSEWHERE))
    assert elsewhere.splitlines()[-1].endswith("configs/x.yaml 'run.dir=runs/a b' train.steps=2" + ELSEWHERE)
    assert "give the same command with train.steps=2" in summary(entries(5.5), invocation=None)


def test_the_summary_has_the_loss_of_multi_token_prediction_where_there_is_one() -> None:
    lines = [{**entry, "mtp_loss": 2 * entry["loss"]} for entry in entries(3.0, 2.0)]
    assert re.search(r"mtp loss +6\.0000 at step 1, 4\.0000 at step 2\n", summary(lines))
    assert "mtp loss" not in summary(entries(3.0, 2.0))


def test_the_summary_of_a_run_without_numbers_still_says_where_it_is() -> None:
    assert "runs/a b" in summary([], validation_bits_per_byte=None)
    assert "not finite" in summary(entries(5.5, None))
    assert "not finite at step 1" in summary([{"step": 1}], validation_bits_per_byte=None)
    assert median([{"step": 1}, {"step": 2, "loss": 3}], "loss") == 3
    assert median([{"step": 1}], "loss") is None
