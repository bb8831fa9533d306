"""The validator: it passes what is right, catches every single fault, and tells transports apart."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
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
    Slot,
    Step,
    Wait,
    computed,
    dump,
    dump_slot,
    parse,
)
from dualpipe.progress import Progress
from dualpipe.schedules import generate
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.forward import forward_only
from dualpipe.simulate import simulate
from dualpipe.validate import Transport, validate, validate_order
from tests.dualpipe.test_schedules import draw_order

BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
VICTIMS = {
    "dualpipe 1x2": lower(dualpipe(1, 2)),
    "dualpipe 2x4": lower(dualpipe(2, 4)),
    "dualpipe 4x8": lower(dualpipe(4, 8)),
    "dualpipe 4x8, no step": lower(dualpipe(4, 8), window=1, training=False),
    "forward 4x4": lower(forward_only(dualpipe(4, 8), 4)),
    "forward 2x3, two stages a rank": lower(forward_only(generate("zbv", 2, 3), 3)),
    "1f1b 3x4": lower(generate("1f1b", 3, 4)),
    "interleaved 2x4": lower(generate("interleaved", 2, 4)),
    "zb1p 3x3": lower(generate("zb1p", 3, 3)),
    "zbv 2x3": lower(generate("zbv", 2, 3)),
    "dualpipev 2x4": lower(generate("dualpipev", 2, 4)),
    "one direction, two stages a rank": lower(
        parse(
            "program v stages=4 microbatches=2 routes=0,1,1,0\n"
            "0: F0.0 F0.1 F3.0 B3.0 F3.1 I3.1 W3.1 B0.0 I0.1 W0.1\n"
            "1: F1.0 F2.0 F1.1 F2.1 B2.0 I1.0 B2.1 W1.0 B1.1\n"
        )
    ),
}


def with_row(program: Program, rank: int, row: list[Slot]) -> Program:
    slots = (*program.slots[:rank], tuple(row), *program.slots[rank + 1 :])
    return Program(program.schedule, program.microbatches, program.routes, slots)


def moved(row: list[Slot], source: int, target: int) -> list[Slot]:
    row = [*row]
    row.insert(target, row.pop(source))
    return row


def needs(slot: Slot, earlier: Slot) -> bool:
    """Whether ``slot`` must come after ``earlier`` on the same rank."""
    before = {(c.op, c.work) for c in computed(earlier)}
    match slot:
        case Compute() | Overlap():
            for c in computed(slot):
                kind = Kind.ACTIVATION if c.op is Op.FORWARD else Kind.GRADIENT
                arrival = isinstance(earlier, Wait) and earlier.message == Message(kind, c.work)
                if arrival and c.op is not Op.BACKWARD_WEIGHT:
                    return True
                needed = Op.BACKWARD_INPUT if c.op is Op.BACKWARD_WEIGHT else Op.FORWARD
                if c.op is not Op.FORWARD and (needed, c.work) in before:
                    return True
            return False
        case Send(message, _):
            step, ops = (-1, (Op.FORWARD,)) if message.kind is Kind.ACTIVATION else (1, BACKWARDS[:2])
            stage = message.work.stage + step
            return any(op in ops and (w.stage, w.microbatch) == (stage, message.work.microbatch) for op, w in before)
        case Wait(message, _):
            return isinstance(earlier, Receive) and earlier.message == message
        case Free(work):
            return any(w == work for _, w in before)
        case Reduce(stage):
            return any(w.stage == stage and op in (Op.BACKWARD, Op.BACKWARD_WEIGHT) for op, w in before)
        case Step():
            return isinstance(earlier, Reduce)
        case Gather():
            return isinstance(earlier, Step)
        case Receive():
            return False
        case _:
            raise AssertionError(slot)


def removals(row: list[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    for i, slot in enumerate(row):
        yield f"without {dump_slot(slot)}", row[:i] + row[i + 1 :]
        if isinstance(slot, Wait):
            receive = Receive(slot.message, slot.peer)
            yield f"without {dump_slot(slot)} and its receive", [s for s in row if s not in (slot, receive)]


def duplicates(row: list[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    for i, slot in enumerate(row):
        yield f"twice {dump_slot(slot)}", [*row[: i + 1], *row[i:]]
        yield f"again at the end {dump_slot(slot)}", [*row, slot]


def swaps(row: list[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    """Two messages of one channel in each other's place."""
    for i, slot in enumerate(row):
        if not isinstance(slot, Send | Receive | Wait):
            continue
        for j in range(i + 1, len(row)):
            other = row[j]
            same = isinstance(other, Send | Receive | Wait) and type(other) is type(slot) and other.peer == slot.peer
            if same and other.message.kind is slot.message.kind:
                mutant = [*row]
                mutant[i], mutant[j] = other, slot
                yield f"{dump_slot(slot)} and {dump_slot(other)} swapped", mutant


