"""How long each operation takes, in any one unit of time, and how many bytes each activation.

Durations are given for a whole stage (``F=1,I=1,W=1,FB=3``) or, all ten of them, for the phases of one layer
(``attn_F=..,dispatch_F=..``); then an operation takes the critical path of its plan in ``overlap.py``. A stage or a
link may differ from the others: ``F@0=1.5`` for stage 0, ``F@-1=2`` for the last one, ``p2p@3-4=0.2`` for the links
between ranks 3 and 4.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dualpipe import overlap
from dualpipe.program import Op, Program

# The keys that schedules and their costs are written with, as ``parse`` reads them -> fields of ``Costs``.
OF_A_STAGE = {
    "F": "forward",
    "I": "backward_input",
    "W": "backward_weight",
    "B": "backward",
    "layers": "layers",
    "bytes": "activation_bytes",
}
OF_A_LINK = {"p2p": "message", "link": "link"}
OF_THE_STEP = {"FB": "overlapped", "reduce": "reduce", "step": "step", "gather": "gather"}
PHASES: dict[str, overlap.Part] = {f"{phase.value}_{op.value}": (phase, op) for phase, op in overlap.PARTS}
KEYS = (*OF_A_STAGE, *OF_A_LINK, *OF_THE_STEP, *PHASES)

_LONG = OF_A_STAGE | OF_A_LINK | OF_THE_STEP
_SHORT = {name: key for key, name in _LONG.items()}


LARGEST = 1e100
"""What a cost may be at most, in whatever unit."""


@dataclass(frozen=True)
class Costs:
    """Durations of the operations, and bytes. Raises ValueError, naming the key, for what cannot be.

    ``at_stage`` and ``at_link`` hold the values that differ, under (field, stage) and (field, rank, rank); a negative
    stage counts from the last. ``at_pair`` holds overlapped pairs whose duration is known by itself, under (stage of
    the forward, stage of the backward). With ``phases``, the durations of F, I, W, B and FB come from them and from
    ``layers``.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    backward: float = math.nan  # derived unless given: backward_input + backward_weight
    overlapped: float = math.nan  # derived unless given: forward + backward
    message: float = 0.0  # latency: from a message's leaving the link to its arrival
    link: float = 0.0  # how long a message occupies its link: bytes / bandwidth
    reduce: float = 0.0
    step: float = 0.0
    gather: float = 0.0
    layers: int = 1  # of a stage; counts with phases only
    activation_bytes: float = math.nan  # of one micro-batch in one stage; unknown unless given
    phases: Mapping[overlap.Part, float] | None = None  # of one layer
    at_stage: Mapping[tuple[str, int], float] = field(default_factory=dict)
    at_link: Mapping[tuple[str, int, int], float] = field(default_factory=dict)
    at_pair: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.backward):
            object.__setattr__(self, "backward", self.backward_input + self.backward_weight)
        if math.isnan(self.overlapped):
            object.__setattr__(self, "overlapped", self.forward + self.backward)
        for name, key in _SHORT.items():
            if name != "activation_bytes" or not math.isnan(self.activation_bytes):
                _check(key, name, getattr(self, name))
        for (name, stage), value in self.at_stage.items():
            _check(f"{_SHORT[name]}@{stage}", name, value)
        for (name, one, other), value in self.at_link.items():
            _check(f"{_SHORT[name]}@{one}-{other}", name, value)
        for (forward, backward), value in self.at_pair.items():
            _check(f"FB of stages {forward} and {backward}", "overlapped", value)
        for key, part in PHASES.items():
            if self.phases is not None:
                _check(key, "a phase of one layer", self.phases[part])
        if any(name == "activation_bytes" for name, _ in self.at_stage) and math.isnan(self.activation_bytes):
            raise ValueError("cost bytes is missing: bytes@STAGE is for a stage that differs from the others")

    @classmethod
    def parse(cls, text: str) -> "Costs":
        """From ``F=1,I=1,W=1,FB=3``: KEY=VALUE, KEY@STAGE=VALUE or KEY@RANK-RANK=VALUE, each at most once."""
        values = _read(text)
        names = [name for name, _ in values]
        phases = {part: values.pop((key, ())) for key, part in PHASES.items() if (key, ()) in values}
        if phases and (missing := [key for key, part in PHASES.items() if part not in phases]):
            raise ValueError(f"cost {', '.join(missing)} missing: phases are given all or none")
        whole = [name for name in names if name in ("F", "I", "W", "B", "FB")]
        common = [name for name in whole if (name, ()) in values]
        if common and not phases and (missing := [key for key in ("F", "I", "W") if (key, ()) not in values]):
            raise ValueError(f"cost {', '.join(missing)} missing: F, I and W are given all or none, B and FB with them")
        if phases and whole:
            raise ValueError(f"cost {whole[0]} and phases such as attn_F exclude each other: the phases decide it")
        if not phases and "layers" in names:
            raise ValueError("cost layers counts with the phases of a layer only (attn_F, ...), and none is given")
        layers = values.pop(("layers", ()), 1)
        _check("layers", "layers", layers)
        plain: dict[str, float] = {}
        at_stage: dict[tuple[str, int], float] = {}
        at_link: dict[tuple[str, int, int], float] = {}
        for (name, place), value in values.items():
            match place:
                case ():
                    plain[_LONG[name]] = value
                case (stage,):
                    at_stage[_LONG[name], stage] = value
                case (one, other):
                    at_link[_LONG[name], one, other] = at_link[_LONG[name], other, one] = value
                case _:
                    raise AssertionError(place)
        return cls(**plain, layers=int(layers), phases=phases or None, at_stage=at_stage, at_link=at_link, at_pair={})

    def scaled(self, share: float) -> "Costs":
        """The costs of stages that hold ``share`` of what a stage of these costs holds.

        Messages stay as they are, and so does the step, which is of a rank and not of a stage. Raises ValueError for
        costs of single stages, which have no counterpart, and for layers that ``share`` does not divide.
        """
        if self.at_stage:
            name, stage = next(iter(self.at_stage))
            raise ValueError(f"cost {_SHORT[name]}@{stage}: stages of one schedule are not those of another")
        if self.at_pair:
            raise ValueError("cost FB of single pairs: stages of one schedule are not those of another")
        layers = self.layers * share
        if self.phases is not None and layers != int(layers):
            raise ValueError(f"layers={self.layers} cannot be cut into {1 / share:g} stages")
        return replace(
            self,
            forward=self.forward * share,
            backward_input=self.backward_input * share,
            backward_weight=self.backward_weight * share,
            backward=self.backward * share,
            overlapped=self.overlapped * share,
            reduce=self.reduce * share,
            gather=self.gather * share,
            activation_bytes=self.activation_bytes * share,
            layers=max(1, int(layers)),
        )


