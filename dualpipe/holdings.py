"""What one rank holds while its slots are played: tensors on hand and to be sent, and how far each work is.

It refuses what a real rank could not do: use a tensor that is not there, defer or free what was not computed, end with
work undone or a tensor unsent. Works and messages are counted in integers, which makes a large program several times
faster to play than hashing its objects would.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from dualpipe.program import Kind, Message, Op, Program, ProgramError, Work


class State(Enum):
    """How far a work is on its rank; before its forward it has no state."""

    FORWARD = "forward only"
    INPUT = "backward for its inputs only"
    DONE = "computed"
    FREED = "freed"


class Codes:
    """Works and messages as integers, and whose they are.

    A work is stage * microbatches + micro-batch, a message twice its work, plus one for a gradient.
    """

    def __init__(self, program: Program) -> None:
        self.stages, self.microbatches = program.stages, program.microbatches
        directions = [program.direction(microbatch) for microbatch in range(program.microbatches)]
        self.owner: list[int] = []  # of each work
        self.works: list[dict[int, int]] = [{} for _ in range(program.ranks)]  # of each rank: stage -> micro-batches
        for stage in range(program.stages):
            for direction in directions:
                rank = program.routes[direction][stage]
                self.owner.append(rank)
                self.works[rank][stage] = self.works[rank].get(stage, 0) + 1

    def work(self, work: Work) -> int:
        """Raises ProgramError for a work that the program does not have."""
        if 0 <= work.stage < self.stages and 0 <= work.microbatch < self.microbatches:
            return work.stage * self.microbatches + work.microbatch
        raise ProgramError(f"there is no stage {work.stage} of micro-batch {work.microbatch}")

    def message(self, message: Message) -> int:
        return 2 * self.work(message.work) + (message.kind is Kind.GRADIENT)

    def name(self, work: int) -> str:
        return "{}.{}".format(*divmod(work, self.microbatches))

    def message_name(self, message: int) -> str:
        return "AG"[message % 2] + self.name(message // 2)


class Crossing(NamedTuple):
    """A message's way from the span that made it to the rank that waits for it."""

    message: Message
    source: int
    target: int
    maker: int  # index of the span on the source
    sent: float  # handed over by the source
    arrival: float


