"""Values that change while training: each step's is a function of its number alone."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.optimizer_config import OptimizerConfig
from parallel.phases import Batches, Course, Phase, PhasesConfig, RunValues, parse_position

LENGTH = 4
ALONE = Batches(PhasesConfig(), LENGTH, 10)
"""Ten sequences of four tokens in every step."""


@st.composite
def ramps(draw: st.DrawFn) -> PhasesConfig:
    """Batch sizes that rise, fall and stay, over steps or tokens."""
    multiple = draw(st.integers(1, 7))
    sizes = st.integers(1, 30).map(lambda n: n * multiple)
    phases, where = [], {"steps": 0, "tokens": 0}
    unit = draw(st.sampled_from(["steps", "tokens"]))
    for _ in range(draw(st.integers(1, 4))):
        where[unit] += draw(st.integers(1, 40 if unit == "steps" else 8000))
        if draw(st.booleans()):
            phases.append(Phase(draw(sizes), f"{where[unit]} {unit}", "linear", draw(sizes)))
        else:
            phases.append(Phase(draw(sizes), f"{where[unit]} {unit}"))
    return PhasesConfig(global_batch_size=tuple(phases), batch_multiple=multiple)


def step_by_step(config: PhasesConfig, steps: int) -> list[tuple[int, int]]:
    """(sequences before it, batch size) of every step, by the definition."""
    taken, found, phases = 0, [], list(config.global_batch_size)
    began, start = {"steps": 0, "tokens": 0}, 0.0
    for step in range(steps):
        here = {"steps": step, "tokens": taken * LENGTH}
        while phases:
            amount, unit = parse_position(phases[0].until or "")
            if here[unit] < amount:
                break
            start, began = phases.pop(0).end, here
        if not phases:
            size = int(start)
        elif phases[0].shape == "constant":
            size = int(phases[0].end)
        else:
            first = Fraction(start if phases[0].start is None else phases[0].start)
            line = first + (Fraction(phases[0].end) - first) * Fraction(here[unit] - began[unit], amount - began[unit])
            size = math.floor(line / config.batch_multiple) * config.batch_multiple
        found.append((taken, size))
        taken += size
    return found


@given(ramps())
def test_the_closed_form_of_a_batch_that_moves_is_its_definition(config: PhasesConfig) -> None:
    peak = max(value for phase in config.global_batch_size for value in (phase.end, phase.start or 0))
    try:
        batches = Batches(config, LENGTH, int(peak))
    except ValueError as refused:  # a step went beyond a whole phase
        assert "must come after the phase's beginning" in str(refused)
        return
    want = step_by_step(config, 300)
    assert [(batches.sequences_before(step), batches.size(step)) for step in range(300)] == want
    for step in (1, 17, 299):
        tokens = want[step][0] * LENGTH
        assert batches.steps_until(tokens) == step
        assert batches.steps_until(tokens + 1) == step + 1


def test_the_published_courses() -> None:
    """DeepSeek-V3's report, 4.2, at the places that it names. A batch of 3840 makes whole steps of no boundary."""
    phases = PhasesConfig(
        learning_rate=(
            Phase(2.2e-4, "2K steps", "linear"),
            Phase(2.2e-4, "10T tokens"),
            Phase(2.2e-5, "14.3T tokens", "cosine"),
            Phase(2.2e-5, "14.633T tokens"),
            Phase(7.3e-6),
        ),
        global_batch_size=(Phase(15360, "469B tokens", "linear", 3072),),
        batch_multiple=256,
        bias_update_speed=(Phase(0.001, "14.3T tokens"), Phase(0.0)),
        mtp_loss_weight=(Phase(0.3, "10T tokens"), Phase(0.1)),
    )
    optimizer = OptimizerConfig(learning_rate=2.2e-4, warmup_steps=0)
    values = RunValues(phases, 243_000, 4096, 15360, optimizer, 0.001, 0.3)
    at = values.at
    assert (at(0).global_batch_size, at(0).learning_rate) == (3072, pytest.approx(2.2e-4 / 2000))
    assert at(1999).learning_rate == 2.2e-4 and at(1998).learning_rate < 2.2e-4
    full = values.batches.steps_until(469 * 10**9)
    assert at(full).global_batch_size == 15360 and at(full - 1).global_batch_size == 15360 - 256
    ten, half = values.batches.steps_until(10 * 10**12), values.batches.steps_until(12_150 * 10**9)
    assert at(ten - 2).learning_rate == 2.2e-4 > at(ten).learning_rate
    assert (at(ten - 2).mtp_loss_weight, at(ten).mtp_loss_weight) == (0.3, 0.1)
    assert at(half).learning_rate == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)
    last, tail = values.batches.steps_until(14_300 * 10**9), values.batches.steps_until(14_633 * 10**9)
    assert at(last).learning_rate == 2.2e-5 == at(tail - 2).learning_rate and at(tail).learning_rate == 7.3e-6
    assert (at(last - 2).bias_update_speed, at(last).bias_update_speed) == (0.001, 0.0)


