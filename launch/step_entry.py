"""A step as ``metrics.jsonl`` has it, and a run as ``dualpipe train --json`` prints it."""

import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from launch.metrics import median
from parallel.checkpoint import Progress
from parallel.phases import StepValues
from parallel.worker import StepResult


def step_entry(
    progress: Progress,
    result: StepResult,
    values: StepValues,
    position: int,
    sequence_length: int,
    seconds: float,
) -> dict[str, Any]:
    """A line of ``metrics.jsonl``. ``first_sequence``: where its batch begins in the data. ``tokens``: of this step;
    ``tokens_total``: up to its end, skipped ones too. Dispatch: bytes of all ranks; seconds of the mean rank in which
    its computation waited for them (exposed), and in which they were under way beside it (hidden). Compute: the seconds
    before the update in which the median rank waited for nobody, and those of the rank that took longest. Loads are by
    layer, the busiest expert over the mean; memory is rank 0's peak."""
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    tokens = values.global_batch_size * sequence_length
    memory = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes}
    if torch.cuda.is_initialized():
        memory["device_bytes"] = torch.cuda.max_memory_allocated()
    return {
        "step": progress.step,
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "balance_loss": result.balance_loss,
        **({} if result.mtp_loss is None else {"mtp_loss": result.mtp_loss, "mtp_loss_weight": values.mtp_loss_weight}),
        "grad_norm": result.grad_norm,
        "lr": values.learning_rate,
        "bias_update_speed": values.bias_update_speed,
        "sequences": values.global_batch_size,
        "first_sequence": position,
        "tokens": tokens,
        "tokens_total": progress.sequences * sequence_length,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compute": {
            "median_seconds": statistics.median(result.compute_seconds),
            "longest_seconds": max(result.compute_seconds),
            "longest_rank": result.compute_seconds.index(max(result.compute_seconds)),
        },
        "dispatch": {
            "inside_node_bytes": result.traffic.inside_bytes,
            "between_nodes_bytes": result.traffic.between_bytes,
            "exposed_seconds": result.times.exposed_s,
            "hidden_seconds": result.times.hidden_s,
        },
        "expert_load": {str(layer): load for layer, load in result.expert_load.items()},
        "peak_activations": result.peak_activations,
        "memory": memory,
    }


def summary(entries: list[dict[str, Any]], validation: float | None, run: Path, stopped: bool) -> dict[str, Any]:
    """The end of a run as one object, for ``--json``."""
    return {
        "run_dir": str(run),
        "steps": entries[-1]["step"] if entries else 0,
        "stopped": stopped,
        "loss_first": entries[0].get("loss") if entries else None,
        "loss_last": entries[-1].get("loss") if entries else None,
        "mtp_loss_last": entries[-1].get("mtp_loss") if entries else None,
        "validation_bits_per_byte": validation,
        "step_seconds": median(entries, "step_seconds"),
        "tokens_per_second": median(entries, "tokens_per_second"),
    }
