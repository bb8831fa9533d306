"""Import and export as a user meets them: nothing is lost on the way, and nothing is written that is not whole."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import evaluate, export_hf
from launch.config import ConfigError, PrecisionConfig, load
from launch.data import open_dataset
from launch.model_folder import load_model, open_run
from launch.run_folder import ORIGIN, RunFolder
from launch.run_weights import RunWeights, RunWeightsWriter
from launch.train import configuration
from model import safetensors_folder
from model.safetensors_folder import INDEX, SINGLE, dequantise
from parallel import checkpoint
from parallel.worker import Job, Worker
from tests.launch.hugging_face import edit, import_model, tensors, write

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).parents[2]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_import_and_export_give_back_the_same_bytes(tmp_path: Path, text: Path, shard_size: str) -> None:
    folder = write(tmp_path / "model", shard_size=shard_size)
    assert (folder / INDEX).exists() is (shard_size == "10KB")
    assert import_model(folder, tmp_path / "run", text) == 0
    assert export_hf.main([str(tmp_path / "run"), "--hf", str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert same(tensors(folder), tensors(tmp_path / "back"))
    left = {path.name for path in (tmp_path / "back").iterdir()}
    assert left == {SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_bf16_weights_stay_bf16(theirs: Path, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    rounded = {
        name: value if name.endswith("correction_bias") else value.bfloat16() for name, value in tensors(theirs).items()
    }
    save_file(rounded, folder / SINGLE)
    assert import_model(folder, tmp_path / "run", text) == 0
    assert export_hf.main([str(tmp_path / "run"), "--hf", str(tmp_path / "back")]) == 0
    assert same(rounded, tensors(tmp_path / "back"))


def test_an_export_in_several_files_has_an_index_that_transformers_reads(
    theirs: Path, tmp_path: Path, text: Path
) -> None:
    assert import_model(theirs, tmp_path / "run", text) == 0
    export_hf.export(tmp_path / "run", tmp_path / "back", "fp32", shard_bytes=10_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 5 and (tmp_path / "back" / INDEX).exists()
    assert all(file.stat().st_size < 10_000 + 4_000 for file in files if len(load_file(file)) > 1)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = AutoModelForCausalLM.from_pretrained(theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_fp8_blocks_are_imported_at_their_value(theirs: Path, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    stored, expected = tensors(theirs), tensors(theirs)
    # 264 and 16 rows and columns: whole blocks, and tails in both directions.
    for name in (
        "lm_head.weight",
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ):
        rows, columns = expected[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
        stored[name] = expected[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        expected[name] = dequantise(stored[name], scale)
    save_file(stored, folder / SINGLE)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert import_model(folder, tmp_path / "run", text) == 0
    assert export_hf.main([str(tmp_path / "run"), "--hf", str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert same(expected, tensors(tmp_path / "back"))


def test_the_checkpoint_is_one_that_any_layout_goes_on_from(theirs: Path, tmp_path: Path, text: Path) -> None:
    """Read as a rank of a job reads it: masters, zero moments, biases, step 0."""
    assert import_model(theirs, tmp_path / "run", text) == 0
    config = load(tmp_path / "run" / "config.yaml")
    job = Job(
        model=config.model,
        layout=config.layout,
        schedule=config.schedule.name,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=99,
        sequence_length=16,
        global_batch_size=8,
        micro_batch_size=1,
        optimizer=config.optimizer,
    )
    worker = Worker(job, 0)
    for moment in (*worker.optimizer.first, *worker.optimizer.second):
        moment.fill_(7.0)
    (path,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert checkpoint.missing(path) is None
    assert checkpoint.load(path, worker) == checkpoint.Progress(step=0, sequences=0)
    pieces = checkpoint.pieces(worker, torch.zeros(1), loading=True)
    moments = [piece for piece in pieces if "_moment." in piece.name]
    assert moments and not any(piece.tensor.any() for piece in moments)
    (model,) = [held.stage.model for held in worker.held.values()]
    gate_up = model.get_submodule("layers.1.experts.gate_up").weight
    found = tensors(theirs)
    for e in range(config.model.n_routed_experts):
        prefix = f"model.layers.1.mlp.experts.{e}"
        halves = [found[f"{prefix}.{half}_proj.weight"] for half in ("gate", "up")]
        assert torch.equal(gate_up[e], torch.cat(halves))
    bias = found["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(model.get_submodule("layers.2.router").bias_E, bias)
    last = max(path.glob("*.distcp"), key=lambda file: int(file.stem.split("_")[-1]))
    names = {piece.name for piece in moments}
    assert last.stat().st_size < 2000 * len(names), "a zero moment is stored as one element"


def test_a_trained_run_is_exported_with_its_loss(theirs: Path, tmp_path: Path, text: Path, capsys: Any) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert import_model(theirs, run, text) == 0
    overrides = ["train.steps=3", "layout.pipeline=2", "train.device=cpu", "optimizer.warmup_steps=1"]
    command = [sys.executable, "-m", "launch.cli", "train", str(run / "config.yaml"), *overrides]
    trained = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert trained.returncode == 0, trained.stderr
    assert "after step 0" in trained.stdout
    assert export_hf.main([str(run), "--hf", str(back), "--dtype", "fp32"]) == 0
    assert not torch.equal(tensors(back)["lm_head.weight"], tensors(theirs)["lm_head.weight"])

    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the bubble of a stage, and the token that waits for it")
    losses = []
    for folder in (run, back):
        capsys.readouterr()
        assert evaluate.main([str(folder), "--data", str(held_out), "--sequence-length", "64", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    tokenizer, model = AutoTokenizer.from_pretrained(back), AutoModelForCausalLM.from_pretrained(back)
    ids = tokenizer(f"{tokenizer.eos_token}{held_out.read_text()}{tokenizer.eos_token}", return_tensors="pt").input_ids
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)


def test_overrides_are_those_of_the_run(theirs: Path, tmp_path: Path, text: Path) -> None:
    assert import_model(theirs, tmp_path / "run", text, "model.yarn_factor=4", "train.seed=9") == 0
    run = open_run(tmp_path / "run")
    assert run.config.model.yarn_factor == 4 and run.config.train.seed == 9
    assert run.config.run.dir == str(tmp_path / "run")
    assert (run.config.optimizer.warmup_steps, run.config.checkpoint.every) == (10, 25), "of the 100 steps of the run"
    own = ["train.steps=7", "optimizer.warmup_steps=3", "checkpoint.every=0", "precision.compute=fp8"]
    assert import_model(theirs, tmp_path / "own", text, *own) == 0
    config = load(tmp_path / "own" / "config.yaml")
    assert (config.optimizer.warmup_steps, config.checkpoint.every) == (3, 0)
    fingerprint = open_dataset(config).fingerprint
    assert RunFolder(config).changes(config, fingerprint) == []
    wider = replace(config, precision=PrecisionConfig("bf16"))
    with pytest.raises(ConfigError, match="run has 'fp8', given 'bf16', which must stay: 'dualpipe export' and"):
        RunFolder(wider).changes(wider, fingerprint)


def interrupt(monkeypatch: pytest.MonkeyPatch, kind: Any, method: str, calls: int) -> None:
    """Ctrl-C at the given call of a function."""
    whole, left = getattr(kind, method), [calls]

    def once(*arguments: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(*arguments)

    monkeypatch.setattr(kind, method, once)


def test_an_interrupted_import_goes_on(
    theirs: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, partial = tmp_path / "run", tmp_path / ".run.partial"
    with monkeypatch.context() as patched:
        interrupt(patched, RunWeightsWriter, "write_file", 3)
        with pytest.raises(KeyboardInterrupt):
            import_model(theirs, run, text)
    assert not run.exists()
    with monkeypatch.context() as patched:
        interrupt(patched, safetensors_folder.SafetensorsFolder, "read", 3)  # in the middle of the next file
        with pytest.raises(KeyboardInterrupt):
            import_model(theirs, run, text)
    before = {path.name: path.stat().st_mtime_ns for path in partial.rglob("*.distcp")}
    assert len(before) == 4
    assert import_model(theirs, run, text) == 0
    after = {path.name: path.stat().st_mtime_ns for path in run.rglob("*.distcp")}
    kept = [name for name in before if before[name] == after[name]]
    assert sorted(kept) == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    assert not partial.exists()
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "data.json", "events.jsonl", "lock"}
    assert export_hf.main([str(run), "--hf", str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert same(tensors(theirs), tensors(tmp_path / "back"))


def test_an_interrupted_import_of_other_weights_begins_again(
    theirs: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, RunWeightsWriter, "write_file", 3)
        with pytest.raises(KeyboardInterrupt):
            import_model(theirs, tmp_path / "run", text)
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    other = {name: value + 1 for name, value in tensors(theirs).items()}
    save_file(other, folder / SINGLE)
    assert import_model(folder, tmp_path / "run", text) == 0
    assert export_hf.main([str(tmp_path / "run"), "--hf", str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert same(other, tensors(tmp_path / "back"))


def test_an_interrupted_export_goes_on(
    theirs: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, back, partial = tmp_path / "run", tmp_path / "back", tmp_path / ".back.partial"
    assert import_model(theirs, run, text) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, RunWeights, "read", 40)
        with pytest.raises(KeyboardInterrupt):
            export_hf.export(run, back, "fp32", shard_bytes=10_000)
    assert not back.exists()
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(before) >= 3
    export_hf.export(run, back, "fp32", shard_bytes=10_000)
    after = {path.name: path.stat().st_mtime_ns for path in back.glob("*.safetensors")}
    assert all(after[name] == before[name] for name in before)
    assert same(tensors(theirs), tensors(back))
    assert not partial.exists() and not list(back.glob("*.part")) and not list(back.glob(".*"))


def own_tokens(folder: Path) -> None:
    """Make the words a and b, and one for any other, the tokens of a model."""
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}
    edit(folder / "tokenizer.json", model=words, added_tokens=[], pre_tokenizer={"type": "Whitespace"}, decoder=None)
    edit(folder / "config.json", bos_token_id=1, eos_token_id=[2, 1])


def test_a_tokenizer_of_its_own_travels_with_the_model(theirs: Path, tmp_path: Path, text: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    own_tokens(folder)
    assert import_model(folder, tmp_path / "run", text) == 0
    own = tmp_path / "run" / ORIGIN
    assert (own / "tokenizer.json").exists()
    config = load(tmp_path / "run" / "config.yaml")
    assert config.data.tokenizer == str(own)
    data = open_dataset(config)
    assert max(data.corpora[0].train) <= 2
    assert json.loads((tmp_path / "run" / "data.json").read_text())["fingerprint"] == data.fingerprint
    assert export_hf.main([str(tmp_path / "run"), "--hf", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 1])
    document = tmp_path / "document.txt"
    document.write_text("a b a")
    for place in ("run", "back"):
        capsys.readouterr()
        assert evaluate.main([str(tmp_path / place), "--data", str(document), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["tokens"], result["bytes"]) == (4, 6)  # three words and the end; five bytes and the end


def test_a_run_with_a_tokenizer_of_its_own_trains_wherever_it_was_moved(
    theirs: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(theirs, tmp_path / "model")
    own_tokens(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert import_model(Path("model"), Path("run"), text) == 0
    shutil.move("run", "moved to here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("../moved to here", str(tmp_path / "moved to here")):
        config = configuration(path, ["train.steps=7"])
        assert config.data.tokenizer == f"{path}/{ORIGIN}"
        changes = RunFolder(config).changes(config, open_dataset(config).fingerprint)
        assert changes == ["train.steps: run has 100, given 7"]
        assert load_model(Path(path)).tokenizer.encode(b"b a") == [1, 0]
    asked = configuration("../moved to here", ["data.tokenizer=bytes"])
    assert asked.data.tokenizer == "bytes"
