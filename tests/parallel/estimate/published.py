"""DeepSeek-V3 as it was trained, and the cluster it was trained on."""

from dataclasses import replace
from typing import Any

from launch.plan import read_cluster
from model.config import ModelConfig
from parallel.estimate.hardware import Cluster
from parallel.estimate.plan import Run
from parallel.estimate.workload import SELECTIVE, Workload
from parallel.mesh import Layout

H800: Cluster = read_cluster("h800")
RUN = Run(steps=235000, checkpoint_every=None, active=36_624_000_000)
PUBLISHED = Workload(
    model=ModelConfig(recompute=SELECTIVE),
    layout=Layout(pipeline=16, data=128, expert=64),
    schedule="dualpipe",
    sequence_length=4096,
    micro_batch_size=1,
    microbatches=120,
    precision="fp8",
    moment_bytes=2,
    mtp=1,
)


def smaller(**changes: Any) -> Workload:
    """Four pipeline ranks and few micro-batches: a plan takes milliseconds."""
    small = replace(PUBLISHED, layout=Layout(pipeline=4, data=64, expert=64), microbatches=8)
    return replace(small, **changes)
