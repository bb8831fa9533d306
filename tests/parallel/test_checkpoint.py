"""Checkpoints: a run goes on as if it had never stopped, on any layout, and what is damaged or foreign is refused."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from errno import EIO, ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from parallel import checkpoint, manifest
from parallel.checkpoint import CheckpointError, DamagedCheckpointError, Progress, load, missing, published
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.saver import Saver, save
from parallel.shard_file import ShardFile
from parallel.worker import Job, StepResult, Worker
from tests.model.tiny import tiny
from tests.ranks import run_ranks

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = tiny(num_hidden_layers=4, num_nextn_predict_layers=1)
JOB = Job(
    model=MODEL,
    layout=Layout(),
    schedule="dualpipe",
    dtype=torch.float32,
    device=torch.device("cpu"),
    seed=3,
    sequence_length=6,
    global_batch_size=16,
    micro_batch_size=1,
    optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=0.5),
)
BF16 = replace(JOB, dtype=torch.bfloat16, optimizer=replace(JOB.optimizer, moments="bf16"))
LAYOUTS = {Layout(1): "dualpipe", Layout(4): "1f1b", Layout(2, 2, 2): "dualpipe"}
"""And the schedule on each. First and last stage share the embedding, or, under 1F1B, each has a copy of it."""
BEFORE, AFTER = 2, 2
"""Steps before and after the checkpoint."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """torch's checkpoint logs every call, which would bury a failure."""
    caplog.set_level("WARNING", "c10d-NullHandler-dcp_logger")


def step(worker: Worker, number: int, **options: Any) -> StepResult:
    job = worker.job
    generator = torch.Generator().manual_seed(number)
    shape = (job.global_batch_size, job.sequence_length + 1)
    tokens = torch.randint(0, job.model.vocab_size, shape, generator=generator)
    first, count = worker.rows(job.global_batch_size)
    return worker.train_step(tokens[first : first + count], job.optimizer.learning_rate, **options)


def figures(worker: Worker) -> list[Any]:
    """Of the steps after the checkpoint: losses and gradient norms, and what the rank's generator draws."""
    results = [step(worker, BEFORE + number) for number in range(AFTER)]
    return [[r.loss for r in results], [r.grad_norm for r in results], torch.rand(3).tolist()]


def write(rank: int, layout: Layout, folder: Path) -> dict[str, list[Any]]:
    """Save in the middle and go on."""
    found = {}
    for name, job in (("fp32", JOB), ("bf16", BF16)):
        torch.manual_seed(100 + rank)
        worker = Worker(replace(job, layout=layout, schedule=LAYOUTS[layout]), rank)
        for number in range(BEFORE):
            step(worker, number)
        save(folder / name, worker, Progress(BEFORE, BEFORE * job.global_batch_size), keep=1)
        found[name] = figures(worker)
    return found


def state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as a whole, but for the generators' states, of which each rank has its own."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name for name in stored if not name.startswith("rng.")]
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    load_distributed(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def assert_same_state(rank: int, path: Path, worker: Worker, progress: Progress) -> None:
    """What a worker loaded, to the bit, masters, moments and biases: it saves the same again. Collective."""
    folder = path.parent / f"again-{worker.job.layout.world_size}"
    again = save(folder, worker, progress, keep=1)
    if rank == 0:
        loaded, before = state(again), state(path)
        assert loaded.keys() == before.keys() and any(name.startswith("bias.") for name in before)
        assert all(torch.equal(loaded[name], before[name]) for name in before)
        assert (again / "state.json").read_bytes() == (path / "state.json").read_bytes()


def resume(rank: int, layout: Layout, written: list[tuple[str, Path]]) -> list[list[Any]]:
    """Go on from each of the checkpoints, in a worker whose own initial values are others."""
    found = []
    for name, folder in written:
        torch.manual_seed(200 + rank)
        job = JOB if name == "fp32" else BF16
        worker = Worker(replace(job, layout=layout, schedule=LAYOUTS[layout], seed=77), rank)
        (path,) = published(folder / name)
        progress = load(path, worker)
        assert progress == Progress(BEFORE, BEFORE * JOB.global_batch_size)
        assert_same_state(rank, path, worker, progress)
        found.append(figures(worker))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(f"written{number}") for number in range(len(LAYOUTS))]


@pytest.fixture(scope="module")
def written(folders: list[Path]) -> list[list[dict[str, list[Any]]]]:
    """For every layout what its ranks did after their checkpoint."""
    return [
        run_ranks(write, layout.world_size, layout, folder) for layout, folder in zip(LAYOUTS, folders, strict=True)
    ]


