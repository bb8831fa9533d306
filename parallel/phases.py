"""Values that change while training: learning rate, batch size, speed of the routers' bias, weight of the MTP loss.

A value's course is a list of phases. Each lasts until a position in the run, counted in steps or in tokens, and holds
the value or moves it there from where the phase before ended:

    linear   start + (end - start) x              x: the share of the phase that is done
    cosine   end + (start - end) (1 + cos pi x) / 2

The batch size of a step is the value at the step's beginning, rounded down to a multiple; so the steps fall into levels
of one size each, and the sequences before any step are a closed form of its number. All other values are those at the
step's end: a warm-up over N steps begins at 1/N and has its end in step N. After the last phase its end stays.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from parallel.optimizer_config import OptimizerConfig

LEVELS_LIMIT = 4096
"""Different batch sizes of a run at most: each is a program of its own."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_POSITION = re.compile(r"(\d{1,15})(?:\.(\d{1,12}))?\s*([KMBT]?)\s*(steps|tokens)")

Unit = Literal["steps", "tokens"]


@dataclass(frozen=True)
class Phase:
    """Raises ValueError, naming the key. Numbers are in the unit of the value."""

    end: float
    """Value that the phase holds, or moves to."""
    until: str | None = None
    """Where the phase ends, from the run's beginning: '2K steps', '469B tokens', '14.3T tokens'; null: never."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the value gets to its end: it is there at once, or moves there over the whole phase."""
    start: float | None = None
    """Value that it moves from; null: the end of the phase before, or 0 for the first."""

    def __post_init__(self) -> None:
        if self.until is not None:
            parse_position(self.until)
        for key in ("end", "start"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"{key}={value} must not be negative")
        if self.shape == "constant" and self.start is not None:
            raise ValueError(f"start={self.start} must be left out: the phase is constant")
        if self.shape != "constant" and self.until is None:
            raise ValueError(f"until=null must say where the phase ends: its shape is {self.shape}")


@dataclass(frozen=True)
class PhasesConfig:
    """Courses of values, in place of one value for the whole run; an empty list leaves that one. The largest value of a
    course is the key that it varies.

    A run that resumes may change them, with one rule: where any phase ends after a number of tokens, and from the run's
    beginning, batches keep their sizes (launch/config.py); step and batch size say how many tokens were taken before.
    """

    learning_rate: tuple[Phase, ...] = ()
    """Of optimizer.learning_rate, in place of its warm-up and decay, whose steps must be 0."""
    global_batch_size: tuple[Phase, ...] = ()
    """Of train.global_batch_size, in whole multiples of batch_multiple; constant or linear."""
    batch_multiple: int = 1
    """Sequences of which every batch is a multiple while global_batch_size moves."""
    bias_update_speed: tuple[Phase, ...] = ()
    """Of model.bias_update_speed."""
    mtp_loss_weight: tuple[Phase, ...] = ()
    """Of model.mtp_loss_weight."""

    @property
    def in_tokens(self) -> tuple[str, ...]:
        """The keys with a phase that ends after a number of tokens: their values depend on the size of past batches."""
        found = []
        for name in (leaf.name for leaf in fields(self) if leaf.name != "batch_multiple"):
            ends = [phase.until for phase in getattr(self, name) if phase.until is not None]
            if any(parse_position(until)[1] == "tokens" for until in ends):
                found.append(name)
        return tuple(found)

    def __post_init__(self) -> None:
        if self.batch_multiple < 1:
            raise ValueError(f"phases.batch_multiple={self.batch_multiple} must be at least 1")
        for leaf in fields(self):
            if leaf.name != "batch_multiple":
                for at, phase in enumerate(getattr(self, leaf.name)[:-1]):
                    if phase.until is None:
                        raise ValueError(f"phases.{leaf.name}[{at}].until=null must be given: another phase follows")


@dataclass(frozen=True)
class StepValues:
    """What one step trains with. ``first_sequence``: sequences of all steps before it."""

    global_batch_size: int
    first_sequence: int
    learning_rate: float
    bias_update_speed: float
    mtp_loss_weight: float


