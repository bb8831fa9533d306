"""From a run's configuration to the job of its ranks."""

from dataclasses import replace

import torch

from launch.config import Config, ConfigError
from launch.rank import Place
from parallel.worker import Job


def job_of(config: Config, device: torch.device, here: Place, document_end: int) -> Job:
    """Raises ConfigError when dispatch cannot go by the nodes that there are."""
    train, layout = config.train, config.layout
    if not layout.ranks_per_node:
        layout = replace(layout, ranks_per_node=here.local_world_size)
    try:
        if config.dispatch.kind == "hierarchical":
            layout.check_nodes()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Job(
        model=config.model,
        layout=layout,
        schedule=config.schedule.name,
        dtype=torch.float32 if config.precision.compute == "fp32" else torch.bfloat16,
        device=device,
        seed=train.seed,
        sequence_length=train.sequence_length,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        optimizer=config.optimizer,
        dispatch=config.dispatch.kind,
        fp8=config.precision.backend if config.precision.compute == "fp8" else None,
        fp8_payload=config.fp8_payload,
        chunks=config.schedule.chunks,
        program=config.program(),
        timeout_seconds=train.timeout_seconds,
        document_start=document_end if config.data.document_boundaries == "attention" else None,
    )
