"""Drawn waits and loads: without any spread the step is the plan's, and what is drawn has the stated moments."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualpipe.overlap import Phase
from dualpipe.program import Op
from parallel.estimate.hardware import Cluster
from parallel.estimate.plan import make_plan
from parallel.estimate.spread import EXCHANGES, _Layers, spread
from parallel.estimate.workload import Workload
from parallel.mesh import Layout
from tests.parallel.estimate.published import H800, PUBLISHED, RUN, smaller

SHALLOW = replace(PUBLISHED.model, num_hidden_layers=8)
SURE = replace(H800, skew_variation=0.0)


def small(**changes: Any) -> Workload:
    return smaller(model=SHALLOW, **changes)


def varied(cluster: Cluster = H800, **changes: float) -> tuple[float, float, float]:
    found = spread(make_plan(small(**changes), cluster, RUN), 6)
    assert found.low <= found.median <= found.high
    return found.low, found.mean, found.high


def test_nothing_drawn_is_the_plan_itself() -> None:
    plan = make_plan(small(), SURE, RUN)
    low, mean, high = varied(SURE)
    assert low == pytest.approx(plan.step_seconds) == pytest.approx(high) and mean == pytest.approx(low)


def test_waits_spread_the_step_and_lengthen_it() -> None:
    """A maximum of drawn times is on average no shorter than the maximum of their means."""
    plan = make_plan(small(), H800, RUN)
    low, mean, high = varied()
    assert high > low and mean > plan.step_seconds
    wide = varied(replace(H800, skew_variation=0.9))
    assert wide[1] > mean


def test_loads_spread_the_step() -> None:
    low, mean, high = varied(SURE, imbalance=1.3)
    assert high > low
    assert mean > make_plan(small(imbalance=1.3), SURE, RUN).step_seconds * 0.98


def test_expert_groups_beside_each_other_wait_for_the_last() -> None:
    one, four = (spread(make_plan(small(layout=Layout(4, data, 64)), H800, RUN), 8).mean for data in (64, 256))
    # Gradients are summed over more replicas too; that part is without any draw.
    plans = [make_plan(small(layout=Layout(4, data, 64)), H800, RUN).step_seconds for data in (64, 256)]
    assert four - plans[1] > one - plans[0]


def test_what_is_drawn_has_the_stated_mean_and_deviation() -> None:
    plan = make_plan(small(), H800, RUN)
    layers = _Layers(plan, np.random.default_rng(1))
    stage = replace(plan.stages[1], layers=plan.stages[1].layers[-1:])
    drawn = [layers.drawn(stage).layers[0] for _ in range(3000)]
    for part, name in EXCHANGES.items():
        usual = getattr(H800, f"{name}_skew_us") * 1e-6
        extra = np.array([layer[part] for layer in drawn]) - stage.layers[0][part]
        assert abs(extra.mean()) < 0.04 * usual
        assert extra.std() == pytest.approx(H800.skew_variation * usual, rel=0.1)
    assert {layer[Phase.MLP, Op.FORWARD] for layer in drawn} == {stage.layers[0][Phase.MLP, Op.FORWARD]}


def test_the_same_seed_draws_the_same_and_one_draw_is_refused() -> None:
    plan = make_plan(small(), H800, RUN)
    assert spread(plan, 3, seed=5) == spread(plan, 3, seed=5) != spread(plan, 3, seed=6)
    with pytest.raises(ValueError, match="draws=1 must be at least 2"):
        spread(plan, 1)