def test_a_phase_may_end_in_the_other_unit_than_the_one_before() -> None:
    course = Course("x", (Phase(8.0, "4 steps", "linear"), Phase(0.0, "400 tokens", "linear")), ALONE)
    assert [course.at(step) for step in range(12)] == pytest.approx(
        [2, 4, 6, 8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6, 0, 0, 0]
    )
    course = Course("x", (Phase(3.0, "100 tokens"), Phase(1.0, "5 steps", "linear", 2.0)), ALONE)
    assert [course.at(step) for step in range(6)] == [3, 3, 2, 1.5, 1, 1]  # 100 tokens are done in the third step


@pytest.mark.parametrize(("text", "amount"), [("2K steps", 2000), ("14.3T tokens", 14_300_000_000_000), ("7steps", 7)])
def test_positions_are_exact(text: str, amount: int) -> None:
    assert parse_position(text)[0] == amount


def run_values(**phases: Any) -> RunValues:
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    return RunValues(PhasesConfig(**phases), 100, LENGTH, 10, optimizer, 0.5, 0.3)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (lambda: {"learning_rate": (Phase(0.5),)}, "optimizer.learning_rate=1.0 must be the largest value of"),
        (lambda: {"bias_update_speed": (Phase(1.0),)}, "model.bias_update_speed=0.5 must be the largest value of"),
        (lambda: {"mtp_loss_weight": (Phase(0.1),)}, "model.mtp_loss_weight=0.3 must be the largest value of"),
        (lambda: {"global_batch_size": (Phase(12),)}, "train.global_batch_size=10 must be the largest value of"),
        (lambda: {"learning_rate": (Phase(1.0), Phase(0.5))}, r"learning_rate\[0\].until=null must be given"),
        (
            lambda: {"learning_rate": (Phase(1.0, "4 steps"), Phase(0.5, "100 tokens", "cosine"))},
            r"phases.learning_rate\[1\].until='100 tokens' must come after the phase's beginning, 160 tokens",
        ),
        (
            lambda: {"global_batch_size": (Phase(5, "4 steps"), Phase(10, "4 steps", "linear"))},
            r"phases.global_batch_size\[1\].until='4 steps' must come after the phase's beginning, 4 steps",
        ),
        (lambda: {"global_batch_size": (Phase(10, "4 steps", "cosine", 5),)}, "cosine must be constant or linear"),
        (lambda: {"global_batch_size": (Phase(10, "4 steps", "linear"),)}, r"\[0\].start=0 must be a whole number"),
        (
            lambda: {"global_batch_size": (Phase(4.5, "2 steps"), Phase(10))},
            r"global_batch_size\[0\].end=4.5 must be a whole number",
        ),
        (lambda: {"global_batch_size": (Phase(10),), "batch_multiple": 4}, "a multiple of phases.batch_multiple=4"),
        (lambda: {"batch_multiple": 0}, "phases.batch_multiple=0 must be at least 1"),
        (lambda: {"learning_rate": (Phase(1.0, "2 weeks"),)}, "until='2 weeks' must be a position such as"),
        (lambda: {"learning_rate": (Phase(1.0, "1.5 steps"),)}, "until='1.5 steps' must be a whole number of steps"),
        (lambda: {"learning_rate": (Phase(1.0, None, "linear"),)}, "until=null must say where the phase ends"),
        (lambda: {"learning_rate": (Phase(1.0, start=0.5),)}, "start=0.5 must be left out: the phase is constant"),
        (lambda: {"learning_rate": (Phase(-1.0),)}, "end=-1.0 must not be negative"),
    ],
)
def test_a_course_that_cannot_be_is_refused(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_values(**phases())
