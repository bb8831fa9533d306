"""What cannot be imported or exported is refused in a line, and nothing is written or replaced."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

from launch import export_hf
from model.safetensors_folder import SINGLE
from tests.launch.hugging_face import MODEL, edit, import_model, tensors, write

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


Damage = Callable[[Path], None]


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-3])


def reshape(folder: Path) -> None:
    save_file({**tensors(folder), "model.norm.weight": torch.ones(17)}, folder / SINGLE)


def forget(folder: Path) -> None:
    found = tensors(folder)
    del found["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(found, folder / SINGLE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "must be a folder with a Hugging Face model"),
        (remove("config.json"), "config.json must be a readable file: No such file or directory"),
        (remove(SINGLE), "must hold model.safetensors or model.safetensors.index.json"),
        (lambda f: edit(f / "config.json", model_type="llama"), "model_type='llama' must be 'deepseek_v3'"),
        (lambda f: edit(f / "config.json", hidden_size=24), "model.embed_tokens.weight in"),
        (cut, "model.safetensors is cut short in"),
        (reshape, "model.norm.weight in"),
        (forget, "lacks the tensor model.layers.2.mlp.experts.7.up_proj.weight, of shape [8, 16]"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_and_nothing_is_written(
    damage: Damage, message: str, theirs: Path, tmp_path: Path, text: Path, capsys: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    assert import_model(folder, tmp_path / "run", text) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], "train.stepz is not a key of the configuration"),
        (["train.sequence_length=4097"], "train.sequence_length=4097 must be at most 4096, the model's max_position"),
        (["data.source=nowhere"], "data.source='nowhere' must name at least one .txt, .jsonl or .parquet file"),
        (["train.global_batch_size=3", "layout.data=2"], "train.global_batch_size=3 must be divisible"),
        (["model.hidden_size=24"], "has the shape [264, 16]; expected is [264, 24]"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_nothing_is_written(
    overrides: list[str], message: str, theirs: Path, tmp_path: Path, text: Path, capsys: Any
) -> None:
    before = sorted(tmp_path.iterdir())
    assert import_model(theirs, tmp_path / "run", text, *overrides) == 2
    assert message in capsys.readouterr().err
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "cache"] == before


def test_a_vocabulary_without_all_bytes_does_not_fit_the_data(tmp_path: Path, text: Path, capsys: Any) -> None:
    folder = write(tmp_path / "model", MODEL.__class__(**{**MODEL.__dict__, "vocab_size": 200}))
    assert import_model(folder, tmp_path / "run", text) == 2
    assert "model.vocab_size=200 must be at least 257" in capsys.readouterr().err


def test_nothing_that_exists_is_replaced(theirs: Path, tmp_path: Path, text: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert import_model(theirs, run, text) == 0
    for again in (
        lambda: import_model(theirs, run, text),
        lambda: export_hf.main([str(run), "--hf", str(theirs)]),
    ):
        assert again() == 2
        assert "must not exist: nothing that is there is replaced" in capsys.readouterr().err


def test_only_a_run_is_exported(theirs: Path, tmp_path: Path, text: Path, capsys: Any) -> None:
    def refusal(run: Path) -> str:
        assert export_hf.main([str(run), "--hf", str(tmp_path / "back")]) == 2
        assert not (tmp_path / "back").exists()
        error: str = capsys.readouterr().err
        return error

    assert "must be a run folder, and it has no config.yaml" in refusal(theirs)
    assert import_model(theirs, tmp_path / "run", text) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("kv_lora_rank: 12", "kv_lora_rank: 11"))
    assert "layers.0.attn.kv_a.weight in" in refusal(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(config)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    (path / "__0_2.distcp").unlink()
    assert "step-00000000 is incomplete: __0_2.distcp is missing" in refusal(tmp_path / "run")
    shutil.rmtree(path)
    assert "has no complete checkpoint: it holds no checkpoint" in refusal(tmp_path / "run")
