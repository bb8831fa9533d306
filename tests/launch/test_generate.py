"""``dualpipe generate``: what transformers would have generated."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("transformers")

from launch.generate import main
from model.generate import bytes_a_token, latent_caches
from model.transformer import Transformer
from tests.launch.hugging_face import MODEL, build, write
from tests.model.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hugging_face") / "model")


def generate(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("prompt", ["pipe", "", "é b"])
def test_greedy_is_greedy_in_transformers(folder: Path, prompt: str, capsys: Any) -> None:
    ids = torch.tensor([[256, *prompt.encode()]])
    theirs = build(MODEL).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
    result = generate(capsys, folder, "--prompt", prompt, "--tokens", 25)
    assert result["tokens"] == theirs[0, ids.shape[1] :].tolist()
    text = bytes(token for token in result["tokens"] if token < 256).decode(errors="replace")
    assert result["text"] == prompt + text
    assert main([str(folder), "--prompt", prompt, "--tokens", "25"]) == 0
    assert capsys.readouterr().out == prompt + text + "\n"


def test_a_seed_repeats_a_draw(folder: Path, capsys: Any) -> None:
    draw = [folder, "--prompt", "pipe", "--tokens", 25, "--temperature", 1]
    first, again = generate(capsys, *draw, "--seed", 3), generate(capsys, *draw, "--seed", 3)
    assert first == again != generate(capsys, *draw, "--seed", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens=0 must be from 1"),
        (["--temperature", "-1"], "--temperature=-1.0 must be finite, not negative"),
        (["--temperature", "nan"], "--temperature=nan must be finite, not negative"),
        (["--seed", "-1"], "--seed=-1 must be from 0"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(
    folder: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    assert main([str(folder), "--prompt", "pipe", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("mtp", [False, True])
def test_the_bytes_of_a_token_are_those_of_its_latents_and_turns(mtp: bool) -> None:
    model = Transformer(tiny(num_nextn_predict_layers=1)).bfloat16()
    with latent_caches(model, 1, 64, mtp) as caches:
        latents = sum(cache.latents_BML.nbytes for cache in caches)
    turns = model.rotations(64, torch.device("cpu"))
    # What turns are made of: complex128, and angle and radius in float64, which are half of that each.
    made = turns.nbytes + turns.to(torch.complex128).nbytes * 2
    assert bytes_a_token(model, mtp) * 64 == latents + made


def test_more_tokens_than_memory_has_room_for_are_refused_before_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    each = bytes_a_token(Transformer(MODEL))
    room = 5 + 7  # the end before the prompt, its four bytes, and seven more
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=room * each))
    arguments = [str(folder), "--prompt", "pipe", "--tokens"]
    assert main([*arguments, "2000000000"]) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1
    assert f"error: --tokens=2000000000 must be at most 7: this model keeps {each:,} bytes a token" in refusal
    assert main([*arguments, "8"]) == 2 and main([*arguments, "7"]) == 0
