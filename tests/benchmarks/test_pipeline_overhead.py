"""When a layout's steps begin to count."""

import pytest

from benchmarks.pipeline_overhead import MOST_WARM_UP, SETTLED_FAULTS, Group, Usage


class Steps(Group):
    """A group of ``world`` processes, each of which touches so many fresh pages in its steps, one after the other."""

    def __init__(self, world: int, copies: int, faults: list[int]) -> None:
        self.world, self.copies, self.faults, self.done = world, copies, faults, 0

    def steps(self, count: int) -> Usage:
        each = self.faults[min(self.done, len(self.faults) - 1)]
        self.done += count
        return Usage(1.0, 0.0, 0, each * self.world // self.copies, 0.0, 1.0)


@pytest.mark.parametrize(("world", "copies"), [(8, 1), (2, 2), (1, 1)])
def test_what_is_measured_is_steps_of_processes_that_have_their_memory(world: int, copies: int) -> None:
    growing = Steps(world, copies, [9000, 4000, SETTLED_FAULTS + 10, SETTLED_FAULTS, 0])
    growing.warm_up()
    assert growing.done == 4
    restless = Steps(world, copies, [9000])
    restless.warm_up()
    assert restless.done == MOST_WARM_UP
