"""The search for a program: valid, within memory, never worse than what has a name, and the same for the same seed."""

from dataclasses import replace
from math import floor, inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import computed, dump, parse
from dualpipe.progress import Progress, Transport
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.search import Budget, Found, search
from dualpipe.search.block import Block
from dualpipe.search.greedy import Greedy, Policy
from dualpipe.search.placement import Placement, placements, share_of
from dualpipe.search.refine import Refiner, joined
from dualpipe.search.timing import Pipeline
from dualpipe.simulate import simulate
from dualpipe.validate import validate, validate_order
from tests.dualpipe.test_schedules import accepts, draw_order

DURATIONS = st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.2, 2.0])


@st.composite
def some_costs(draw: st.DrawFn) -> Costs:
    forward, inputs, weights = (draw(st.sampled_from([0.5, 0.8, 1.0, 1.3])) for _ in range(3))
    overlapped = (forward + inputs + weights) * draw(st.sampled_from([0.8, 1.0, 1.1]))
    backward = (inputs + weights) * draw(st.sampled_from([0.9, 1.0]))
    more = {name: draw(DURATIONS) for name in ("message", "link", "reduce", "step", "gather")}
    return Costs(forward, inputs, weights, backward, overlapped, **more)


def draw_pipeline(data: st.DataObject) -> tuple[Placement, Pipeline]:
    ranks, microbatches = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 8), "micro-batches")
    placement = data.draw(st.sampled_from(placements(ranks, microbatches)), "placement")
    costs = share_of(data.draw(some_costs(), "costs"), placement.share)
    return placement, Pipeline(placement.program("test", microbatches), costs)


def best_named(ranks: int, microbatches: int, costs: Costs, limit: float) -> float:
    """The time of the fastest named schedule that fits, by the simulator."""
    fastest = inf
    for name in SCHEDULES:
        if accepts(name, ranks, microbatches, None):
            order = generate(name, ranks, microbatches)
            share = order.ranks / order.stages
            result = simulate(lower(order), share_of(costs, share))
            if max(result.peak_activations) * share <= limit:
                fastest = min(fastest, result.makespan)
    return fastest


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_quick_times_are_those_of_the_simulation(data: st.DataObject) -> None:
    order = draw_order(data)
    costs = replace(data.draw(some_costs()), reduce=0.0, step=0.0, gather=0.0)
    costs = replace(costs, at_stage={("forward", -1): data.draw(DURATIONS)})
    pipeline = Pipeline(replace(order, slots=((),) * order.ranks), costs)
    slots = pipeline.read(order)
    assert pipeline.write(slots, order.schedule) == order
    result, times = simulate(lower(order), costs), pipeline.play(slots)
    assert times is not None
    for rank, starts in enumerate(times.starts):
        computing = [span for span in result.spans[rank] if computed(span.slot)]
        assert starts == pytest.approx([span.start for span in computing])
        assert times.ends[rank] == pytest.approx([span.end for span in computing])
    assert times.makespan == pytest.approx(result.makespan)
    assert tuple(map(pipeline.peak, slots)) == result.peak_activations


