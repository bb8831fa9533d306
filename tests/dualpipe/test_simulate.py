"""The simulation: times worked out by hand, bounds that the report states, and what the command prints."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Free, Program, ProgramError, Work, dump, dump_slot, parse
from dualpipe.schedules.dualpipe import dualpipe, dualpipe_bubble, dualpipe_peak, forward_only
from dualpipe.simulate import simulate
from dualpipe.validate import Transport, validate
from launch.simulate import main

CHAIN = parse("program chain stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1\n")


def test_times_worked_out_by_hand() -> None:
    # Rank 1 starts when A1.0 arrives at 2 + 1; its backward ends at 3 + 2 + 5 = 10, and G0.0 arrives at 11.
    result = simulate(lower(CHAIN, training=False), Costs(2, 3, 2, message=1))
    spans = [[(dump_slot(span.slot), span.start, span.end) for span in row] for row in result.spans]
    assert spans[0] == [("F0.0", 0, 2), ("F0.1", 2, 4), ("B0.0", 11, 16), ("B0.1", 18, 23)]
    assert spans[1] == [("F1.0", 3, 5), ("B1.0", 5, 10), ("F1.1", 10, 12), ("B1.1", 12, 17)]
    assert result.makespan == 23
    assert result.busy == (14, 14)
    assert result.bubble == (9, 9)
    assert result.bubble_fraction == pytest.approx(18 / 46)
    assert result.peak_activations == (2, 1)


def test_the_end_of_the_step() -> None:
    # Rank 1's last backward ends at 9, rank 0's at 12: the step waits for rank 0's reduction, until 22.
    result = simulate(lower(CHAIN), Costs(1, 2, 1, reduce=10, step=4, gather=3))
    spans = {dump_slot(span.slot): (span.start, span.end) for span in result.spans[1]}
    assert spans["reduce:1"] == (9, 19)
    assert spans["step"] == (22, 26)
    assert spans["gather:1"] == (26, 29)
    assert result.makespan == 29
    assert result.busy == (8, 8)


def test_a_message_waits_as_its_transport_makes_it_wait() -> None:
    # Rank 1 posts A1.1 only after F1.0, which ends at 1 + 1 + 1 = 3; rank 0 could send at 2.
    program = parse("program late stages=2 microbatches=2 routes=0,1\n0: F0.0 F0.1\n1: F1.0 F1.1\n")
    lowered = lower(program, window=1)
    row = list(lowered.slots[1])
    late = next(slot for slot in row if dump_slot(slot) == "recv:A1.1<0")
    row.remove(late)
    row.insert(row.index(Free(Work(1, 0))), late)
    lowered = Program(program.schedule, 2, program.routes, (lowered.slots[0], tuple(row)))
    costs = Costs(1, 1, 1, message=1)
    ends = {transport: simulate(lowered, costs, transport).makespan for transport in Transport}
    assert ends == {Transport.EAGER: 4, Transport.RENDEZVOUS: 5, Transport.STREAM: 5}


def test_operations_count_a_pair_once() -> None:
    result = simulate(lower(dualpipe(8, 20)), Costs(1, 1, 1))
    assert result.operations[0] == {"F": 11, "B": 4, "I": 7, "W": 7, "FB": 9}
    for counts in result.operations:
        assert counts["F"] + counts["FB"] == counts["B"] + counts["I"] + counts["FB"] == 20
        assert counts["I"] == counts["W"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dualpipe_stays_within_its_closed_forms(data: st.DataObject) -> None:
    half = data.draw(st.integers(1, 6), "half the ranks")
    microbatches = 4 * half + 2 * data.draw(st.integers(0, 8), "more pairs")
    backward_input = data.draw(st.integers(0, 40), "I")
    forward, backward_weight = (data.draw(st.integers(0, backward_input), name) for name in "FW")
    backward = backward_input + backward_weight
    overlapped = data.draw(st.integers(max(forward, backward), forward + backward), "FB")
    program = lower(dualpipe(2 * half, microbatches), data.draw(st.integers(1, 3), "window"))
    validate(program)
    costs = Costs(forward, backward_input, backward_weight, overlapped=overlapped)
    result = simulate(program, costs)
    bound = dualpipe_bubble(2 * half, forward, backward_input, backward_weight, overlapped)
    assert max(result.bubble) <= bound
    assert max(result.peak_activations) <= dualpipe_peak(2 * half)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_any_costs_simulate(half: int, more: int, f: int, i: int, w: int, message: int) -> None:
    costs = Costs(f, i, w, message=message)
    for program in (dualpipe(2 * half, 4 * half + 2 * more), forward_only(2 * half, 2 + 2 * more)):
        result = simulate(lower(program), costs)
        for row, busy, bubble in zip(result.spans, result.busy, result.bubble, strict=True):
            assert busy + bubble == result.makespan
            assert bubble >= 0
            ends = [span.end for span in row]
            assert all(end <= span.start for end, span in zip(ends, row[1:], strict=False))


def test_a_program_that_cannot_go_on_is_refused() -> None:
    lines = dump(lower(dualpipe(4, 8))).split("\n")
    lines[3] = lines[3].replace("send:A3.0>3 ", "")
    with pytest.raises(ProgramError, match=r"rank 0, slot .*deadlock on eager transport: .* has not sent it"):
        simulate(parse("\n".join(lines)), Costs())


def test_costs_derive_what_is_not_given() -> None:
    assert Costs.parse("F=2,I=3,W=1") == Costs(2, 3, 1, backward=4, overlapped=6)
    assert Costs.parse("B=5, FB=4, p2p=.5") == Costs(1, 1, 1, 5, 4, message=0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F=-1", r"cost F=-1 \(forward\) must be finite and not negative"),
        ("FB=inf", r"cost FB=inf \(overlapped\)"),
        ("W=nan", "cost W=nan"),
        ("F=x", "cost F=x must be a number"),
        ("F", "cost F= must be a number"),
        ("F=1,F=2", "cost F is given twice"),
        ("BF=1", "cost 'BF=1': the keys are F, I, W, .*did you mean"),
    ],
)
def test_bad_costs_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Costs.parse(text)


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4", "--microbatches", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schedule"] == "dualpipe"
    assert (result["ranks"], result["microbatches"]) == (4, 10)
    assert (result["makespan"], result["busy"], result["bubble"]) == (32, [30] * 4, [2] * 4)
    assert result["bubble_fraction"] == pytest.approx(2 / 32)
    assert result["peak_activations"] == [5, 5, 5, 5]
    assert result["operations"][0] == {"F": 5, "B": 2, "I": 3, "W": 3, "FB": 5}


def test_the_command_prints_a_table_and_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4", "--microbatches", "10"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["rank", "stages", "F", "B", "I", "W", "FB", "busy", "bubble", "peak"]
    assert table[-1] == "dualpipe: 4 ranks, 10 micro-batches, makespan 32, bubble 6.25%"
    assert main(["--ranks", "4", "--microbatches", "10", "--text"]) == 0
    assert parse(capsys.readouterr().out) == lower(dualpipe(4, 10))


def test_the_command_counts_message_time_from_either_option(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--p2p", "0.5"], ["--cost", "F=1,I=1,W=1,FB=3,p2p=0.5"]):
        assert main(["--ranks", "4", "--microbatches", "10", "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["makespan"] > 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "3"], "layout.pipeline=3 must be 1 or even for schedule dualpipe"),
        (["--ranks", "many"], "--ranks"),
        (["--microbatches", "14"], "at least 2 x layout.pipeline (16)"),
        (["--schedule", "dualpip"], "did you mean dualpipe?"),
        (["--cost", "F=-1"], "cost F=-1"),
        (["--p2p", "-1"], "cost p2p=-1"),
        (["--jsn"], "--jsn"),
    ],
)
def test_bad_input_is_one_line_and_two(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_the_command_needs_no_torch() -> None:
    code = "import sys, launch.simulate; launch.simulate.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
