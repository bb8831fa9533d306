"""A program from a text file, proven before anything runs it."""

from pathlib import Path

from dualpipe.lower import lower
from dualpipe.program import Program, ProgramError, Step, computed, parse
from dualpipe.validate import validate, validate_order


def load(path: str | Path) -> Program:
    """The lowered program in a file (the form is in ``program.py``). Compute order is lowered; a program that has any
    message, free or end of the step is taken as it stands.

    Raises ProgramError, one line that begins with the path, when there is no such program or ``validate`` refuses it.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ProgramError(f"{path}: must be a regular file with a program")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ProgramError(f"{path}: must be a readable program: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ProgramError(f"{path}: must be UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        program = parse(text)
        if any(not computed(slot) for slots in program.slots for slot in slots):
            validate(program)
            return program
        return lower_proven(program)
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None


def check_training(program: Program, ranks: int, microbatches: int) -> None:
    """Raises ProgramError unless the program is a training step on so many pipeline ranks and micro-batches."""
    name = f"the program {program.schedule} of schedule.program"
    if program.ranks != ranks:
        raise ProgramError(f"layout.pipeline={ranks} must be {program.ranks}, the ranks of {name}")
    if program.microbatches != microbatches:
        raise ProgramError(
            "the number of micro-batches (train.global_batch_size / (layout.data x train.micro_batch_size)) = "
            f"{microbatches} must be {program.microbatches}, as in {name}"
        )
    if not any(isinstance(slot, Step) for slot in program.slots[0]):
        raise ProgramError(f"{name} must have backwards and the end of a step")


def lower_proven(order: Program) -> Program:
    """Lowered with the fewest receives posted ahead, from two on, that hold up no send for ever on rendezvous. With
    all of them posted at the start no send waits, so that every valid order finds its number."""
    validate_order(order)
    window = 2
    while True:
        program = lower(order, window)
        try:
            validate(program)
        except ProgramError:
            if window >= order.microbatches * order.stages:
                raise
            window *= 2
        else:
            return program