class RunValues:
    """The values of every step of a run of ``steps``.

    Raises ValueError for courses that contradict the keys they vary, naming both.
    """

    def __init__(
        self,
        phases: PhasesConfig,
        steps: int,
        sequence_length: int,
        global_batch_size: int,
        optimizer: OptimizerConfig,
        bias_update_speed: float,
        mtp_loss_weight: float,
    ) -> None:
        self.batches = Batches(phases, sequence_length, global_batch_size)
        _check_peak("learning_rate", phases.learning_rate, "optimizer.learning_rate", optimizer.learning_rate)
        _check_peak("bias_update_speed", phases.bias_update_speed, "model.bias_update_speed", bias_update_speed)
        _check_peak("mtp_loss_weight", phases.mtp_loss_weight, "model.mtp_loss_weight", mtp_loss_weight)
        if phases.learning_rate:
            for key in ("warmup_steps", "decay_steps"):
                if getattr(optimizer, key):
                    raise ValueError(
                        f"optimizer.{key}={getattr(optimizer, key)} must be 0: phases.learning_rate takes its place"
                    )
        rates = phases.learning_rate or warm_up_and_decay(optimizer, steps)
        self._learning_rate = Course("learning_rate", rates, self.batches)
        speeds = phases.bias_update_speed or (Phase(bias_update_speed),)
        self._bias_update_speed = Course("bias_update_speed", speeds, self.batches)
        weights = phases.mtp_loss_weight or (Phase(mtp_loss_weight),)
        self._mtp_loss_weight = Course("mtp_loss_weight", weights, self.batches)

    def at(self, step: int) -> StepValues:
        """``step`` counts from 0."""
        return StepValues(
            self.batches.size(step),
            self.batches.sequences_before(step),
            self._learning_rate.at(step),
            self._bias_update_speed.at(step),
            self._mtp_loss_weight.at(step),
        )


@dataclass(frozen=True)
class Level:
    """From step ``step`` on, before which ``sequences`` were taken, every step takes ``size`` of them."""

    step: int
    sequences: int
    size: int