def moves(row: list[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    """A slot before the last of those it needs."""
    for j, slot in enumerate(row):
        before = [i for i in range(j) if needs(slot, row[i])]
        if before:
            yield f"{dump_slot(slot)} before {dump_slot(row[before[-1]])}", moved(row, j, before[-1])


def strangers(row: list[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    """A message with the wrong peer, an operation of another stage or micro-batch."""
    for i, slot in enumerate(row):
        text = dump_slot(slot)
        match slot:
            case Send(message, peer) | Receive(message, peer) | Wait(message, peer):
                for other in (peer + 1, peer - 1):
                    yield f"{text} with peer {other}", [*row[:i], type(slot)(message, other), *row[i + 1 :]]
            case Compute(op, work):
                for stage, microbatch in (
                    (work.stage + 1, work.microbatch),
                    (work.stage, work.microbatch + 1),
                    (99, 0),
                ):
                    mutant = Compute(op, type(work)(stage, microbatch))
                    yield f"{text} as {dump_slot(mutant)}", [*row[:i], mutant, *row[i + 1 :]]


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_right_program_passes(victim: str) -> None:
    validate(VICTIMS[victim])


FAULTS = [removals, duplicates, swaps, moves, strangers]


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_every_single_fault_is_caught(victim: str, faults) -> None:
    program, survivors, tried = VICTIMS[victim], [], 0
    for rank in range(program.ranks):
        for fault, row in faults(list(program.slots[rank])):
            tried += 1
            try:
                validate(with_row(program, rank, row))
            except ProgramError as error:
                assert str(error).startswith("rank ")
            else:
                survivors.append((rank, fault))
    assert not survivors
    assert tried or (program.ranks == 1 and faults is swaps)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_fault_in_a_program_of_any_size_is_caught(data: st.DataObject) -> None:
    order, window = draw_order(data), data.draw(st.integers(1, 3), "window")
    program = lower(order, window, data.draw(st.booleans(), "training"))
    rank = data.draw(st.integers(0, program.ranks - 1), "rank")
    # One rank's only backward left out: not a fault, but the evaluation of that micro-batch, slot by slot.
    whole = lower(forward_only(order, order.microbatches), window, training=False).slots
    mutants = [mutant for faults in FAULTS for mutant in faults(list(program.slots[rank]))]
    mutants = [mutant for mutant in mutants if with_row(program, rank, mutant[1]).slots != whole]
    for _, row in data.draw(st.lists(st.sampled_from(mutants), min_size=5, max_size=5), "faults"):
        for judge in (validate, lambda p: simulate(p, Costs())):
            with pytest.raises(ProgramError, match=r"^rank "):
                judge(with_row(program, rank, row))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_ends_on_rendezvous_ends_on_the_other_transports(data: st.DataObject) -> None:
    """A slot moved anywhere: the validator plays rendezvous only, and must not miss what another would find."""
    program = lower(draw_order(data, most_ranks=4))
    rank = data.draw(st.integers(0, program.ranks - 1), "rank")
    places = st.integers(0, len(program.slots[rank]) - 1)
    program = with_row(program, rank, moved(list(program.slots[rank]), data.draw(places), data.draw(places)))
    ends = {}
    for transport in Transport:
        try:
            Progress(program, transport, Costs()).play()
        except ProgramError:
            ends[transport] = False
        else:
            ends[transport] = True
    assert (ends[Transport.EAGER] and ends[Transport.STREAM]) or not ends[Transport.RENDEZVOUS]


HEAD = "program pair stages=2 microbatches=2 routes=0,1/1,0\n"


@pytest.mark.parametrize(
    ("rows", "blocking"),
    [
        # Each rank sends before it has posted: only a buffer lets both go on.
        (
            "0: F0.0 send:A1.0>1 free:0.0 recv:A1.1<1 wait:A1.1<1 F1.1 free:1.1\n"
            "1: F0.1 send:A1.1>0 free:0.1 recv:A1.0<0 wait:A1.0<0 F1.0 free:1.0\n",
            {Transport.RENDEZVOUS},
        ),
        # Each rank wants the other's tensor first.
        (
            "0: recv:A1.1<1 wait:A1.1<1 F1.1 free:1.1 F0.0 send:A1.0>1 free:0.0\n"
            "1: recv:A1.0<0 wait:A1.0<0 F1.0 free:1.0 F0.1 send:A1.1>0 free:0.1\n",
            set(Transport),
        ),
        (
            "0: recv:A1.1<1 F0.0 send:A1.0>1 free:0.0 wait:A1.1<1 F1.1 free:1.1\n"
            "1: F0.1 recv:A1.0<0 send:A1.1>0 free:0.1 wait:A1.0<0 F1.0 free:1.0\n",
            set(),
        ),
    ],
)
def test_deadlock_depends_on_the_transport(rows: str, blocking: set[Transport]) -> None:
    program = parse(HEAD + rows)
    for transport in Transport:
        if transport in blocking:
            with pytest.raises(ProgramError, match=f"rank 0, slot .*deadlock on {transport.value} .*2 of 2 ranks"):
                Progress(program, transport, Costs()).play()
        else:
            Progress(program, transport, Costs()).play()
    if blocking:
        with pytest.raises(ProgramError, match="deadlock"):
            validate(program)
    else:
        validate(program)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("send:A1.1>1 ", "", r"rank 0, slot \d+ \(end\): send:A1.1>1 is missing"),
        ("wait:A1.2<1 ", "", r"rank 0, slot 6 \(F1.2\): its input A1.2 has not been waited for"),
        ("recv:A1.2<1 recv:A1.3<1", "recv:A1.3<1 recv:A1.2<1", r"rank 0, slot 0 \(recv:A1.3<1\): message 0 .* is A1.2"),
        (
            "B1.2 send:G0.2>1 free:1.2",
            "free:1.2 B1.2 send:G0.2>1",
            r"rank 0, slot \d+ \(free:1.2\): .*before the backw",
        ),
        ("I0.1 W0.1 free:0.1", "I0.1 free:0.1", r"rank 0, slot \d+ \(free:0.1\)"),
        ("F0.0 send:A1.0>1", "send:A1.0>1 F0.0", r"rank 0, slot 4 \(send:A1.0>1\): A1.0 is not made yet"),
        ("gather:1 gather:0", "gather:0 gather:1", r"rank 1, slot \d+ \(gather:1\): rank 0 starts gather:0 first"),
        (" step gather:1 gather:0", "", r"rank 0, slot \d+ \(end\): step is missing"),
        ("F1.3&B0.0", "F1.3&B1.3", "different micro-batches"),
        ("F0.0 send:A1.0>1", "F0.0 send:A1.0>1 send:A1.0>1", r"slot 6 \(send:A1.0>1\): A1.0 is sent a second time"),
        ("send:G0.2>1 free:1.2", "free:1.2 send:G0.2>1", "sends G0.2 after 1.2, which made it, was freed"),
        ("send:A1.0>1", "send:A1.0>0", r"slot 5 \(send:A1.0>0\): A1.0 is needed on rank 1"),
        ("F0.0 send:A1.0>1", "F1.0 F0.0 send:A1.0>1", r"slot 4 \(F1.0\): stage 1 of micro-batch 0 is on rank 1"),
        ("step gather:1", "step gather:7 gather:1", r"\(gather:7\): the rank does not hold stage 7"),
        ("recv:A1.2<1", "recv:A1.2<0", r"slot 0 \(recv:A1.2<0\): A1.2 is made on rank 1"),
        ("recv:A1.2<1", "recv:A1.2<1 recv:A1.2<1", r"slot 1 \(recv:A1.2<1\): .* is posted a second time"),
        ("recv:A1.2<1 ", "", r"\(wait:A1.2<1\): the receive of A1.2 is not posted"),
        ("wait:A1.2<1", "wait:A1.2<0", r"\(wait:A1.2<0\): the receive of A1.2 is posted from another rank"),
        (" reduce:1", "", r"\(step\): comes before reduce:1"),
        ("free:0.1 reduce:0", "reduce:0", r"\(end\): free:0.1 is missing"),
        ("free:0.1 reduce:0", "reduce:0 B0.1 free:0.1", "a second backward of 0.1"),
    ],
)
def test_a_fault_is_named(old: str, new: str, words: str) -> None:
    lines = dump(lower(dualpipe(2, 4))).split("\n")
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new)
    with pytest.raises(ProgramError, match=words):
        validate(parse("\n".join(lines)))


def test_ranks_with_two_stages_in_common_reduce_them_in_one_order() -> None:
    lines = dump(lower(dualpipe(2, 4))).split("\n")
    head, _, tail = lines[1].partition(" reduce:1")
    lines[1] = head + tail.replace("reduce:0", "reduce:0 reduce:1")
    with pytest.raises(ProgramError, match=r"rank 1, slot \d+ \(reduce:1\): rank 0 starts reduce:0 first"):
        validate(parse("\n".join(lines)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("program p stages=1 microbatches=0 routes=0\n0:\n", "0 micro-batches on 1 routes: each needs one"),
        ("program p stages=2 microbatches=1 routes=0,1/1,0\n0:\n1:\n", "1 micro-batches on 2 routes: each needs one"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 free:0.0 step\n", r"\(step\): comes before reduce:0"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 free:0.0 reduce:0\n", "has no gradients"),
        ("program p stages=1 microbatches=2 routes=0\n0: F0.0 free:0.0\n", r"slot 2 \(end\): F0.1 is missing"),
        ("program p stages=1 microbatches=2 routes=0\n0: F0.0 B0.0 free:0.0 F0.1\n", r"\(end\): B0.1 is missing"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 I0.0\n", r"\(end\): W0.0 is missing"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 recv:A0.0<0 free:0.0\n", "no stage -1"),
    ],
)
def test_odd_programs_are_refused(text: str, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        validate(parse(text))


def test_a_receive_that_nothing_waits_for_is_named() -> None:
    program = lower(forward_only(dualpipe(2, 4), 2))
    lines = dump(program).split("\n")
    lines[1] += " recv:G0.0<1"
    with pytest.raises(ProgramError, match=r"rank 0, slot \d+ \(end\): wait:G0.0<1 is missing"):
        validate(parse("\n".join(lines)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 F1.1 B1.0\n", r"rank 1, slot 3 \(end\): B1.1 is missing"),
        ("0: F0.0 F0.1 I0.0 B0.1\n1: F1.0 F1.1 B1.0 B1.1\n", r"rank 0, slot 4 \(end\): W0.0 is missing"),
        ("0: F0.0 F0.1 B0.0\n1: F1.0 F1.1 B1.0 B0.1\n", r"rank 0, slot 3 \(end\): B0.1 is missing"),
        ("0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.1 F1.1 B1.0\n", r"rank 1, slot 1 \(B1.1\): comes before its forward F1.1"),
        ("0: F0.0 W0.0 F0.1 I0.0 B0.1\n1: F1.0 F1.1 B1.0 B1.1\n", r"rank 0, slot 1 \(W0.0\): comes before I0.0"),
        ("0: F0.0 F0.1 F0.0\n1: F1.0 F1.1\n", r"rank 0, slot 2 \(F0.0\): F0.0 is done a second time"),
        ("0: F0.0 send:A1.0>1 F0.1\n1: F1.0 F1.1\n", r"rank 0, slot 1 \(send:A1.0>1\): is not compute order"),
        (
            "0: F0.0 B0.0 F0.1 B0.1\n1: F1.0 F1.1 B1.0 B1.1\n",
            r"rank 0, slot 1 \(B0.0\): deadlock: needs G0.0, and rank 1 stands at slot 1 \(F1.1\); 2 of 2 ranks",
        ),
        ("0: F0.0 F0.1\n1: F1.0 F1.1\n2:\n", "rank 2 is on no route"),
    ],
)
def test_a_fault_in_compute_order_is_named(rows: str, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        validate_order(parse("program two stages=2 microbatches=2 routes=0,1\n" + rows))


def test_an_input_made_later_on_the_same_rank_is_named() -> None:
    text = "program v stages=2 microbatches=1 routes=0,0\n0: F1.0 F0.0 B1.0 B0.0\n"
    with pytest.raises(ProgramError, match=r"rank 0, slot 0 \(F1.0\): its input A1.0 is not made"):
        validate_order(parse(text))
