"""From a run's configuration to the job of its ranks."""

from dataclasses import replace

import torch

from launch.config import Config, ConfigError
from parallel.worker import Job


def job_of(config: Config, device: torch.device, ranks_per_node: int, document_end: int) -> Job:
    """``ranks_per_node``: that the launcher started, where the configuration leaves it to the launcher;
    ``document_end``: the token behind a document. Raises ConfigError when dispatch cannot go by the nodes there are."""
    train, layout = config.train, config.layout
    if not layout.ranks_per_node:
        layout = replace(layout, ranks_per_node=ranks_per_node)
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
