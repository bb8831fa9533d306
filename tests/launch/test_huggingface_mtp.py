"""The multi-token-prediction module of a Hugging Face folder: its tensors come and go under DeepSeek's names, and it
computes what transformers' own layer computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from launch import export_hf, generate
from launch.model_folder import load_model, open_run
from model.safetensors_folder import SINGLE
from tests.launch.hugging_face import MODEL, build, edit, import_model, tensors, write

LAYER = f"model.layers.{MODEL.num_hidden_layers}"
COPIES = {
    f"{LAYER}.embed_tokens.weight": "model.embed_tokens.weight",
    f"{LAYER}.shared_head.head.weight": "lm_head.weight",
}


LONGER = replace(MODEL, num_hidden_layers=MODEL.num_hidden_layers + 1)
"""The model whose last layer is the module's block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DeepSeek publishes it."""
    path = write(tmp_path_factory.mktemp("mtp") / "model", LONGER)
    own = {f"{LAYER}.{name}.weight": torch.rand(16) + 0.5 for name in ("enorm", "hnorm", "shared_head.norm")}
    own[f"{LAYER}.eh_proj.weight"] = torch.randn(16, 32) / 4
    found = tensors(path)
    save_file({**found, **own, **{copy: found[name].clone() for copy, name in COPIES.items()}}, path / SINGLE)
    edit(path / "config.json", num_hidden_layers=MODEL.num_hidden_layers, num_nextn_predict_layers=1)
    return path


@torch.no_grad()
def by_transformers(found: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Summed cross-entropy of the tokens after the next."""
    longer: Any = build(LONGER)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    layers = longer.model(inputs, output_hidden_states=True).hidden_states

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (16,), found[name], MODEL.rms_norm_eps)

    features = norm(layers[MODEL.num_hidden_layers], "model.norm.weight")
    embedded = longer.model.embed_tokens(following)
    joined = [norm(embedded, f"{LAYER}.enorm.weight"), norm(features, f"{LAYER}.hnorm.weight")]
    x = torch.cat(joined, dim=-1) @ found[f"{LAYER}.eh_proj.weight"].T
    turns = longer.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    future = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    y = longer.model.layers[-1](x, attention_mask=future, position_embeddings=turns)
    y = y[0] if isinstance(y, tuple) else y
    logits = longer.lm_head(norm(y, f"{LAYER}.shared_head.norm.weight"))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum")


def test_the_module_comes_computes_as_in_transformers_and_goes_with_the_same_bytes(
    folder: Path, tmp_path: Path, text: Path, capsys: Any
) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert import_model(folder, run, text) == 0
    assert "left out" not in capsys.readouterr().err
    tokens = torch.randint(256, (3, 14), generator=torch.Generator().manual_seed(8))
    want = by_transformers(tensors(folder), tokens).item()
    for place in (run, folder):
        got = load_model(place).model(tokens[:, :-1], tokens[:, 1:]).mtp.item()
        assert got == pytest.approx(want, rel=1e-5)
    assert export_hf.main([str(run), "--hf", str(back), "--dtype", "fp32"]) == 0
    before, after = tensors(folder), tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # transformers has no such module, and reads the rest.
    model, loading = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    mine = load_model(run).model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.item() / tokens[:, 1:].numel()
    assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(mine, rel=1e-5)


def test_what_a_folder_or_an_override_leaves_out_is_said(folder: Path, tmp_path: Path, text: Path, capsys: Any) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (changed / name).write_bytes((folder / name).read_bytes())
    found = tensors(folder)
    head = f"{LAYER}.shared_head.head.weight"
    save_file({**found, head: found[head] + 1}, changed / SINGLE)
    assert import_model(changed, tmp_path / "differing", text) == 0
    assert f"{head} is no copy of the main model's" in capsys.readouterr().err
    assert torch.equal(load_model(tmp_path / "differing").model.head.weight, found["lm_head.weight"])

    assert import_model(changed, tmp_path / "without", text, "model.num_nextn_predict_layers=0") == 0
    module = [name for name in found if name.startswith(LAYER)]
    assert f"left out {len(module)} tensors that have no place here, {min(module)} .. {max(module)}" in (
        capsys.readouterr().err
    )
    assert open_run(tmp_path / "without").config.model.num_nextn_predict_layers == 0

    save_file({name: value for name, value in found.items() if not name.startswith(LAYER)}, changed / SINGLE)
    assert import_model(changed, tmp_path / "absent", text) == 0
    assert "the folder has no tensors of its module" in capsys.readouterr().err
    assert open_run(tmp_path / "absent").config.model.num_nextn_predict_layers == 0

    del found[f"{LAYER}.hnorm.weight"]
    save_file(found, changed / SINGLE)
    assert import_model(changed, tmp_path / "torn", text) == 2
    assert f"lacks the tensor {LAYER}.hnorm.weight, of shape [16]" in capsys.readouterr().err


def test_speculative_generation_is_greedy_generation_and_says_what_it_saved(
    folder: Path, theirs: Path, capsys: Any
) -> None:
    results = []
    for options in ([], ["--speculative"]):
        assert generate.main([str(folder), "--prompt", "pipe", "--tokens", "30", "--json", *options]) == 0
        results.append(json.loads(capsys.readouterr().out))
    counted = results[1].pop("speculative")
    assert results[0] == results[1]
    assert len(results[1]["tokens"]) == counted["steps"] + counted["accepted"]
    assert counted["tokens_per_step"] == len(results[1]["tokens"]) / counted["steps"]
    assert counted["acceptance_rate"] == counted["accepted"] / counted["drafted"]

    assert generate.main([str(folder), "--prompt", "pipe", "--tokens", "30", "--speculative"]) == 0
    assert f"in {counted['steps']} steps, {counted['tokens_per_step']:.2f} a step" in capsys.readouterr().err
    assert generate.main([str(folder), "--prompt", "pipe", "--speculative", "--temperature", "0.5"]) == 2
    assert "--temperature=0.5 must be 0 with --speculative" in capsys.readouterr().err
    assert generate.main([str(theirs), "--prompt", "pipe", "--speculative"]) == 2
    assert f"--speculative needs model.num_nextn_predict_layers=1, which {theirs} has not" in capsys.readouterr().err
