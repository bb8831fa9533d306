"""When the ranks of a program hold most: a table that is looked up against a walk through every slot."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe import schedules
from parallel.estimate.peak import Placement
from tests.parallel.estimate.walk import held_bytes


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(schedules.SCHEDULES)), st.integers(1, 6))
def test_peaks_are_those_of_every_slot_and_of_every_full_pipeline(data: st.DataObject, name: str, ranks: int) -> None:
    """Whatever the stages take, and whether a micro-batch takes less or more while it waits for its W."""
    sizes = [m for m in range(1, 3 * ranks + 2) if schedules.runs(name, ranks, m)]
    if not sizes:  # an odd number of ranks
        return
    microbatches = data.draw(st.sampled_from(sizes))
    program = schedules.generate(name, ranks, microbatches)
    gigabytes = st.lists(st.floats(0, 1e9), min_size=program.stages, max_size=program.stages)
    activations, deferred = data.draw(gigabytes), data.draw(gigabytes)
    slowly = [max(most for most, _ in held_bytes(program, rank, activations, deferred)) for rank in range(ranks)]
    assert Placement(program).peak_R(activations, deferred).tolist() == pytest.approx(slowly)
    if name != "gpipe" and microbatches > 2 * ranks:
        full = Placement(schedules.generate(name, ranks, 2 * ranks))
        assert full.peak_R(activations, deferred).tolist() == pytest.approx(slowly)
