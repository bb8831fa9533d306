"""How long each operation takes, in any one unit of time."""

import difflib
import math
from dataclasses import dataclass, fields

from dualpipe.program import Compute, Op, Overlap

# The short names that schedules are written with, as ``parse`` reads them.
_KEYS = {
    "F": "forward",
    "I": "backward_input",
    "W": "backward_weight",
    "B": "backward",
    "FB": "overlapped",
    "p2p": "message",
    "reduce": "reduce",
    "step": "step",
    "gather": "gather",
}


@dataclass(frozen=True)
class Costs:
    """Durations of the operations. Raises ValueError, naming the key, for one that is negative or not finite."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    backward: float = math.nan  # derived unless given: backward_input + backward_weight
    overlapped: float = math.nan  # derived unless given: forward + backward
    message: float = 0.0  # from the send to the arrival at a neighbouring rank
    reduce: float = 0.0
    step: float = 0.0
    gather: float = 0.0

    def __post_init__(self) -> None:
        if math.isnan(self.backward):
            object.__setattr__(self, "backward", self.backward_input + self.backward_weight)
        if math.isnan(self.overlapped):
            object.__setattr__(self, "overlapped", self.forward + self.backward)
        short = {name: key for key, name in _KEYS.items()}
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"cost {short[field.name]}={value:g} ({field.name}) must be finite and not negative")

    @classmethod
    def parse(cls, text: str) -> "Costs":
        """From ``F=1,I=1,W=1,FB=3``; the keys are F, I, W, B, FB, p2p, reduce, step and gather, each at most once."""
        values: dict[str, float] = {}
        for part in text.split(","):
            key, _, number = (side.strip() for side in part.partition("="))
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"cost {part.strip()!r}: the keys are {', '.join(_KEYS)}{hint}")
            if _KEYS[key] in values:
                raise ValueError(f"cost {key} is given twice")
            try:
                values[_KEYS[key]] = float(number)
            except ValueError:
                raise ValueError(f"cost {key}={number} must be a number") from None
            if math.isnan(values[_KEYS[key]]):
                raise ValueError(f"cost {key}={number} must be finite and not negative")
        return cls(**values)

    def duration(self, slot: Compute | Overlap) -> float:
        """How long a computing slot takes."""
        match slot:
            case Compute(Op.FORWARD):
                return self.forward
            case Compute(Op.BACKWARD):
                return self.backward
            case Compute(Op.BACKWARD_INPUT):
                return self.backward_input
            case Compute(Op.BACKWARD_WEIGHT):
                return self.backward_weight
            case Overlap():
                return self.overlapped
            case _:
                raise AssertionError(slot)
