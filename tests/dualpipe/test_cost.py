"""Costs: what their text means, what is refused, and what an operation costs in a stage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.cost import Costs, CostTable
from dualpipe.overlap import PARTS, duration, pair_plan, plan
from dualpipe.program import Op
from dualpipe.schedules import generate

PROGRAM = generate("dualpipe", 4, 8)
PHASES = "attn_F=4,dispatch_F=3,mlp_F=2,combine_F=3,combine_I=3,mlp_I=2,dispatch_I=3,attn_I=5,mlp_W=2,attn_W=1"


def table(text: str) -> CostTable:
    return CostTable(Costs.parse(text), PROGRAM)


def test_costs_derive_what_is_not_given() -> None:
    assert Costs.parse("F=2,I=3,W=1") == Costs(2, 3, 1, backward=4, overlapped=6)
    assert Costs.parse("F=1,I=1,W=1,B=5, FB=4, p2p=.5") == Costs(1, 1, 1, 5, 4, message=0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F=-1,I=1,W=1", r"cost F=-1 \(forward\) must be finite and not negative"),
        ("p2p=1e308", r"cost p2p=1e\+308 \(message\) must be at most 1e\+100"),
        ("F=1,I=1,W=1,FB=inf", r"cost FB=inf \(overlapped\)"),
        ("W=nan", "cost W=nan"),
        ("F=x", "cost F=x must be a number"),
        ("F", "cost F= must be a number"),
        ("", "cost '': the keys are"),
        ("F=1,F=2", "cost F is given twice"),
        ("F@01=1,F@1=2", "cost F@1 is given twice"),
        ("BF=1", "cost 'BF': the keys are F, I, W, .*did you mean"),
        ("FB=2", "cost F, I, W missing: F, I and W are given all or none"),
        ("F=1,I=1", "cost W missing"),
        ("FB@0=2", "cost FB@0: F, I, W, B, layers, bytes take a stage"),
        ("p2p@0=2", "cost p2p@0: .* p2p, link two ranks"),
        ("F@1-2=2", "cost F@1-2: "),
        ("F@first=2", "cost F@first: "),
        ("F@0=-2", r"cost F@0=-2 \(forward\) must be finite"),
        ("p2p@1-2=-2", r"cost p2p@1-2=-2 \(message\)"),
        ("p2p@1-2=2,p2p@2-1=3", "cost p2p@2-1 is given twice"),
        ("bytes@0=1", "cost bytes is missing"),
        ("layers=2", "cost layers counts with the phases"),
        ("attn_F=1,mlp_F=1", "cost dispatch_F, combine_F, .* missing: phases are given all or none"),
        (PHASES + ",layers=1.5", "cost layers=1.5 must be a whole number"),
        (PHASES + ",layers=0", "cost layers=0 must be a whole number"),
        (PHASES + ",layers@0=inf", "cost layers@0=inf"),
        (PHASES.replace("attn_F=4", "attn_F=-4"), "cost attn_F=-4 .* not negative"),
        (PHASES + ",F=1,I=1,W=1", "cost F and phases such as attn_F exclude each other"),
    ],
)
def test_bad_costs_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Costs.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F@4=1", r"cost F@4: the stages are 0 \.\. 3"),
        ("F@-5=1", r"cost F@-5: the stages are"),
        ("F@3=1,F@-1=2", "cost F@-1: the same stage is given twice"),
        ("link@3-4=1", r"cost link@3-4 must name two of the ranks 0 \.\. 3"),
        ("link@3-3=1", "cost link@3-3 must name two"),
    ],
)
def test_a_place_that_the_program_has_not_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(text)


def test_a_stage_has_costs_of_its_own() -> None:
    costs = table("F=2,I=3,W=1,FB=4,F@0=3,I@-1=5,B@1=9")
    assert costs.of[Op.FORWARD] == [3, 2, 2, 2]
    assert costs.of[Op.BACKWARD_INPUT] == [3, 3, 3, 5]
    assert costs.of[Op.BACKWARD_WEIGHT] == [1, 1, 1, 1]
    assert costs.of[Op.BACKWARD] == [4, 9, 4, 6]
    # Alone, F and B take 6 and the pair 4; those of stages 0 and 3 take 3 + 6, so that their pair takes 4 x 9 / 6.
    assert costs.pair(1, 2) == 4
    assert costs.pair(0, 3) == 6
    assert not costs.knows_bytes
    assert table("bytes=10,bytes@-1=30").activation_bytes == [10, 10, 10, 30]


def test_a_link_has_costs_of_its_own_both_ways() -> None:
    costs = table("p2p=1,link=2,p2p@2-1=5,link@0-1=7")
    assert costs.transfer(0, 1) == costs.transfer(1, 0) == (7, 1)
    assert costs.transfer(1, 2) == costs.transfer(2, 1) == (2, 5)
    assert costs.transfer(2, 3) == (2, 1)


def test_a_pair_may_have_a_duration_of_its_own() -> None:
    costs = CostTable(Costs(overlapped=1.5, at_pair={(1, 2): 7.0}), PROGRAM)
    assert costs.pair(1, 2) == 7 and costs.pair(2, 1) == 1.5
    assert CostTable(Costs(phases=dict.fromkeys(PARTS, 1.0), at_pair={(0, 0): 3.0}), PROGRAM).pair(0, 0) == 3
    with pytest.raises(ValueError, match=r"cost FB of stages 1 and 4: the stages are 0 \.\. 3"):
        CostTable(Costs(at_pair={(1, 4): 1.0}), PROGRAM)
    with pytest.raises(ValueError, match=r"cost FB of stages 0 and 1=-1 \(overlapped\) must be finite"):
        Costs(at_pair={(0, 1): -1.0})
    with pytest.raises(ValueError, match="cost FB of single pairs"):
        Costs(at_pair={(0, 1): 1.0}).scaled(0.5)


def test_phases_decide_every_duration() -> None:
    costs = table(PHASES + ",layers=2,layers@0=1")
    phases = costs.costs.phases
    assert phases is not None
    for op in Op:
        assert costs.of[op] == [duration(plan(op, layers), phases) for layers in (1, 2, 2, 2)]
    assert costs.of[Op.FORWARD][0] == 4 + 3 + 2 + 3
    assert costs.of[Op.BACKWARD_WEIGHT][1] == 2 * (2 + 1)
    assert costs.pair(1, 2) == duration(pair_plan(2, 2), phases)
    assert costs.pair(0, 2) == duration(pair_plan(1, 2), phases)


@given(st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_finer_cut_costs_its_share(share: float, f: int, i: int, w: int, overlapped: int) -> None:
    whole = Costs(f, i, w, overlapped=overlapped, message=3, link=2, reduce=4, step=5, gather=6, activation_bytes=8)
    part = whole.scaled(share)
    before, after = CostTable(whole, PROGRAM), CostTable(part, PROGRAM)
    for op in Op:
        assert after.of[op] == [share * time for time in before.of[op]]
    assert after.pair(0, 1) == share * before.pair(0, 1)
    assert (part.reduce, part.gather, part.activation_bytes) == (4 * share, 6 * share, 8 * share)
    assert (part.message, part.link, part.step) == (3, 2, 5)


def test_a_cut_through_a_layer_is_refused() -> None:
    phases = dict.fromkeys(PARTS, 1.0)
    assert Costs(phases=phases, layers=4).scaled(0.5).layers == 2
    with pytest.raises(ValueError, match="layers=3 cannot be cut into 2 stages"):
        Costs(phases=phases, layers=3).scaled(0.5)
    with pytest.raises(ValueError, match="cost F@0: stages of one schedule are not those of another"):
        Costs.parse("F@0=2").scaled(0.5)
