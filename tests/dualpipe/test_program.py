"""The text form of a program: it comes back as it went, and nothing else is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.lower import lower
from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Kind,
    Message,
    Op,
    Overlap,
    Program,
    ProgramError,
    Receive,
    Reduce,
    Send,
    Step,
    Wait,
    Work,
    dump,
    parse,
)
from dualpipe.schedules import generate
from dualpipe.schedules.forward import forward_only

DUALPIPE = generate("dualpipe", 4, 10)
HEAD = "program dualpipe stages=2 microbatches=4 routes=0,1/1,0\n"

numbers = st.integers(0, 1000)
works = st.builds(Work, numbers, numbers)
messages = st.builds(Message, st.sampled_from(Kind), works)
slots = st.one_of(
    st.builds(Compute, st.sampled_from(Op), works),
    st.builds(Overlap, works, works),
    st.builds(Send, messages, numbers),
    st.builds(Receive, messages, numbers),
    st.builds(Wait, messages, numbers),
    st.builds(Free, works),
    st.builds(Reduce, numbers),
    st.builds(Step),
    st.builds(Gather, numbers),
)


@given(st.lists(st.lists(slots, max_size=6).map(tuple), min_size=2, max_size=4).map(tuple))
def test_any_slots_come_back_from_their_text(rows: tuple[tuple, ...]) -> None:
    program = Program("1-any_name", 4, ((0, 1), (1, 0)), rows)
    assert parse(dump(program)) == program


@pytest.mark.parametrize("program", [generate("1f1b", 1, 3), DUALPIPE, forward_only(DUALPIPE, 6)])
def test_whole_programs_come_back_from_their_text(program: Program) -> None:
    assert parse(dump(program)) == program
    assert parse(dump(lower(program))) == lower(program)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("schedule dualpipe\n", 1),
        ("program -dualpipe stages=1 microbatches=4 routes=0\n0:\n", 1),
        ("program dualpipe stages=2 microbatches=04 routes=0,1\n0:\n1:\n", 1),
        ("program dualpipe stages=3 microbatches=4 routes=0,1/1,0\n0:\n1:\n", 1),
        (HEAD + "0: F0.0\n", 3),
        (HEAD + "0: F0.0\n2: F0.0\n", 3),
        (HEAD + "0: F0.0\n1 F0.0\n", 3),
        (HEAD + "0: F0.0  F0.1\n1:\n", 2),
        (HEAD + "0: F0.0 \n1:\n", 2),
        (HEAD + "0:F0.0\n1:\n", 2),
        (HEAD + "0: F0.0\n1: F00.1\n", 3),
        (HEAD + "0: X0.0\n1:\n", 2),
        (HEAD + "0: F0\n1:\n", 2),
        (HEAD + "0: B0.0&F1.1\n1:\n", 2),
        (HEAD + "0: F0.0&B1.1&B1.2\n1:\n", 2),
        (HEAD + "0: send:A1.0<1\n1:\n", 2),
        (HEAD + "0:\n1: recv:G1.0>0\n", 3),
        (HEAD + "0:\n1: wait:F1.0<0\n", 3),
        (HEAD + "0:\n1: free:1\n", 3),
        (HEAD + "0:\n1: reduce\n", 3),
        (HEAD + "0:\n1: step:0\n", 3),
        (HEAD + "0:\n1: F\u0661.0\n", 3),
    ],
)
def test_malformed_text_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ProgramError, match=f"^line {line}: "):
        parse(text)