class CostTable:
    """The costs of one program, looked up by stage and link. Raises ValueError for a stage or rank it has not."""

    def __init__(self, costs: Costs, program: Program) -> None:
        self.costs = costs
        stages = range(program.stages)
        self._own: dict[tuple[str, int], float] = {}
        for (name, stage), value in costs.at_stage.items():
            place = stage + program.stages if stage < 0 else stage
            if place not in stages:
                raise ValueError(f"cost {_SHORT[name]}@{stage}: the stages are 0 .. {program.stages - 1}")
            if (name, place) in self._own:
                raise ValueError(f"cost {_SHORT[name]}@{stage}: the same stage is given twice, once from the end")
            self._own[name, place] = value
        for name, one, other in costs.at_link:
            if one == other or max(one, other) >= program.ranks:
                rule = f"must name two of the ranks 0 .. {program.ranks - 1}"
                raise ValueError(f"cost {_SHORT[name]}@{one}-{other} {rule}")
        for pair in costs.at_pair:
            if not {*pair} <= {*stages}:
                raise ValueError(f"cost FB of stages {pair[0]} and {pair[1]}: the stages are 0 .. {program.stages - 1}")
        self._layers = [int(self._value("layers", stage)) for stage in stages]
        self._pairs = dict(costs.at_pair)
        self.of: dict[Op, list[float]] = {op: [self._duration(op, stage) for stage in stages] for op in Op}
        self.activation_bytes = [self._value("activation_bytes", stage) for stage in stages]
        self.knows_bytes = not math.isnan(costs.activation_bytes)

    def pair(self, forward_stage: int, backward_stage: int) -> float:
        """The duration of an overlapped pair: its own, where ``at_pair`` has it.

        Given for whole stages, it overlaps as well as the common one: FB scaled by what F and B take in these stages
        against what they take in common.
        """
        key = (forward_stage, backward_stage)
        if key not in self._pairs:
            self._pairs[key] = self._pair(*key)
        return self._pairs[key]

    def transfer(self, source: int, target: int) -> tuple[float, float]:
        """How long a message occupies the link from rank to rank, and the latency that follows."""
        own, link = self.costs.at_link, (source, target)
        return own.get(("link", *link), self.costs.link), own.get(("message", *link), self.costs.message)

    def _pair(self, forward_stage: int, backward_stage: int) -> float:
        costs = self.costs
        if costs.phases is not None:
            layers = self._layers[forward_stage], self._layers[backward_stage]
            return overlap.duration(overlap.pair_plan(*layers), costs.phases)
        common = costs.forward + costs.backward
        alone = self.of[Op.FORWARD][forward_stage] + self.of[Op.BACKWARD][backward_stage]
        if alone == common:
            return costs.overlapped
        return costs.overlapped * alone / common if common else alone

    def _duration(self, op: Op, stage: int) -> float:
        if self.costs.phases is not None:
            return overlap.duration(overlap.plan(op, self._layers[stage]), self.costs.phases)
        match op:
            case Op.FORWARD:
                return self._value("forward", stage)
            case Op.BACKWARD_INPUT:
                return self._value("backward_input", stage)
            case Op.BACKWARD_WEIGHT:
                return self._value("backward_weight", stage)
            case Op.BACKWARD:
                parts = [name for name in ("backward_input", "backward_weight") if (name, stage) in self._own]
                if parts and ("backward", stage) not in self._own:
                    return self._value("backward_input", stage) + self._value("backward_weight", stage)
                return self._value("backward", stage)
            case _:
                raise AssertionError(op)

    def _value(self, name: str, stage: int) -> float:
        return self._own.get((name, stage), getattr(self.costs, name))


