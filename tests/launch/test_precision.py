"""``dualpipe precision``: a row for every FP8 layer with the errors that FP8 explains; one line for what cannot be."""

import json
from pathlib import Path

import pytest
import torch

from launch.config import dump, load
from launch.job import job_of
from launch.precision import main
from model.fp8.probe import KINDS
from parallel.checkpoint import Progress
from parallel.saver import save
from parallel.worker import Worker

TINY = (
    "model.num_hidden_layers=2 model.hidden_size=128 model.intermediate_size=128 model.moe_intermediate_size=128 "
    "model.n_routed_experts=4 model.n_group=1 model.topk_group=1 model.num_experts_per_tok=2 model.q_lora_rank=64 "
    "model.num_attention_heads=2 layout.pipeline=1 layout.data=1 layout.expert=1 train.global_batch_size=2 "
    "train.sequence_length=64"
).split()


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {n}: {n * n} apples\n" for n in range(400)))
    return ["configs/tiny-cpu.yaml", *TINY, f"data.source={text}"]


def test_every_fp8_layer_has_its_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backend"] == "emulated"
    layers = {row["layer"]: row for row in result["layers"]}
    attention = ("q_a", "q_b", "kv_a", "kv_b", "o")
    assert set(layers) == {
        *(f"layers.{n}.attn.{part}" for n in (0, 1) for part in attention),
        *(f"layers.{n}.mlp.{part}" for n in (0, 1) for part in ("gate_up", "down")),
        *(f"layers.1.experts.{part}" for part in ("gate_up", "down")),
    }
    for row in layers.values():
        assert set(row["errors"]) == set(KINDS)
        for kind in ("input", "weight", "gradient"):
            assert row["errors"][kind] == pytest.approx(0.026, rel=0.2), row
        for kind in ("fprop", "dgrad"):
            assert row["errors"][kind] == pytest.approx(0.037, rel=0.3), row
        assert 0.001 < row["errors"]["wgrad"] < 0.06
        assert 0 <= row["gradient_lost"]["row"] <= row["gradient_lost"]["block"] < 1


def test_the_table_names_layers_and_backend(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--backend", "reference"]) == 0
    title, headings, *rows, _, choice = capsys.readouterr().out.splitlines()
    assert title.split() == "relative error by layer, 128 tokens, initial weights".split()
    assert headings.split()[0] == "layer" and len(rows) == 16
    assert rows[0].split()[0] == "layers.0.attn.q_a"
    assert choice == "FP8 products: reference (as asked)"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_is_measured_with_its_own_weights(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", load(arguments[0], arguments[1:])
    worker = Worker(job_of(config, torch.device("cpu"), 1, 256), 0)
    for held in worker.held.values():
        for bucket in held.buckets:  # what E4M3 with its scales holds exactly
            bucket.master.copy_(bucket.master.sign() * bucket.master.abs().log2().round().exp2().nan_to_num())
    path = save(run / "checkpoints", worker, Progress(3, 6), keep=1)
    (run / "config.yaml").write_text(dump(config))
    assert main([str(run), "train.sequence_length=32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == str(path) and len(result["layers"]) == 16
    for row in result["layers"]:
        assert row["errors"]["weight"] < 1e-6 and 0.02 < row["errors"]["gradient"] < 0.04, row
    assert main([str(run), "train.sequence_length=32"]) == 0
    assert f"64 tokens, weights of {path.name}" in capsys.readouterr().out
    assert main([str(run), "model.num_hidden_layers=3"]) == 2
    assert "no model.* can be given with it" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "must be a run folder, and it has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more,message",
    [
        (["--backend", "scaled_mm"], "--backend=scaled_mm: FP8 backend scaled_mm needs a Hopper GPU (SM90)"),
        (["precision.backend=scaled_mm"], "precision.backend=scaled_mm: FP8 backend scaled_mm needs a Hopper GPU"),
        (
            ["--backend", "fast"],
            "--backend=fast: FP8 backend 'fast' must be auto, reference, emulated, scaled_mm, triton",
        ),
        (["model.hidden_size=65536", "model.intermediate_size=1048576"], "fewer model.num_hidden_layers"),
        (["model.depth=3"], "model.depth"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
