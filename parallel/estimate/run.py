"""From a step to a whole run: operations and utilisation, tokens a day, failures and checkpoints, hours and price."""

from dataclasses import dataclass
from math import sqrt

from model.config import ModelConfig
from parallel.estimate.hardware import Cluster

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Faults:
    """What failures and checkpoints do to a run of so many GPUs. Seconds.

    With a checkpoint of C seconds every t, failures every M on average, and D + R until training goes on, a useful
    second takes 1 + C/t + (D + R + t/2)/M: half an interval is lost each time. The best t is sqrt(2 C M) (Young, "A
    First Order Approximation to the Optimum Checkpoint Interval", 1974).
    """

    between_failures: float
    interval: float
    best_interval: float
    effective_fraction: float


def faults(cluster: Cluster, gpus: int, interval: float | None) -> Faults:
    """``interval``: seconds between two checkpoints; None takes the best."""
    between = cluster.gpu_hours_between_failures * 3600 / gpus
    best = sqrt(2 * cluster.checkpoint_seconds * between)
    used = best if interval is None else interval
    lost = (cluster.detection_seconds + cluster.restart_seconds + used / 2) / between
    saving = cluster.checkpoint_seconds / used if used else 0.0
    return Faults(between, used, best, 1 / (1 + saving + lost))


def model_flops(config: ModelConfig, sequence_length: int, active: int) -> tuple[float, float]:
    """(causal, non-causal) operations of one token's training, forward and backward without recomputation: six for
    each active weight, and the attention core over half or all of the S x S scores."""
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    core = 3 * 2 * sequence_length * heads * config.num_hidden_layers
    return 6.0 * active + core / 2, 6.0 * active + core