def test_ranks_that_wait_for_each_other_have_no_times() -> None:
    pipeline = Pipeline(Placement("linear", ((0, 1),)).program("test", 2), Costs())
    assert pipeline.play([[0, 12, 1, 13], [2, 14, 3, 15]]) is not None  # of 4 works, 2 on each rank; B is 12 + work
    assert pipeline.play([[0, 12, 1, 13], [3, 15, 2, 14]]) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_list_scheduling_ends_in_whatever_memory_holds_one_micro_batch(data: st.DataObject) -> None:
    placement, pipeline = draw_pipeline(data)
    backwards = pipeline.works // pipeline.empty.ranks
    limit = data.draw(st.integers(placement.passes, 3 * placement.passes), "limit")
    rng = Random(data.draw(st.integers(0, 10**6), "seed"))
    policy = Policy.drawn(rng, placement.passes, pipeline.empty.ranks, backwards, limit)
    for _ in range(data.draw(st.integers(0, 6), "changes")):
        policy = policy.mutated(rng, backwards, limit)
    order = Greedy(pipeline, policy, limit).order()
    validate_order(pipeline.write(order, "test"))
    assert max(map(pipeline.peak, order)) <= limit
    assert pipeline.play(order) is not None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_block_without_pairs_is_an_order(data: st.DataObject) -> None:
    placement, pipeline = draw_pipeline(data)
    rng = Random(data.draw(st.integers(0, 10**6), "seed"))
    block = Block.tight(pipeline, placement.passes)
    for _ in range(data.draw(st.integers(0, 12), "changes")):
        block = block.mutated(rng, pipeline.works // pipeline.empty.ranks)
    validate_order(pipeline.write(replace(block, pairs=False).order(pipeline), "test"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_refining_keeps_an_order_valid_within_memory_and_no_longer(data: st.DataObject) -> None:
    placement, pipeline = draw_pipeline(data)
    rng = Random(data.draw(st.integers(0, 10**6), "seed"))
    backwards = pipeline.works // pipeline.empty.ranks
    limit = data.draw(st.integers(placement.passes, 3 * placement.passes), "limit")
    policy = Policy.drawn(rng, placement.passes, pipeline.empty.ranks, backwards, limit)
    start = Greedy(pipeline, policy, limit).order()
    refiner = Refiner(pipeline, start, limit, rng)
    before = refiner.makespan
    for _ in range(100):
        refiner.step()
        validate_order(pipeline.write(refiner.order, "test"))
        assert max(map(pipeline.peak, refiner.order)) <= limit
    whole = joined(pipeline, refiner.best)
    validate_order(pipeline.write(whole, "test"))
    after = pipeline.play(whole)
    assert after is not None and after.makespan <= refiner.makespan + 1e-9 <= before + 2e-9
    assert max(map(pipeline.peak, whole)) <= limit
    assert sum(map(len, whole)) <= sum(map(len, refiner.best))


def test_whole_backwards_where_they_cost_no_time() -> None:
    pipeline = Pipeline(Placement("linear", ((0, 1),)).program("test", 1), Costs())
    # Works 0 and 1, I 2 and 3, W 4 and 5, B 6 and 7: rank 0 waits for I of rank 1, which must not wait for its W.
    assert joined(pipeline, [[0, 2, 4], [1, 3, 5]]) == [[0, 6], [1, 3, 5]]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_what_is_found_is_valid_fits_and_is_no_worse_than_any_named(data: st.DataObject) -> None:
    ranks, microbatches = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 9), "micro-batches")
    costs = data.draw(some_costs(), "costs")
    limit = data.draw(st.sampled_from([1.0, 1.5, 2.0, 3.0, ranks, ranks + 1.0, inf]), "limit")
    budget = Budget(orders=data.draw(st.sampled_from([1, 100, 1500]), "budget"))
    found = search(ranks, microbatches, costs, limit, budget, seed=data.draw(st.integers(0, 9), "seed"))
    validate_order(found.order)
    validate(found.program)
    assert parse(dump(found.program)) == found.program
    for transport in Transport:
        Progress(found.program, transport, costs).play()
    share = found.program.ranks / found.program.stages
    assert simulate(found.program, share_of(costs, share)).spans == found.result.spans
    assert found.peak == max(found.result.peak_activations) * share <= limit
    named = best_named(ranks, microbatches, costs, limit) if ranks > 1 else inf
    assert found.result.makespan <= named + 1e-9
    if ranks > 1 and named < inf:
        assert found.best_named is not None and found.best_named.makespan == pytest.approx(named)
        assert found.gain == pytest.approx(1 - found.result.makespan / named)
    assert found.result.makespan >= found.bound - 1e-9


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99), orders=st.integers(1, 1500))
def test_a_seed_gives_one_program_and_a_larger_budget_no_worse(seed: int, orders: int) -> None:
    costs = Costs(1, 1.2, 0.8, message=0.2)

    def find(orders: int) -> Found:
        return search(3, 6, costs, 2, Budget(orders=orders), seed)

    found, more = find(orders), find(2 * orders)
    assert find(orders).program == found.program
    assert found.tried == orders
    assert more.result.makespan <= found.result.makespan