class Batches:
    """The batch size of every step, and the sequences before it."""

    def __init__(self, phases: PhasesConfig, sequence_length: int, constant: int) -> None:
        self.sequence_length = sequence_length
        self.levels = [Level(0, 0, constant)]
        if phases.global_batch_size:
            _check_peak("global_batch_size", phases.global_batch_size, "train.global_batch_size", constant)
            self.levels = _levels(phases.global_batch_size, phases.batch_multiple, sequence_length)
        self._steps = [level.step for level in self.levels]
        self._sequences = [level.sequences for level in self.levels]

    def size(self, step: int) -> int:
        return self._level(step).size

    def sequences_before(self, step: int) -> int:
        level = self._level(step)
        return level.sequences + (step - level.step) * level.size

    def tokens_before(self, step: int) -> int:
        return self.sequences_before(step) * self.sequence_length

    def steps_until(self, tokens: int) -> int:
        """The fewest steps that take so many tokens."""
        sequences = -(-tokens // self.sequence_length)
        level = self.levels[bisect_right(self._sequences, sequences) - 1]
        return level.step - (level.sequences - sequences) // level.size

    def _level(self, step: int) -> Level:
        return self.levels[bisect_right(self._steps, step) - 1]


class Course:
    """One value over the run. ``name``: of its key in ``phases``, for messages."""

    def __init__(self, name: str, phases: Sequence[Phase], batches: Batches) -> None:
        self._phases, self._batches = phases, batches
        self._spans: list[tuple[Unit, float, float]] = []  # unit, beginning and end of each phase
        self._starts: list[float] = []
        unit: Unit = "steps"
        end, value = 0.0, 0.0
        for at, phase in enumerate(phases):
            begin, until = end, math.inf
            if phase.until is not None:
                until, wanted = parse_position(phase.until)
                if wanted != unit:
                    begin = batches.tokens_before(int(end)) if wanted == "tokens" else batches.steps_until(int(end))
                    unit = wanted
                if until <= begin:
                    raise ValueError(_too_early(name, at, phase, f"{begin:.0f} {unit}"))
            self._spans.append((unit, begin, until))
            self._starts.append(value if phase.start is None else phase.start)
            end, value = until, phase.end

    def at(self, step: int) -> float:
        """The value at the end of a step, which counts from 0."""
        done = {"steps": step + 1, "tokens": self._batches.tokens_before(step + 1)}
        for phase, start, (unit, begin, until) in zip(self._phases, self._starts, self._spans, strict=True):
            if done[unit] <= until:
                return _between(phase, start, (done[unit] - begin) / (until - begin))
        return self._phases[-1].end


def warm_up_and_decay(config: OptimizerConfig, steps: int) -> tuple[Phase, ...]:
    """The learning rate of a run of ``steps`` without phases of its own: linear warm-up, constant, then a cosine over
    the last ``decay_steps``. In a run too short for both, the warm-up keeps its length and the decay takes the rest."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = min(config.decay_steps, max(steps - warmup, 0))
    phases = [Phase(peak, f"{warmup} steps", "linear")] if warmup else []
    if not decay:
        return (*phases, Phase(peak))
    if steps - decay > warmup:
        phases.append(Phase(peak, f"{steps - decay} steps"))
    return (*phases, Phase(config.final_learning_rate, f"{steps} steps", "cosine", peak))


def parse_position(text: str) -> tuple[int, Unit]:
    """'14.3T tokens' -> (14_300_000_000_000, 'tokens'). Raises ValueError, naming ``until``."""
    match = _POSITION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"until={text!r} must be a position such as '2K steps', '469B tokens' or '14.3T tokens'")
    whole, fraction, factor, unit = match[1], match[2] or "", _UNITS[match[3]], match[4]
    amount, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    if rest or amount == 0:
        raise ValueError(f"until={text!r} must be a whole number of {unit}, above 0")
    return amount, "steps" if unit == "steps" else "tokens"


def _between(phase: Phase, start: float, done: float) -> float:
    match phase.shape:
        case "constant":
            return phase.end
        case "linear":
            return start + (phase.end - start) * done
        case "cosine":
            return phase.end + (start - phase.end) * 0.5 * (1 + math.cos(math.pi * done))
        case _:
            raise AssertionError(phase.shape)


def _check_peak(name: str, phases: Sequence[Phase], key: str, value: float) -> None:
    peak = max((each for phase in phases for each in (phase.end, phase.start or 0.0)), default=value)
    if peak != value:
        raise ValueError(
            f"{key}={value} must be the largest value of phases.{name}, {peak:g}; phases.{name}=[] leaves them out"
        )


def _too_early(name: str, at: int, phase: Phase, begin: str) -> str:
    return f"phases.{name}[{at}].until={phase.until!r} must come after the phase's beginning, {begin}"


def _levels(phases: Sequence[Phase], multiple: int, sequence_length: int) -> list[Level]:
    """The levels of a batch size that moves. Exact: whole numbers only."""
    levels: list[Level] = []
    step = sequences = before = 0
    for at, phase in enumerate(phases):
        start, end = _batch_ends(phase, at, before, multiple)
        until, unit = (None, "steps") if phase.until is None else parse_position(phase.until)
        here = step if unit == "steps" else sequences * sequence_length
        if until is not None and until <= here:
            raise ValueError(_too_early("global_batch_size", at, phase, f"{here} {unit}"))
        begin = here
        while until is None or here < until:
            size, change = (end, until) if until is None else _size(start, end, begin, until, here, multiple)
            if not levels or levels[-1].size != size:
                levels.append(Level(step, sequences, size))
            if len(levels) > LEVELS_LIMIT:
                raise ValueError(
                    f"phases.batch_multiple={multiple} must leave at most {LEVELS_LIMIT} different batch sizes"
                )
            if change is None:
                break
            each = 1 if unit == "steps" else size * sequence_length
            count = -(-(change - here) // each)
            step, sequences, here = step + count, sequences + count * size, here + count * each
        before = end
    if levels[-1].size != before:  # the last phase ends, with the value that stays
        levels.append(Level(step, sequences, before))
    return levels


def _batch_ends(phase: Phase, at: int, before: int, multiple: int) -> tuple[int, int]:
    name = f"phases.global_batch_size[{at}]"
    if phase.shape == "cosine":
        raise ValueError(f"{name}.shape=cosine must be constant or linear")
    start = before if phase.start is None else phase.start
    ends = [("start", start), ("end", phase.end)]
    if phase.shape == "constant":
        start, ends = phase.end, ends[1:]
    for key, value in ends:
        if value < 1 or value % multiple:
            raise ValueError(
                f"{name}.{key}={value:g} must be a whole number of sequences, above 0 and a multiple of "
                f"phases.batch_multiple={multiple}"
            )
    return int(start), int(phase.end)


def _size(start: int, end: int, begin: int, until: int, here: int, multiple: int) -> tuple[int, int]:
    """The batch size at ``here`` in a phase from ``begin`` to ``until``, and where the next one or the phase's end
    comes."""
    rise, length = end - start, until - begin
    size = (start + rise * (here - begin) // length) // multiple * multiple
    if rise > 0:  # the first place at which the line reaches the next multiple
        return size, min(until, begin - (start - size - multiple) * length // rise)
    if rise < 0:  # the first place at which it is below this one
        return size, min(until, begin + (start - size) * length // -rise + 1)
    return size, until
