"""``optimizer.backend: deepspeed``: DeepSpeed's ZeRO-1 ``BF16_Optimizer`` updates the owned shards.

One of them drives each bucket, with the bucket's flat buffer as its only parameter and the bucket's replica group as
its data-parallel group. A bucket's size is a multiple of what DeepSpeed aligns to, so its flattening is the identity
and its partitions are the bucket's shards. The FP32 masters, gradients and moments are DeepSpeed's; those of the bucket
and of checkpoints are views of them, hence a checkpoint does not depend on the backend that wrote it.

The ends of a step that the program names stay its own: REDUCE has summed the gradients before DeepSpeed sees them, and
what DeepSpeed would gather at the end of its step is left to GATHER. Its clipping is off: it knows one bucket, and the
norm is global.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.bucket import Bucket
from parallel.optimizer_config import OptimizerConfig


class BackendUnavailable(ValueError):
    """``optimizer.backend`` names a package that is not here; one line that says what to install."""


class DeepSpeedAdamW:
    """The same update as ``optimizer.AdamW`` with FP32 moments, bit for bit, for FP32 and BF16 parameters.

    Moves ``master`` and ``gradients`` of every bucket into DeepSpeed's buffers, with the values that they have; the
    tensors in ``Bucket.buffers`` stay the same objects. Raises BackendUnavailable.
    """

    def __init__(self, config: OptimizerConfig, buckets: Sequence[Bucket]) -> None:
        assert config.moments == "fp32", config.moments
        _require(buckets[0].parameters.device)
        self.config, self.buckets, self.steps = config, buckets, 0
        self._wrapped = [_wrap(config, bucket) for bucket in buckets]
        self._states = [_state(wrapped) for wrapped in self._wrapped]
        self.first = [state["exp_avg"] for state in self._states]
        self.second = [state["exp_avg_sq"] for state in self._states]

    @torch.no_grad()
    def update(self, learning_rate: float, gradient_scale: float) -> None:
        """One step on all shards with the gradients that they hold, times ``gradient_scale``; zeroes the gradients."""
        kept = 1 - learning_rate * self.config.weight_decay
        for bucket, wrapped, state in zip(self.buckets, self._wrapped, self._states, strict=True):
            bucket.gradient.mul_(gradient_scale)
            # Decoupled decay is the first thing that AdamW does to a weight. A shard holds matrices and vectors, and
            # torch's AdamW knows one decay for a tensor, so that decay comes from here.
            bucket.master[: max(bucket.decay_stop - bucket.start, 0)].mul_(kept)
            wrapped.param_groups[0]["lr"] = learning_rate
            state["step"].fill_(self.steps)
            # DeepSpeed refuses a step in which no gradient came through its own hooks.
            wrapped.fp32_groups_has_gradients[0][0] = True
            with _replica_groups():
                wrapped.step()
            bucket.changed()
            assert not wrapped.overflow, "a finite gradient, clipped, has a finite norm"
        self.steps += 1


class _ReplicaGroups:
    """What DeepSpeed asks of its communication backend; a process group of it is a ``Bucket``.

    ``deepspeed.init_distributed`` would compile a C++ operator before it used torch's groups, and has no answer for a
    bucket that is alone or for a process without torch.distributed.
    """

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group: Bucket | None) -> int:
        if group is None:  # asked for the rank that prints the machine's memory, a dozen times a bucket
            return -1
        return group.start // (group.stop - group.start)

    def get_world_size(self, group: Bucket) -> int:
        return group.replicas

    def has_all_gather_into_tensor(self) -> bool:
        return True

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Bucket, async_op: bool
    ) -> None:
        """Nothing: the program's GATHER does it, when the schedule says so."""


@contextlib.contextmanager
def _replica_groups() -> Iterator[None]:
    """DeepSpeed asks ``_ReplicaGroups`` in here. It keeps its backend in a global, which is put back."""
    from deepspeed.comm import comm

    before, comm.cdb = comm.cdb, _ReplicaGroups()
    try:
        yield
    finally:
        comm.cdb = before


def _require(device: torch.device) -> None:
    """Import what is used of DeepSpeed. Raises BackendUnavailable when that is not here."""
    # Without this it looks for an accelerator by itself, and may take another than the job's.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed.comm.comm
        import deepspeed.runtime.bf16_optimizer
        import deepspeed.runtime.precision_config  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"optimizer.backend=deepspeed needs DeepSpeed 0.19.8, which cannot be imported ({error}): "
            f"pip install deepspeed==0.19.8, or set optimizer.backend=native"
        ) from error


def _wrap(config: OptimizerConfig, bucket: Bucket) -> Any:
    """A ``BF16_Optimizer`` of one bucket, holding its masters, gradients and zero moments."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    flat = nn.Parameter(bucket.parameters)
    # One tensor at a time, the plain way: torch's fused kernel rounds differently from the formula in optimizer.py.
    adamw = torch.optim.AdamW(
        [flat],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=0.0,
        foreach=False,
    )
    with _replica_groups():
        wrapped = BF16_Optimizer(
            adamw,
            param_names={flat: "bucket"},
            bfloat16_config=DeepSpeedBF16Config(enabled=True),
            dp_process_group=bucket,
            grad_acc_dtype=torch.float32,
        )
    assert wrapped.bf16_groups_flat[0].data_ptr() == bucket.parameters.data_ptr(), "flattening must be the identity"
    _move_in(bucket, wrapped)
    master = wrapped.fp32_groups_flat_partition[0]
    # As torch's AdamW makes it in its first step, which a checkpoint cannot wait for.
    wrapped.state[master].update(
        step=torch.tensor(0.0), exp_avg=torch.zeros_like(bucket.master), exp_avg_sq=torch.zeros_like(bucket.master)
    )
    return wrapped


def _move_in(bucket: Bucket, wrapped: Any) -> None:
    """Make the bucket's masters and gradients views of DeepSpeed's, with the values that they have."""
    master, gradients = wrapped.fp32_groups_flat_partition[0].detach(), wrapped.fp32_groups_gradients_flat[0]
    assert master.shape == bucket.master.shape and gradients.shape == bucket.gradients.shape
    bucket.master = master.copy_(bucket.master)  # DeepSpeed had only the parameters, which may be rounded
    bucket.gradients = gradients.copy_(bucket.gradients)
    for segment, view in zip(bucket.segments, bucket.buffers.values(), strict=True):
        view.data = gradients[segment.start : segment.start + segment.numel].view_as(view)
    # The gradients whose norm DeepSpeed checks: the other shards' need not be summed here (NCCL's reduce-scatter).
    wrapped.fp32_groups_gradients[0][0] = bucket.gradient


def _state(wrapped: Any) -> dict[str, Tensor]:
    """Step and moments of the one tensor that torch's AdamW updates."""
    state: dict[str, Tensor] = wrapped.state[wrapped.fp32_groups_flat_partition[0]]
    return state
