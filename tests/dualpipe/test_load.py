"""Programs from text files: what is right is made ready to run, what is wrong is refused in one line."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.load import check_training, load
from dualpipe.lower import lower
from dualpipe.program import Compute, Op, Program, ProgramError, Work, dump, parse
from dualpipe.schedules import generate
from dualpipe.validate import validate, validate_order


def written(folder: str | Path, program: Program) -> Path:
    path = Path(folder) / "program.txt"
    path.write_text(dump(program))
    return path


@st.composite
def orders(draw: st.DrawFn) -> Program:
    """Any complete compute order that some run of the ranks could have produced, on any routes."""
    ranks, stages, microbatches = draw(st.integers(1, 3)), draw(st.integers(3, 5)), draw(st.integers(2, 5))
    rest = st.lists(st.integers(0, ranks - 1), min_size=stages - ranks, max_size=stages - ranks)
    routes = [tuple(draw(st.permutations([*range(ranks), *draw(rest)]))) for _ in range(draw(st.integers(1, 2)))]
    empty = Program("any", microbatches, tuple(routes), ((),) * ranks)
    slots: list[list[Compute]] = [[] for _ in range(ranks)]
    ready = [Compute(Op.FORWARD, Work(0, m)) for m in range(microbatches)]
    while ready:
        done = ready.pop(draw(st.integers(0, len(ready) - 1)))
        work = done.work
        slots[empty.rank_of(work)].append(done)
        match done.op:
            case Op.FORWARD if work.stage < stages - 1:
                ready.append(Compute(Op.FORWARD, Work(work.stage + 1, work.microbatch)))
            case Op.FORWARD:
                ready.append(Compute(draw(st.sampled_from([Op.BACKWARD, Op.BACKWARD_INPUT])), work))
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                if done.op is Op.BACKWARD_INPUT:
                    ready.append(Compute(Op.BACKWARD_WEIGHT, work))
                if work.stage > 0:
                    op = draw(st.sampled_from([Op.BACKWARD, Op.BACKWARD_INPUT]))
                    ready.append(Compute(op, Work(work.stage - 1, work.microbatch)))
    return Program("any", microbatches, tuple(routes), tuple(map(tuple, slots)))


@settings(max_examples=150, deadline=None)
@given(orders())
def test_any_order_that_can_run_is_made_into_a_valid_program(order: Program) -> None:
    validate_order(order)
    with tempfile.TemporaryDirectory() as folder:
        program = load(written(folder, order))
    validate(program)
    assert [[s for s in slots if isinstance(s, Compute)] for slots in program.slots] == [*map(list, order.slots)]
    check_training(program, order.ranks, order.microbatches)


@settings(max_examples=150, deadline=None)
@given(orders(), st.data())
def test_an_order_is_refused_exactly_when_it_cannot_run(order: Program, data: st.DataObject) -> None:
    """Two slots of a rank change places; with all receives posted ahead, only the order itself can block."""
    rank = data.draw(st.integers(0, order.ranks - 1))
    row = list(order.slots[rank])
    one, other = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[one], row[other] = row[other], row[one]
    slots = (*order.slots[:rank], tuple(row), *order.slots[rank + 1 :])
    order = Program(order.schedule, order.microbatches, order.routes, slots)
    verdicts = []
    for judge in (validate_order, lambda o: validate(lower(o, window=100))):
        try:
            judge(order)
        except ProgramError:
            verdicts.append(False)
        else:
            verdicts.append(True)
    assert verdicts[0] == verdicts[1]


def test_more_receives_are_posted_where_two_would_block_a_rendezvous(tmp_path: Path) -> None:
    # Both ranks send four tensors before either waits for one.
    order = parse(
        "program both stages=2 microbatches=8 routes=0,1/1,0\n"
        "0: F0.0 F0.1 F0.2 F0.3 F1.4 F1.5 F1.6 F1.7\n"
        "1: F0.4 F0.5 F0.6 F0.7 F1.0 F1.1 F1.2 F1.3\n"
    )
    with pytest.raises(ProgramError, match="deadlock on rendezvous"):
        validate(lower(order, window=2))
    assert load(written(tmp_path, order)) == lower(order, window=4)


def test_a_lowered_program_is_taken_as_it_stands(tmp_path: Path) -> None:
    program = lower(generate("zb1p", 3, 4), window=1)
    assert load(written(tmp_path, program)) == program


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("program p stages=1\n", "line 1: expected 'program NAME"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 X\n", "line 2: 'X' is not a slot"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.1 B0.1\n", "rank 0, slot 0 (F0.1): there is no stage 0 of"),
        ("program p stages=2 microbatches=1 routes=0,1\n0: F0.0\n1: F1.0 B1.0\n", "rank 0, slot 1 (end): B0.0 is mis"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 B0.0 reduce:0\n", "slot 3 (end): free:0.0 is missing"),
        (
            "program p stages=2 microbatches=1 routes=0,1\n0: F0.0 send:A1.0>1 free:0.0\n1: F1.0 free:1.0\n",
            "rank 1, slot 0 (F1.0): its input A1.0 has not been waited for",
        ),
        ("program p stages=1 microbatches=1 routes=0\n0:\n", "rank 0, slot 0 (end): F0.0 is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_path(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "program.txt"
    path.write_text(text)
    with pytest.raises(ProgramError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


def test_a_file_that_cannot_be_read_is_one_line_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"nowhere.txt: must be a readable program: No such file"):
        load(tmp_path / "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"program \xff")
    with pytest.raises(ProgramError, match=r"binary.txt: must be UTF-8 text: .* at byte 8"):
        load(tmp_path / "binary.txt")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (lower(generate("1f1b", 3, 4)), "layout.pipeline=2 must be 3, the ranks of the program 1f1b"),
        (lower(generate("1f1b", 2, 6)), r"\) = 4 must be 6, as in the program 1f1b of schedule.program"),
        (lower(generate("1f1b", 2, 4), training=False), "must have backwards and the end of a step"),
    ],
)
def test_a_program_for_other_sizes_does_not_train(program: Program, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        check_training(program, 2, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("program x stages=1 microbatches=99999999 routes=0\n0: F0.0 B0.0\n", "99999999 micro-batches need 99999999"),
        ("program x stages=1 microbatches=1 routes=0\n0: F0." + "9" * 5000 + "\n", "line 2: .* is not a slot"),
        ("program x stages=1 microbatches=" + "9" * 5000 + " routes=0\n", "line 1: expected"),
    ],
)
def test_numbers_without_measure_are_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "program.txt").write_text(text)
    with pytest.raises(ProgramError, match=words):
        load(tmp_path / "program.txt")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProgramError, match="pipe: must be a regular file"):
        load(tmp_path / "pipe")