@pytest.mark.parametrize("reader", range(len(LAYOUTS)), ids=str)
def test_a_run_goes_on_from_a_checkpoint_of_any_layout(
    reader: int, folders: list[Path], written: list[list[dict[str, list[Any]]]]
) -> None:
    layout = list(LAYOUTS)[reader]
    sources = [("fp32", folder) for folder in folders] + [("bf16", folders[reader])]
    ranks = run_ranks(resume, layout.world_size, layout, sources)
    for writer in range(len(LAYOUTS)):
        losses, norms, _ = written[writer][0]["fp32"]
        for rank in ranks:
            got_losses, got_norms, _ = rank[writer]
            assert got_losses == pytest.approx(losses, rel=1e-5)
            assert got_norms == pytest.approx(norms, rel=1e-5)
    # The layout that wrote it goes on with the same bits, and every rank's generator where it was.
    for rank, before in zip(ranks, written[reader], strict=True):
        assert rank[reader] == before["fp32"]
        assert rank[-1] == before["bf16"]


@contextmanager
def writer_fails() -> Iterator[None]:
    def no_space(*arguments: Any, **options: Any) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with patch.object(ShardFile, "write", no_space):
        yield


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 10 kB: the kernel's own refusal in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def flush_fails() -> Iterator[None]:
    with patch.object(checkpoint, "fsync", side_effect=OSError(EIO, os.strerror(EIO))):
        yield


@contextmanager
def renamed(before: Callable[[Path], None]) -> Iterator[None]:
    """Call ``before`` with the folder that is about to get its name."""
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        if Path(target).name.startswith("step-"):
            before(Path(source))
        rename(source, target)

    with patch.object(os, "rename", watched):
        yield


def rename_fails() -> AbstractContextManager[None]:
    def fail(folder: Path) -> None:
        raise OSError(EIO, os.strerror(EIO))

    return renamed(fail)


# Which rank fails, how, and what the user must be told.
FAILURES: list[tuple[int, Callable[[], AbstractContextManager[Any]], str]] = [
    (0, writer_fails, "No space left on device"),
    (1, writer_fails, "No space left on device"),
    (3, writer_fails, "No space left on device"),
    (2, small_files, "File too large"),
    (0, flush_fails, "Input/output error"),
    (0, rename_fails, "Input/output error"),
]


def fail_to_save(rank: int, folder: Path) -> list[tuple[str, list[str], str | None]]:
    """For every failure, and at last without one: (what was raised, what is in the folder, what the old one lacks)."""
    worker = Worker(replace(JOB, layout=Layout(2, 2, 2)), rank)
    step(worker, 0)
    old = save(folder, worker, Progress(1, 16), keep=5)
    found = []
    for place, failure, _ in [*FAILURES, (-1, nullcontext, "")]:
        raised = ""
        try:
            with failure() if rank == place else nullcontext():
                save(folder, worker, Progress(2, 32), keep=5)
        except CheckpointError as error:
            raised = str(error)
        dist.barrier()
        found.append((raised, sorted(os.listdir(folder)), missing(old)))
        dist.barrier()
    assert load(old, worker) == Progress(1, 16)
    step(worker, 1)
    return found


def test_a_save_that_fails_anywhere_fails_everywhere_and_leaves_the_old_one(tmp_path: Path) -> None:
    for rank in run_ranks(fail_to_save, 4, tmp_path):
        *failed, (raised, names, lacking) = rank
        for (place, _, message), (error, left, old_lacks) in zip(FAILURES, failed, strict=True):
            assert error.startswith(f"checkpoint {tmp_path}/step-00000002 cannot be written: "), place
            assert error.endswith(message) and "\n" not in error
            assert left == ["step-00000001"] and old_lacks is None
        assert (raised, names, lacking) == ("", ["step-00000001", "step-00000002"], None)


def unwritable(rank: int, folder: Path) -> str:
    worker = Worker(replace(JOB, layout=Layout(2)), rank)
    with pytest.raises(CheckpointError) as raised:
        save(folder, worker, Progress(1, 16), keep=1)
    # Whoever was told stays: a rank that is still waiting for another would not get here.
    dist.barrier()
    return str(raised.value)


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in run_ranks(unwritable, 2, tmp_path / "file" / "checkpoints"):
        assert message.endswith("cannot be written: Not a directory")


def alone(seed: int = 3, **changes: Any) -> Worker:
    """A worker that is the whole world."""
    return Worker(replace(JOB, model=replace(MODEL, **changes), seed=seed), 0)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worker = alone()
    step(worker, 0)
    return save(tmp_path_factory.mktemp("complete"), worker, Progress(1, 16), keep=1)


