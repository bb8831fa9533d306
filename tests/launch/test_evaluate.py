"""``dualpipe evaluate``: every token is scored once, and a bit per byte is what it says."""

import json
import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

pytest.importorskip("transformers")

from launch.evaluate import BATCH_TOKENS, main, tokens_of, windows
from launch.tokenizer import ByteTokenizer
from model.safetensors_folder import SINGLE
from tests.launch.hugging_face import build, import_model, tensors, write
from tests.launch.test_data_megatron import write as write_indexed
from tests.model.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hugging_face") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two documents of 5 and 11 bytes, and an empty one."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("stage", "", "a bubble, é")))
    return file


def score(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 250))
def test_windows_predict_every_token_but_the_first_once(count: int, length: int) -> None:
    tokens = torch.arange(count, dtype=torch.int32)
    found = list(windows(tokens, length))
    assert torch.equal(torch.cat([part[:, 1:].flatten() for part in found]), tokens[1:].long())
    assert torch.equal(torch.cat([part[:, :-1].flatten() for part in found]), tokens[:-1].long())
    assert all(part.shape[1] == length + 1 for part in found[:-1]) and {part.dtype for part in found} == {torch.int64}
    assert all(part[:, 1:].numel() <= max(BATCH_TOKENS, length) for part in found)


def test_a_token_of_a_large_text_takes_a_few_bytes() -> None:
    documents = [bytes(range(256)) * 2000, b"stage"] * 2
    tracemalloc.start()
    row = tokens_of(documents, ByteTokenizer())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.tolist() == [256, *(token for text in documents for token in (*text, 256))]
    assert peak < 4.1 * len(row)


def test_a_model_that_knows_nothing_has_the_loss_of_a_guess(
    folder: Path, tmp_path: Path, data: Path, capsys: Any
) -> None:
    blank = tmp_path / "blank"
    shutil.copytree(folder, blank)
    found = tensors(folder)
    found["lm_head.weight"].zero_()
    save_file(found, blank / SINGLE)
    result = score(capsys, blank, "--data", data)
    size = len("stage") + len("a bubble, é".encode()) + 2
    assert (result["documents"], result["bytes"], result["tokens"]) == (2, size, size)
    assert result["loss"] == pytest.approx(math.log(264), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-6)


def test_the_loss_is_that_of_transformers_in_each_window(folder: Path, data: Path, capsys: Any) -> None:
    row = torch.tensor([256, *b"stage", 256, *"a bubble, é".encode(), 256])
    model, total = build(), 0.0
    with torch.no_grad():
        for start in range(0, len(row) - 1, 6):
            part = row[start : start + 7]
            total += F.cross_entropy(model(input_ids=part[None, :-1]).logits[0], part[1:], reduction="sum").item()
    result = score(capsys, folder, "--data", data, "--sequence-length", 6)
    assert result["loss"] == pytest.approx(total / (len(row) - 1), rel=1e-5)
    assert result["source"] == str(folder)


def test_the_table_says_what_the_object_says(folder: Path, data: Path, capsys: Any) -> None:
    result = score(capsys, folder, "--data", data)
    assert main([str(folder), "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "2 documents, 19 bytes, 19 tokens\n" in text and result["sequence_length"] == 1024
    assert "sequences      of 1,024 tokens at most\n" in text
    assert result["precision"] == ("bf16" if torch.cuda.is_available() else "fp32")
    assert f"computed in    {result['precision'].upper()}\n" in text
    assert f"{result['loss']:.4f} nats a token" in text and f"bits per byte  {result['bits_per_byte']:.4f}" in text
    data.write_text(json.dumps({"text": "stage"}))
    assert main([str(folder), "--data", str(data)]) == 0
    assert "1 document, 6 bytes" in capsys.readouterr().out


def test_the_text_is_found_where_the_run_found_it(tmp_path: Path, folder: Path, data: Path, capsys: Any) -> None:
    """In its own field, or as Megatron's tokens."""
    expected = score(capsys, folder, "--data", data)
    named = tmp_path / "named.jsonl"
    named.write_text(data.read_text().replace('"text"', '"content"'))
    assert "must be a JSON object with a string 'text', as --text-field names it" in refusal(
        capsys, folder, "--data", named
    )
    assert score(capsys, folder, "--data", named, "--text-field", "content") == expected
    (tmp_path / "book.txt").write_text("a stage " * 50)
    assert import_model(folder, tmp_path / "run", tmp_path / "book.txt", "data.text_field=content") == 0
    capsys.readouterr()
    own = score(capsys, tmp_path / "run", "--data", named, "--sequence-length", 1024)
    assert own["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    write_indexed(tmp_path / "indexed", [[[*b"stage", 256]], [[*"a bubble, é".encode(), 256]]])
    assert score(capsys, folder, "--data", tmp_path / "indexed") == expected
    write_indexed(tmp_path / "indexed", [[[257, *b"stage", 256]]])
    marked = score(capsys, folder, "--data", tmp_path / "indexed.bin")
    assert (marked["tokens"], marked["bytes"]) == (7, 6), "a mark of fill in the middle is no byte"
    write_indexed(tmp_path / "indexed", [[[]]])
    assert "indexed' must hold text" in refusal(capsys, folder, "--data", tmp_path / "indexed")


def refusal(capsys: Any, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    error: str = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_scored_is_refused_in_a_line(folder: Path, tmp_path: Path, data: Path, capsys: Any) -> None:
    assert "must be a run folder (config.yaml) or a Hugging Face one" in refusal(capsys, tmp_path, "--data", data)
    assert "--data='nowhere' must name at least one" in refusal(capsys, folder, "--data", "nowhere")
    assert "--sequence-length=0 must be from 1" in refusal(capsys, folder, "--data", data, "--sequence-length", 0)
    assert "required: --data" in refusal(capsys, folder)
    data.write_text(json.dumps({"text": ""}))
    assert "must hold text, and every document in it is empty" in refusal(capsys, folder, "--data", data)


def test_tokens_must_be_known_and_fit_the_vocabulary(folder: Path, tmp_path: Path, data: Path, capsys: Any) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(folder, silent)
    (silent / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(capsys, silent, "--data", data)
    small = write(tmp_path / "small", tiny(vocab_size=200))
    capsys.readouterr()
    assert "vocab_size=200" in refusal(capsys, small, "--data", data)