_KEY = re.compile(r"([A-Za-z0-9_]+)(?:@(-?[0-9]{1,9})|@([0-9]{1,9})-([0-9]{1,9}))?")


def _read(text: str) -> dict[tuple[str, tuple[int, ...]], float]:
    """The number of each key and place: () for all, (stage,), or the two ranks of a link."""
    values: dict[tuple[str, tuple[int, ...]], float] = {}
    for part in text.split(","):
        key, _, number = (side.strip() for side in part.partition("="))
        name, place = _key(key)
        if (name, place) in values:
            raise ValueError(f"cost {key} is given twice")
        try:
            values[name, place] = float(number)
        except ValueError:
            raise ValueError(f"cost {key}={number} must be a number") from None
        if math.isnan(values[name, place]):
            raise ValueError(f"cost {key}={number} must be finite and not negative")
    return values


def _key(key: str) -> tuple[str, tuple[int, ...]]:
    """A key's name and place. Only what a stage or a link can have of its own takes a place."""
    found = _KEY.fullmatch(key)
    name = found[1] if found else key.partition("@")[0]
    if name not in KEYS:
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"cost {key!r}: the keys are {', '.join(KEYS)}{hint}")
    place = tuple(sorted(int(number) for number in found.groups()[1:] if number is not None)) if found else None
    wanted = 1 if name in OF_A_STAGE else 2 if name in OF_A_LINK else 0
    if place is None or len(place) not in (0, wanted):
        stage, link = ", ".join(OF_A_STAGE), ", ".join(OF_A_LINK)
        raise ValueError(f"cost {key}: {stage} take a stage (F@0, F@-1), {link} two ranks (p2p@3-4), others nothing")
    return name, place


def _check(key: str, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"cost {key}={value:g} ({name}) must be finite and not negative")
    if value > LARGEST:
        raise ValueError(f"cost {key}={value:g} ({name}) must be at most {LARGEST:g}: sums of it must be numbers")
    if name == "layers" and (value != int(value) or value < 1):
        raise ValueError(f"cost {key}={value:g} must be a whole number of layers, at least 1")