def files(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_what_is_absent_or_truncated_is_named(complete: Path, tmp_path: Path) -> None:
    assert missing(complete) is None
    data = [name for name in files(complete) if name.endswith(".distcp")]
    assert set(files(complete)) == {".metadata", "manifest.json", "state.json", *data} and data
    for name in files(complete):
        copy = shutil.copytree(complete, tmp_path / name / "absent")
        (copy / name).unlink()
        assert missing(copy) == f"{name} is missing"
        with pytest.raises(DamagedCheckpointError, match=f"checkpoint {copy} is incomplete: {name} is missing"):
            load(copy, alone())
    for name in files(complete):
        size = (complete / name).stat().st_size
        for left in {0, size // 2, size - 2}:
            copy = shutil.copytree(complete, tmp_path / name / str(left))
            os.truncate(copy / name, left)
            found = missing(copy)
            assert found is not None, (name, left, size)
            if name in data:
                assert name in found and f"{left} of {size} bytes" in found


def test_a_checkpoint_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    worker, seen = alone(), []
    with renamed(lambda folder: seen.append((missing(folder), published(tmp_path)))):
        path = save(tmp_path, worker, Progress(1, 16), keep=1)
    assert seen == [(None, [])]
    assert published(tmp_path) == [path] and missing(path) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    worker = alone()
    for number in (1, 2, 3, 11):
        save(tmp_path, worker, Progress(number, 16 * number), keep=2)
    assert files(tmp_path) == ["step-00000003", "step-00000011"]
    # A run that was resumed from before it writes a step again.
    step(worker, 0)
    with (
        patch.object(FileSystemReader, "read_metadata", side_effect=AssertionError("an index was read")),
        patch.object(manifest, "problem", side_effect=AssertionError("a checkpoint was read")),
    ):
        path = save(tmp_path, worker, Progress(11, 176), keep=2)
    assert files(tmp_path) == ["step-00000003", "step-00000011"]
    again = alone(seed=5)
    load(path, again)
    assert step(again, 1).loss == step(worker, 1).loss


def test_a_save_that_was_cut_off_while_it_replaced_one_does_not_stop_later_ones(tmp_path: Path) -> None:
    """On a file system that cannot swap two names."""
    worker = alone()
    first = save(tmp_path, worker, Progress(1, 16), keep=2)
    shutil.copytree(first, tmp_path / f".{first.name}.replaced")
    with patch.object(ctypes, "CDLL", return_value=SimpleNamespace(renameat2=lambda *_: -1)):
        assert save(tmp_path, worker, Progress(1, 48), keep=2) == first
    assert files(tmp_path) == [first.name] and load(first, alone(seed=5)) == Progress(1, 48)


def test_a_damaged_checkpoint_does_not_push_out_a_complete_one(tmp_path: Path) -> None:
    # A run whose newest checkpoint is damaged goes on from the one before, and is behind the damaged one for a while.
    worker = alone()
    for number in (1, 5):
        save(tmp_path, worker, Progress(number, 16 * number), keep=2)
    (tmp_path / "step-00000005" / "state.json").unlink()
    written = save(tmp_path, worker, Progress(2, 32), keep=1)
    assert written in published(tmp_path) and missing(written) is None


def test_a_checkpoint_known_to_be_spoiled_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """Its content is another than was written, which only reading all of it shows: whoever read it says so."""
    worker = alone()
    older, spoiled = (save(tmp_path, worker, Progress(number, 16 * number), keep=2) for number in (1, 5))
    written = save(tmp_path, worker, Progress(2, 32), keep=2, spoiled={spoiled})
    assert published(tmp_path) == [older, written, spoiled]
    # Written again, it is as good as any.
    saver = Saver(tmp_path, worker, keep=2, asynchronous=False)
    for number, left in ((5, [written, spoiled]), (6, [spoiled, tmp_path / "step-00000006"])):
        saver.begin(Progress(number, 16 * number), {spoiled})
        saver.finish()
        assert published(tmp_path) == left


@pytest.mark.parametrize(
    "changes,tensor",
    [
        ({"vocab_size": 48}, r"(embed|head)\.weight"),
        ({"n_routed_experts": 16}, r"(layers\.1|mtp\.block)\.(experts|router)\."),
        ({"num_hidden_layers": 5}, r"layers\.4\."),
        ({"num_hidden_layers": 3}, r"layers\.3\."),
        ({"q_lora_rank": None}, r"attn\.q"),
        ({"n_shared_experts": 0}, r"layers\.1\.mlp\."),
        ({"first_k_dense_replace": 2}, r"layers\.1\."),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor(
    changes: dict[str, Any], tensor: str, complete: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"^checkpoint {complete} cannot be read: \S*{tensor}"):
        load(complete, alone(**changes))


@pytest.mark.parametrize("kilobytes", [64, 380, 390, 400, 410, 420])
def test_a_full_file_system_is_said_to_be_full(tmp_path: Path, kilobytes: int) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written: No space left on device$"):
            save(tmp_path, alone(), Progress(1, 16), keep=1)
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
