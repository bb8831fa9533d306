"""Weights of a checkpoint in ranges, however the checkpoint is cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.run_weights import RunWeights, newest
from model.huggingface import published
from parallel import saver
from parallel.checkpoint import CheckpointError, Progress
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.step_end import HeldStage
from parallel.worker import Job, Worker
from tests.model.tiny import tiny
from tests.ranks import run_ranks

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = tiny()
JOB = Job(
    model=MODEL,
    layout=Layout(),
    schedule="dualpipe",
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    seed=3,
    sequence_length=6,
    global_batch_size=8,
    micro_batch_size=1,
    optimizer=OptimizerConfig(ema_decay=0.9),
)


def save(rank: int, layout: Layout, folder: Path) -> None:
    """The checkpoint of a job that has taken no step, so that its masters are known; with biases that are not zero."""
    worker = Worker(replace(JOB, layout=layout), rank)
    for held in worker.held.values():
        for layer, block in held.stage.model.blocks():
            if block.router is not None:
                block.router.bias_E.copy_(torch.arange(8) + layer)
    assert worker.average is not None
    for shard in worker.average.shards:
        shard.mul_(2)
    saver.save(folder, worker, Progress(0, 0), keep=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one rank, with a chunk for each parameter, and of four, whose shards cut through them."""
    one, four = (tmp_path_factory.mktemp(name) for name in ("one", "four"))
    save(0, Layout(), one)
    run_ranks(save, 4, Layout(pipeline=2, data=2, expert=2), four)
    return [newest(one), newest(four)]


def test_every_tensor_is_read_as_it_was_drawn(checkpoints: list[Path]) -> None:
    expected = {name: value for held in Worker(JOB, 0).held.values() for name, value in masters(held).items()}
    for path in checkpoints:
        weights, average = RunWeights(path), RunWeights(path, ema=True)
        weights.check(list(published(MODEL)))
        average.check(list(published(MODEL)))
        for tensor in published(MODEL):
            found = weights.read(tensor)
            assert found.shape == torch.Size(tensor.shape)
            if tensor.is_bias:
                want = torch.arange(8.0) + int(tensor.parameter.split(".")[1])
            else:
                want = expected[tensor.parameter][tensor.offset : tensor.offset + tensor.numel]
            assert torch.equal(found.flatten(), want), (path, tensor)
            assert torch.equal(average.read(tensor).flatten(), want if tensor.is_bias else 2 * want), (path, tensor)


def test_an_average_that_was_not_kept_is_refused(tmp_path: Path) -> None:
    worker = Worker(replace(JOB, optimizer=OptimizerConfig()), 0)
    path = saver.save(tmp_path, worker, Progress(0, 0), keep=1)
    with pytest.raises(CheckpointError, match=r"--ema: .* has no average; optimizer.ema_decay above 0 keeps one"):
        RunWeights(path, ema=True)


def masters(held: HeldStage) -> dict[str, torch.Tensor]:
    """FP32 values of a stage's parameters, in a world of one rank."""
    return {
        segment.name: bucket.master[segment.start : segment.start + segment.numel]
        for bucket in held.buckets
        for segment in bucket.owned_segments()
    }


def test_a_checkpoint_of_another_model_is_refused_by_name(checkpoints: list[Path]) -> None:
    weights = RunWeights(checkpoints[0])
    for config, message in (
        (replace(MODEL, num_hidden_layers=2), r"layers.2.* is not in the run's model"),
        (replace(MODEL, num_hidden_layers=4), r"lacks master.layers.3.attn_norm.weight"),
        (replace(MODEL, kv_lora_rank=11), r"master.layers.0.attn.kv_a.weight in .* has 256 elements; .* model has 240"),
    ):
        with pytest.raises(CheckpointError, match=message):
            weights.check(list(published(config)))


def test_damaged_bytes_are_named(checkpoints: list[Path], tmp_path: Path) -> None:
    for file in checkpoints[0].iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(bytes(len(content)) if file.suffix == ".distcp" else content)
    tensor = next(published(MODEL))
    with pytest.raises(CheckpointError, match=r"master.embed.weight in .* cannot be read"):
        RunWeights(tmp_path).read(tensor)