class Holdings:
    """One rank's. Methods raise ProgramError, without saying where, for what cannot be done at that point.

    ``curve`` is the memory over time: (time, works whose activations are held from then on, their bytes).
    """

    def __init__(self, codes: Codes, rank: int, trains: bool, activation_bytes: Sequence[float]) -> None:
        self.codes, self.rank, self.trains = codes, rank, trains
        self.curve: list[tuple[float, int, float]] = []
        self._activation_bytes = activation_bytes
        self._states: dict[int, State] = {}
        self._inputs: dict[int, Crossing | None] = {}  # messages to be used here; None for one that was made here
        self._outputs: dict[int, int] = {}  # messages to be sent -> the span that made them
        self._backwards = dict(codes.works[rank])  # stage -> how many are to be completed
        self._reduced: set[int] = set()
        self._gathered: set[int] = set()
        self._stepped = False

    def compute(self, op: Op, work: int, start: float, span: int) -> Crossing | None:
        """Run an operation, as the span of that index. Returns the message that it takes, if one came from a rank."""
        codes, state = self.codes, self._states.get(work)
        if codes.owner[work] != self.rank or self._stepped:
            raise ProgramError(self._misplaced(work))
        stage, crossing = work // codes.microbatches, None
        if op is Op.FORWARD:
            if state is not None:
                raise ProgramError(f"F{codes.name(work)} is done a second time")
            if stage > 0:
                crossing = self._take(2 * work)
            if stage < codes.stages - 1:
                self._give(2 * (work + codes.microbatches), span)
            self._states[work] = State.FORWARD if self.trains else State.DONE
            self._change(start, 1, stage)
            return crossing
        if state is not (State.INPUT if op is Op.BACKWARD_WEIGHT else State.FORWARD):
            raise ProgramError(self._out_of_order(op, work))
        if op is not Op.BACKWARD_WEIGHT:
            if stage < codes.stages - 1:
                crossing = self._take(2 * work + 1)
            if stage > 0:
                self._give(2 * (work - codes.microbatches) + 1, span)
        if op is Op.BACKWARD_INPUT:
            self._states[work] = State.INPUT
        else:
            self._states[work] = State.DONE
            self._backwards[stage] -= 1
        return crossing

    def send(self, message: int, peer: int) -> int:
        """Hand a message over. Returns the index of the span that made it."""
        owner = self.codes.owner[message // 2]
        if peer != owner or peer == self.rank:
            raise ProgramError(f"{self.codes.message_name(message)} is needed on rank {owner}")
        if message not in self._outputs:
            raise ProgramError(f"{self.codes.message_name(message)} is not made yet, or is sent a second time")
        return self._outputs.pop(message)

    def arrive(self, message: int, crossing: Crossing) -> None:
        self._inputs[message] = crossing

    def free(self, work: int, time: float) -> None:
        if self._states.get(work) is not State.DONE:
            raise ProgramError(f"{self.codes.name(work)} cannot be freed: it is {self._state(work)}")
        self._states[work] = State.FREED
        self._change(time, -1, work // self.codes.microbatches)

    def reduce(self, stage: int) -> None:
        if self._backwards.get(stage) != 0 or not self.trains or stage in self._reduced:
            raise ProgramError(f"the gradients of stage {stage} are not complete here, or reduced before")
        self._reduced.add(stage)

    def step(self) -> None:
        if missing := self._backwards.keys() - self._reduced:
            raise ProgramError(f"comes before reduce:{min(missing)}")
        if self._stepped:
            raise ProgramError("comes a second time")
        self._stepped = True

    def gather(self, stage: int) -> None:
        if not self._stepped or stage not in self._backwards or stage in self._gathered:
            raise ProgramError("comes before the step, a second time, or for a stage that the rank does not hold")
        self._gathered.add(stage)

    def finish(self) -> None:
        """What must be true at the end of the rank's slots."""
        for message in self._outputs:
            raise ProgramError(f"send:{self.codes.message_name(message)} is missing")
        expected = (work for work, owner in enumerate(self.codes.owner) if owner == self.rank)
        if sum(self.codes.works[self.rank].values()) != len(self._states) or (self.curve and self.curve[-1][1]):
            late = next(work for work in expected if self._states.get(work) is not State.FREED)
            raise ProgramError(f"{self.codes.name(late)} must be {State.FREED.value}, and is {self._state(late)}")
        if self._reduced and not self._stepped:
            raise ProgramError("step is missing")
        if self._stepped and (missing := self._backwards.keys() - self._gathered):
            raise ProgramError(f"gather:{min(missing)} is missing")

    def _take(self, message: int) -> Crossing | None:
        if message not in self._inputs:
            step = self.codes.microbatches if message % 2 else -self.codes.microbatches
            here = self.codes.owner[message // 2 + step] == self.rank
            fault = "is not made" if here else "has not been waited for"
            raise ProgramError(f"its input {self.codes.message_name(message)} {fault}")
        return self._inputs.pop(message)

    def _give(self, message: int, span: int) -> None:
        if self.codes.owner[message // 2] == self.rank:
            self._inputs[message] = None
        else:
            self._outputs[message] = span

    def _change(self, time: float, works: int, stage: int) -> None:
        alive, size = self.curve[-1][1:] if self.curve else (0, 0.0)
        self.curve.append((time, alive + works, size + works * self._activation_bytes[stage]))

    def _misplaced(self, work: int) -> str:
        if self._stepped:
            return "comes after the step"
        stage, microbatch = divmod(work, self.codes.microbatches)
        return f"stage {stage} of micro-batch {microbatch} is on rank {self.codes.owner[work]}"

    def _out_of_order(self, op: Op, work: int) -> str:
        name = self.codes.name(work)
        need = f"I{name}" if op is Op.BACKWARD_WEIGHT else f"F{name} and no other backward"
        return f"{op.value}{name} needs {need} before it: {name} is {self._state(work)}"

    def _state(self, work: int) -> str:
        state = self._states.get(work)
        return "not begun" if state is None else state.value
