"""What the optimizer is told: AdamW's constants, and the plain form of the learning rate's course (see phases.py)."""

from dataclasses import dataclass
from typing import Literal

_FP32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The smallest number that FP32 has in full precision, and its largest."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW over FP32 master weights. The constants are DeepSeek-V3's (report, 4.2).

    Raises ValueError, naming ``optimizer.KEY``.
    """

    learning_rate: float = 2.2e-4
    """Peak learning rate, reached at the end of the warm-up and held until the decay begins."""
    final_learning_rate: float = 2.2e-5
    """Learning rate of the run's last step, when there is a decay."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises linearly to its peak; 0 starts there."""
    decay_steps: int = 0
    """Steps at the end of the run over which a cosine goes from the peak to the final rate; 0 stays at the peak."""
    beta1: float = 0.9
    """Share of the first moment that a step keeps."""
    beta2: float = 0.95
    """Share of the second moment that a step keeps."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, a fraction a step, times the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm; a longer gradient is scaled down to it."""
    ema_decay: float = 0.0
    """Share of the parameters' moving average that a step keeps (parallel/ema.py); 0 keeps no average."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Storage of both moments."""
    backend: Literal["native", "deepspeed"] = "native"
    """Who updates the owned shards: this project's AdamW or DeepSpeed's BF16 optimizer."""

    def __post_init__(self) -> None:
        smallest, largest = _FP32
        for key in ("learning_rate", "epsilon", "clip_norm"):
            if getattr(self, key) <= 0:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be above 0")
        for key in ("epsilon", "clip_norm"):
            if not smallest <= getattr(self, key) <= largest:
                raise ValueError(
                    f"optimizer.{key}={getattr(self, key)} must be from {smallest:.4g} to {largest:.4g}, as FP32 has it"
                )
        for key in ("warmup_steps", "decay_steps", "weight_decay"):
            if getattr(self, key) < 0:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must not be negative")
        for key in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be at least 0 and below 1")
        # Both are factors of FP32 tensors in an update; the first is largest in step 1.
        for key, factor in (
            ("learning_rate / (1 - optimizer.beta1)", self.learning_rate / (1 - self.beta1)),
            ("learning_rate x optimizer.weight_decay", self.learning_rate * self.weight_decay),
        ):
            if not factor <= largest:
                raise ValueError(
                    f"optimizer.learning_rate={self.learning_rate} is too large: optimizer.{key} = {factor:g} must be "
                    f"at most {largest:.4g}, as FP32 has it"
                )
        if self.backend == "deepspeed" and self.moments != "fp32":
            raise ValueError(
                f"optimizer.moments={self.moments} must be fp32 with optimizer.backend=deepspeed, which keeps no others"
            )
        if self.decay_steps and not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"optimizer.final_learning_rate={self.final_learning_rate} must be from 0 to "
                f"optimizer.learning_rate ({self.learning_rate})"
            )
