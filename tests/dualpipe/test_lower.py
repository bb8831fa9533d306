"""Lowering: where messages, lifetimes and the end of the step are put."""

from collections import Counter

import pytest

from dualpipe.lower import lower
from dualpipe.program import Kind, Program, ProgramError, Receive, Send, Wait, computed, dump, dump_slot, parse
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.forward import forward_only
from dualpipe.validate import validate


def row(program: Program, rank: int) -> str:
    return " ".join(map(dump_slot, program.slots[rank]))


def test_a_whole_training_step() -> None:
    assert row(lower(dualpipe(2, 4)), 0) == (
        "recv:A1.2<1 recv:A1.3<1 recv:G0.0<1 recv:G0.1<1 "
        "F0.0 send:A1.0>1 wait:A1.2<1 F1.2 F0.1 send:A1.1>1 B1.2 send:G0.2>1 free:1.2 "
        "wait:A1.3<1 wait:G0.0<1 F1.3&B0.0 free:0.0 B1.3 send:G0.3>1 free:1.3 reduce:1 "
        "wait:G0.1<1 I0.1 W0.1 free:0.1 reduce:0 step gather:1 gather:0"
    )


def test_both_halves_of_a_pair_are_waited_for_before_it_and_sent_after_it() -> None:
    text = row(lower(dualpipe(4, 10)), 1)
    assert "wait:A2.7<2 recv:A2.9<2 wait:G1.0<2 recv:G1.2<2 F2.7&B1.0 send:A3.7>0 send:G0.0>0 free:1.0" in text


def test_one_rank_needs_no_message() -> None:
    assert row(lower(dualpipe(1, 2)), 0) == "F0.0 B0.0 free:0.0 F0.1 B0.1 free:0.1 reduce:0 step gather:0"


def test_ranks_with_two_stages_in_common_reduce_and_gather_them_in_one_order() -> None:
    program = parse(
        "program twins stages=2 microbatches=2 routes=0,1/1,0\n"
        "0: F0.0 F1.1 B1.1 B0.0\n"  # stage 1 is complete first, and waits for stage 0
        "1: F0.1 F1.0 I1.0 B0.1 W1.0\n"
    )
    lowered = lower(program)
    validate(lowered)
    assert row(lowered, 0).endswith("free:0.0 reduce:0 reduce:1 step gather:0 gather:1")
    assert row(lowered, 1).endswith("free:0.1 reduce:0 W1.0 free:1.0 reduce:1 step gather:0 gather:1")


def test_the_two_stages_at_the_turn_of_a_v_need_no_message() -> None:
    text = row(lower(generate("zbv", 2, 3)), 1)
    posts = "recv:A1.0<0 recv:A1.1<0 recv:G2.0<0 recv:G2.1<0"
    assert text.startswith(f"{posts} wait:A1.0<0 recv:A1.2<0 F1.0 F2.0 send:A3.0>0")
    assert "A2." not in text and "G1." not in text and "I1.0 send:G0.0>0" in text


def test_stages_on_one_rank_hand_over_without_a_message() -> None:
    program = parse("program v stages=2 microbatches=1 routes=0,0\n0: F0.0 F1.0 B1.0 I0.0 W0.0\n")
    lowered = lower(program)
    assert row(lowered, 0) == ("F0.0 F1.0 B1.0 free:1.0 reduce:1 I0.0 W0.0 free:0.0 reduce:0 step gather:1 gather:0")
    validate(lowered)


def test_a_forward_pass_frees_after_its_sends_and_takes_no_step() -> None:
    forward = forward_only(dualpipe(2, 4), 2)
    assert row(lower(forward), 0) == "recv:A1.1<1 F0.0 send:A1.0>1 free:0.0 wait:A1.1<1 F1.1 free:1.1"


def test_without_training_there_is_no_end_of_the_step() -> None:
    lowered = lower(dualpipe(4, 8), training=False)
    assert not any(word in dump(lowered) for word in ("reduce", "step", "gather"))
    validate(lowered)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_channel_holds_more_receives_than_its_window(schedule: str, window: int) -> None:
    lowered = lower(generate(schedule, 4, 12), window)
    validate(lowered)
    for slots in lowered.slots:
        held: Counter[tuple[int, Kind]] = Counter()
        full: set[tuple[int, Kind]] = set()
        computing = False
        for slot in slots:
            computing = computing or bool(computed(slot))
            match slot:
                case Receive(message, peer):
                    held[peer, message.kind] += 1
                    full |= {(peer, message.kind)} if not computing and held[peer, message.kind] == window else set()
                case Wait(message, peer):
                    held[peer, message.kind] -= 1
            assert all(count <= window for count in held.values())
        assert full == set(held)  # each filled its window before the first computing slot


def test_receives_follow_the_sender_when_the_receiver_wants_another_order() -> None:
    program = parse(
        "program crossed stages=2 microbatches=4 routes=0,1\n"
        "0: F0.0 F0.1 F0.2 F0.3 B0.3 B0.1 B0.2 B0.0\n"
        "1: F1.2 F1.3 F1.0 F1.1 B1.0 B1.1 B1.2 B1.3\n"
    )
    for window in (1, 2, 4):
        lowered = lower(program, window)
        validate(lowered)
        sent = [slot.message for slot in lowered.slots[0] if isinstance(slot, Send)]
        assert [slot.message for slot in lowered.slots[1] if isinstance(slot, Receive)] == sent
    # With one buffer, A1.2 can only arrive once those before it have theirs; then none is posted until it must be.
    assert row(lower(program, 1), 1).startswith(
        "recv:A1.0<0 recv:A1.1<0 recv:A1.2<0 wait:A1.2<0 F1.2 recv:A1.3<0 wait:A1.3<0 F1.3 wait:A1.0<0 F1.0 wait:A1.1<0"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0: F0.0 B0.0\n1: F1.0 F1.1 B1.0\n", "rank 1 needs A1.1, which rank 0 never makes"),
        ("0: F0.0 F0.1 B0.0\n1: F1.0 B1.0\n", "rank 0 makes A1.1, which rank 1 never uses"),
        ("0: F0.0 F0.0 B0.0\n1: F1.0 B1.0\n", "there twice"),
        ("0: F0.0 F1.1 B0.0\n1: F1.0 B1.0\n", r"rank 0, slot 1 \(F1.1\): stage 1 of micro-batch 1 is not on this rank"),
        ("0: F0.0 B0.7\n1: F1.0 B1.0\n", r"rank 0, slot 1 \(B0.7\): stage 0 of micro-batch 7 is not on this rank"),
        ("0: F0.0 send:A1.0>1 B0.0\n1: F1.0 B1.0\n", r"rank 0, slot 1 \(send:A1.0>1\): not compute order"),
    ],
)
def test_an_order_without_matching_messages_is_refused(rows: str, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        lower(parse("program broken stages=2 microbatches=2 routes=0,1\n" + rows))


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        lower(dualpipe(2, 4), 0)
