"""A small run of real ranks, and ways to watch it."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from tests.ranks import fork_server

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {vocab_size: 264, hidden_size: 32, num_hidden_layers: 2, first_k_dense_replace: 1, intermediate_size: 48,
  moe_intermediate_size: 16, n_routed_experts: 4, num_experts_per_tok: 2, n_group: 2, topk_group: 1,
  num_attention_heads: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8,
  initializer_range: 0.05}
layout: {pipeline: 2, data: 2, expert: 2}
train: {steps: 8, sequence_length: 16, global_batch_size: 8, device: cpu, timeout_seconds: 60}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 2}
data: {source: DATA, validation_sequences: 5}
checkpoint: {every: 2, keep: 2}
run: {dir: RUN}
"""
Start = Callable[..., subprocess.Popen[str]]
"""What the fixture ``start`` is: a configuration, overrides and options of ``Popen`` -> the running command."""
# One thread: two of them on a busy core spend their time waiting for each other.
ONE_RANK = ["layout.pipeline=1", "layout.data=1", "layout.expert=1", "train.threads=1"]


def write_config(folder: Path) -> Path:
    """A configuration of four ranks over made-up text; all of it in ``folder``, but for the cache."""
    words = random.Random(0).choices(["pipeline", "bubble", "expert", "stage", "token"], k=4000)
    (folder / "text.txt").write_text(" ".join(words))
    file = folder / "config.yaml"
    file.write_text(CONFIG.replace("DATA", str(folder / "text.txt")).replace("RUN", str(folder / "run")))
    return file


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "train", str(config), *overrides]


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=120)


def train_forked(config: Path, *overrides: str, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    """The command as torchrun starts it on every rank, forked from a server that has torch imported: for tests of what
    a run reads and writes, at a third of the cost of ``train``. Output of all ranks; status of rank 0."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent, it outlives ranks
    job = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    words, context = ["train", str(config), *overrides], fork_server()
    with tempfile.TemporaryDirectory() as folder:
        out, error = (Path(folder) / name for name in ("out", "error"))
        processes = []
        for rank in map(str, range(ranks)):
            environment = {**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank}
            process = context.Process(target=_forked, args=(words, environment, out, error))
            process.start()
            processes.append(process)
        try:
            for process in processes:
                process.join(120)
        finally:
            for process in processes:
                process.kill()
        statuses = [process.exitcode for process in processes]
        assert len(set(statuses)) == 1, (statuses, error.read_text())
        return subprocess.CompletedProcess(words, statuses[0] or 0, out.read_text(), error.read_text())


def _forked(words: list[str], environment: dict[str, str], out: Path, error: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for stream, path in ((sys.stdout, out), (sys.stderr, error)):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    from launch import cli

    sys.exit(cli.main(words))


def entries(run: Path) -> list[dict]:
    found: list[dict] = []
    with suppress(FileNotFoundError, json.JSONDecodeError):  # the last line may be on its way
        for line in (run / "metrics.jsonl").read_text().splitlines():
            found.append(json.loads(line))
    return found


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in entries(run)]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, alive
