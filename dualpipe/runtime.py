"""Runs one rank's lowered program over a Stage and a Transport; it knows no schedule.

The interpreter owns the tensors on their way between stages and nothing else. What a stage keeps between forward and
backward is the stage's, until the program says that it is dead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Kind,
    Message,
    Op,
    Overlap,
    Program,
    Receive,
    Reduce,
    Send,
    Slot,
    Step,
    Wait,
    Work,
)


class Stage(Protocol):
    """One slice of the model. Inputs and outputs are activations of one micro-batch; the first stage gets None as its
    input and has no input gradient, the last one gives None as its output and gets None as the gradient of it."""

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None: ...

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        """B: input gradients, and the weight gradients too."""
        ...

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        """I: input gradients; what W needs is kept."""
        ...

    def backward_weight(self, work: Work) -> None:
        """W: the weight gradients that the I of this work deferred."""
        ...

    def free(self, work: Work) -> None:
        """Everything kept for this work is dead."""
        ...


class Transport(Protocol):
    """Moves messages between pipeline ranks. Channels (peer, kind) are FIFOs of their own."""

    def send(self, message: Message, peer: int, tensor: Tensor) -> None:
        """Start sending and return; the transport holds the tensor until it has left."""
        ...

    def receive(self, message: Message, peer: int) -> None:
        """Post the receive of a message."""
        ...

    def wait(self, message: Message, peer: int) -> Tensor:
        """The posted message, once it is here."""
        ...

    def flush(self) -> None:
        """Wait until every message that was sent has left."""
        ...


class StepEnd(Protocol):
    """The end of a training step: the optimizer's side of the program."""

    def reduce(self, stage: int) -> None: ...

    def step(self) -> None: ...

    def gather(self, stage: int) -> None: ...


@dataclass
class Report:
    """What running a program showed: the most micro-batches whose activations were alive at once."""

    peak_activations: int = 0


Recorder = Callable[[Slot], None]
"""Called with each slot when it is done."""


class Interpreter:
    """One rank's run through its slots. ``stages`` maps a stage's number to the object that computes it."""

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        end: StepEnd | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.program, self.rank, self.stages, self.transport = program, rank, stages, transport
        self.end, self.record = end, record

    def run(self) -> Report:
        """Run every slot in order; returns once all messages have left."""
        self._tensors: dict[Message, Tensor] = {}
        self._alive: set[Work] = set()
        self._report = Report()
        for slot in self.program.slots[self.rank]:
            self._execute(slot)
            if self.record is not None:
                self.record(slot)
        self.transport.flush()
        assert not self._tensors and not self._alive, (self.rank, self._tensors.keys(), self._alive)
        return self._report

    def _execute(self, slot: Slot) -> None:
        match slot:
            case Compute(Op.FORWARD, work):
                self._forward(work)
            case Compute(Op.BACKWARD | Op.BACKWARD_INPUT as op, work):
                self._backward(op, work)
            case Compute(Op.BACKWARD_WEIGHT, work):
                self.stages[work.stage].backward_weight(work)
            case Overlap(forward, backward):
                self._forward(forward)
                self._backward(Op.BACKWARD, backward)
            case Send(message, peer):
                self.transport.send(message, peer, self._tensors.pop(message))
            case Receive(message, peer):
                self.transport.receive(message, peer)
            case Wait(message, peer):
                self._tensors[message] = self.transport.wait(message, peer)
            case Free(work):
                self.stages[work.stage].free(work)
                self._alive.remove(work)
            case Reduce(stage):
                self._step_end().reduce(stage)
            case Step():
                self._step_end().step()
            case Gather(stage):
                self._step_end().gather(stage)
            case _:
                raise AssertionError(slot)

    def _forward(self, work: Work) -> None:
        self._alive.add(work)
        self._report.peak_activations = max(self._report.peak_activations, len(self._alive))
        x = self._tensors.pop(Message(Kind.ACTIVATION, work)) if work.stage > 0 else None
        y = self.stages[work.stage].forward(work, x)
        if y is not None:
            self._tensors[Message(Kind.ACTIVATION, Work(work.stage + 1, work.microbatch))] = y

    def _backward(self, op: Op, work: Work) -> None:
        last = work.stage == self.program.stages - 1
        gradient = None if last else self._tensors.pop(Message(Kind.GRADIENT, work))
        stage = self.stages[work.stage]
        run = stage.backward if op is Op.BACKWARD else stage.backward_input
        gx = run(work, gradient)
        if gx is not None:
            self._tensors[Message(Kind.GRADIENT, Work(work.stage - 1, work.microbatch))] = gx

    def _step_end(self) -> StepEnd:
        assert self.end is not None, "a program with a step's end needs someone to reduce, step and gather"
        return self.end
