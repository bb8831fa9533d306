"""AdamW on the owned shards, and the end of a step: reduce, clip by the global norm, update, gather.

Masters and gradients are FP32. With t the step, g the clipped gradient and d the weight decay (matrices only):

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g²
    w = w (1 - lr d) - lr / (1 - b1^t) · m / (sqrt(v / (1 - b2^t)) + eps)

Moments in BF16 are widened, updated as above and used at full precision, then rounded to nearest for storage.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.bucket import Bucket
from parallel.optimizer_config import OptimizerConfig

_BLOCK = 1 << 16  # elements a pass works on: four FP32 operands of it stay in a core's cache


class AdamW:
    """First and second moments of every bucket's shard, and the update. ``steps`` counts the updates made."""

    def __init__(self, config: OptimizerConfig, buckets: Sequence[Bucket]) -> None:
        self.config, self.buckets, self.steps = config, buckets, 0
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.moments]
        self.first = [torch.zeros_like(b.master, dtype=dtype) for b in buckets]
        self.second = [torch.zeros_like(b.master, dtype=dtype) for b in buckets]

    @torch.no_grad()
    def update(self, learning_rate: float, gradient_scale: float) -> None:
        """One step on all shards with the gradients that they hold, times ``gradient_scale``."""
        self.steps += 1
        for bucket, first, second in zip(self.buckets, self.first, self.second, strict=True):
            boundary = min(max(bucket.decay_stop - bucket.start, 0), bucket.stop - bucket.start)
            for start, stop, decay in ((0, boundary, self.config.weight_decay), (boundary, len(bucket.master), 0.0)):
                for low in range(start, stop, _BLOCK):
                    part = slice(low, min(low + _BLOCK, stop))
                    self._update_block(
                        bucket.master[part],
                        bucket.gradient[part].mul_(gradient_scale),
                        first[part],
                        second[part],
                        learning_rate,
                        decay,
                    )
            bucket.publish()

    def _update_block(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, learning_rate: float, decay: float) -> None:
        c, t = self.config, self.steps
        m32 = m if m.dtype == torch.float32 else m.float()
        v32 = v if v.dtype == torch.float32 else v.float()
        m32.lerp_(g, 1 - c.beta1)
        v32.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        denominator = v32.sqrt().div_((1 - c.beta2**t) ** 0.5).add_(c.epsilon)
        w.mul_(1 - learning_rate * decay).addcdiv_(m32, denominator, value=-learning_rate / (1 - c.beta1**t))
        if m32 is not m:
            m.copy_(m32)
            v.copy_(v32)


def clip_scale(norm: float, limit: float) -> float:
    """What gradients of this global norm are multiplied with so that it is at most ``limit`` (as torch's
    ``clip_grad_norm_`` does it)."""
    return min(1.0, limit / (norm + 1e-6))
