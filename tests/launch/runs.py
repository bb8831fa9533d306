"""A small run of real ranks, and ways to watch it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

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
# One thread: two of them on a busy core spend their time waiting for each other.
ONE_RANK = ["layout.pipeline=1", "layout.data=1", "layout.expert=1", "train.threads=1"]


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "train", str(config), *overrides]


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=120)


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, *overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def entries(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


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