def test_seconds_only_say_where_the_same_search_stops() -> None:
    costs = Costs(1, 1.2, 0.8, message=0.2)
    timed = search(4, 8, costs, 3, Budget(seconds=0.3))
    assert search(4, 8, costs, 3, Budget(orders=timed.tried)).program == timed.program


def test_half_the_memory_of_1f1b_at_its_speed() -> None:
    # The V of "Pipeline Parallelism with Controllable Memory": a half of 1F1B's memory, and no longer a step.
    found = search(4, 12, Costs(), 2, Budget(orders=1500))
    plain = simulate(lower(generate("1f1b", 4, 12)), Costs())
    assert max(plain.peak_activations) == 4 and found.peak <= 2
    assert found.best_named is None and found.gain is None
    assert found.result.makespan < plain.makespan


def test_messages_cost_less_than_in_any_named_schedule() -> None:
    costs = Costs(message=0.2)
    found = search(4, 12, costs, 4, Budget(orders=3000))
    assert found.gain is not None and found.gain > 0.005
    assert found.result.makespan < best_named(4, 12, costs, 4)


def test_the_end_of_the_step_counts() -> None:
    # Orders with a shorter last W are found soon, but they reduce later than DualPipe does.
    found = search(2, 4, Costs(reduce=2), budget=Budget(orders=700), allowed=["twins"])
    assert found.gain is not None and found.gain >= 0
    assert found.result.makespan <= best_named(2, 4, Costs(reduce=2), inf)


def test_the_search_ends_where_nothing_can_be_better() -> None:
    found = search(4, 12, Costs(), budget=Budget(orders=10**6))
    assert found.result.makespan == pytest.approx(found.bound) == 37  # 12 x 3, after the way to the middle
    assert found.tried < 10**6


def test_placements_are_chosen_and_those_the_costs_do_not_suit_are_named() -> None:
    found = search(4, 8, Costs(), 4, Budget(orders=50), allowed=["linear"])
    assert found.program.routes == ((0, 1, 2, 3),)
    assert {named.name for named in found.named if not named.why} == {"gpipe", "1f1b", "zb1p"}
    uneven = search(4, 8, Costs(at_stage={("forward", -1): 1.5}), 4, Budget(orders=50))
    assert set(uneven.left_out) == {"v", "interleaved"} and uneven.program.stages == 4
    assert [placement.name for placement in placements(3, 8)] == ["linear", "v", "interleaved"]
    assert [placement.name for placement in placements(4, 7)] == ["linear", "v", "interleaved"]
    assert [placement.name for placement in placements(1, 8)] == ["linear"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 8, Costs(), 0.9), "memory limit 0.9 must be at least 1"),
        ((4, 8, Costs(), float("nan")), "memory limit nan must be at least 1"),
        ((0, 8, Costs()), "layout.pipeline=0 must be at least 1"),
        ((4, 0, Costs()), "= 0 must be at least 1 for schedule search"),
        ((3, 8, Costs(), 4, None, 0, ["twins"]), "placement twins must be one of linear, v, interleaved for 3 ranks"),
        ((4, 8, Costs(at_stage={("forward", 0): 2.0}), 4, None, 0, ["v"]), "cost F@0: stages of one schedule"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError) as error:
        search(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_budgets() -> None:
    assert Budget.parse("500") == Budget(orders=500)
    assert Budget.parse("2.5s") == Budget(seconds=2.5)
    for text in ("", "s", "0", "-1s", "1.5", "nans", "infs", "10m"):
        with pytest.raises(ValueError, match=rf"^budget {text} must be a number of orders"):
            Budget.parse(text)


def test_a_limit_counts_thin_stages_by_their_share() -> None:
    found = search(2, 6, Costs(), 1.5, Budget(orders=300), allowed=["v"])
    assert max(found.result.peak_activations) <= floor(1.5 / 0.5) == 3
    assert found.peak == max(found.result.peak_activations) / 2
