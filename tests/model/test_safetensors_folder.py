"""Safetensors folders: what is written is what the library reads, what is damaged is named, FP8 has its value."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.huggingface import HuggingFaceError, Published
from model.safetensors_folder import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    dequantise,
    index_of,
    shard_names,
    shards,
    write_shard,
)

WIDE, FLAT, BIAS = (
    Published("wide", "wide.weight", (5, 3)),
    Published("flat", "flat.weight", (7,)),
    Published("bias", "layers.0.router.bias_E", (4,)),
)
TENSORS = [WIDE, FLAT, BIAS]


def values() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {tensor.name: torch.randn(tensor.shape) for tensor in TENSORS}


def one_at_a_time() -> Callable[[Published], Tensor]:
    """A reader that fails when an earlier tensor of it is still held."""
    earlier: list[weakref.ref[torch.UntypedStorage]] = []

    def read(tensor: Published) -> Tensor:
        assert all(reference() is None for reference in earlier), tensor
        value = torch.ones(tensor.shape)
        earlier.append(weakref.ref(value.untyped_storage()))
        return value

    return read


def nothing(name: str) -> bool:
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    given_, path = values(), tmp_path / SINGLE
    write_shard(path, TENSORS, dtype, lambda tensor: given_[tensor.name])
    found = load_file(path)
    assert found.keys() == given_.keys()
    for name, value in given_.items():
        # Rounded to nearest, once; a selection bias stays FP32, as transformers keeps it.
        expected = value if name == "bias" else value.to(dtype)
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_a_file_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    def stop(tensor: Published) -> Tensor:
        if tensor is FLAT:
            raise KeyboardInterrupt
        return values()[tensor.name]

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / SINGLE, TENSORS, torch.float32, stop)
    assert not (tmp_path / SINGLE).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    write_shard(tmp_path / SINGLE, TENSORS, dtype, one_at_a_time())


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 300))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    tensors = [Published(str(n), "x.weight", (size,)) for n, size in enumerate(sizes)]
    found = shards(tensors, torch.bfloat16, limit)
    assert [tensor for part in found for tensor in part] == tensors
    totals = [sum(2 * tensor.numel for tensor in part) for part in found]
    assert all(total <= limit or len(part) == 1 for total, part in zip(totals, found, strict=True))
    # Not one file more than needed: a tensor opens a file only when the one before is too full for it.
    assert all(a + 2 * part[0].numel > limit for a, part in zip(totals, found[1:], strict=False))


def sharded(folder: Path) -> dict[str, Tensor]:
    given_ = values()
    parts = shards(TENSORS, torch.float32, 60)
    files = dict(zip(shard_names(len(parts)), parts, strict=True))
    assert list(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in files.items():
        write_shard(folder / name, part, torch.float32, lambda tensor: given_[tensor.name])
    (folder / INDEX).write_text(json.dumps(index_of(files, torch.float32)))
    return given_


def test_a_folder_with_an_index_is_read_through_it(tmp_path: Path) -> None:
    given_ = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * (15 + 7 + 4)
    folder = SafetensorsFolder(tmp_path)
    folder.check(TENSORS, nothing)
    for tensor in TENSORS:
        assert torch.equal(folder.read(tensor), given_[tensor.name])


def test_a_file_that_the_index_names_must_be_there_with_its_tensors(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["flat"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(HuggingFaceError, match=r"model-00001-of-00002.safetensors lacks the tensor flat"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(HuggingFaceError, match=r"model-00001-of-00002.safetensors is missing"):
        SafetensorsFolder(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(HuggingFaceError, match=r"model.safetensors.index.json is not valid JSON"):
        SafetensorsFolder(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(HuggingFaceError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_was_cut_short_names_the_first_tensor_that_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    write_shard(path, TENSORS, torch.float32, lambda tensor: values()[tensor.name])
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for size, message in (
        (start + 4 * 15 + 5, r"cut short in flat, of shape \[7\]"),
        (start + 3, r"cut short in wide, of shape \[5, 3\]"),
        (20, "ends in its header: it has 20 of at least"),
        (0, "is no whole safetensors file|ends in its header"),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(HuggingFaceError, match=message):
            SafetensorsFolder(tmp_path)


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("flat", None), r"lacks the tensor flat, of shape \[7\]"),
        (
            change("wide", torch.zeros(3, 5)),
            r"wide in .*/model.safetensors has the shape \[3, 5\]; expected is \[5, 3\]",
        ),
        (change("wide", torch.zeros(5, 3, dtype=torch.int32)), "wide in .* is I32; it must be F32, BF16, F16, F8_E4M3"),
        (change("strange", torch.zeros(1)), "strange in .* is no tensor of this model"),
        (change("wide_scale_inv", torch.zeros(1, 1)), "wide_scale_inv in .* is no tensor of this model"),
        (change("wide", torch.zeros(5, 3).to(torch.float8_e4m3fn)), "wide is FP8 and needs the tensor wide_scale_inv"),
        (change("flat", torch.zeros(7).to(torch.float8_e4m3fn)), "flat is FP8 and needs the tensor flat_scale_inv"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = values()
    damage(tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(HuggingFaceError, match=message):
        SafetensorsFolder(tmp_path).check(TENSORS, nothing)


def test_a_scale_must_be_one_number_a_block(tmp_path: Path) -> None:
    weight, tensor = torch.zeros(129, 256).to(torch.float8_e4m3fn), Published("w", "w.weight", (129, 256))
    for scale, message in (
        (torch.ones(1, 2), r"w_scale_inv in .* has the shape \[1, 2\]; expected is \[2, 2\]"),
        (torch.ones(2, 2).bfloat16(), "w_scale_inv in .* must be F32"),
    ):
        save_file({"w": weight, "w_scale_inv": scale}, tmp_path / SINGLE)
        with pytest.raises(HuggingFaceError, match=message):
            SafetensorsFolder(tmp_path).check([tensor], nothing)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_an_fp8_weight_is_the_stored_number_times_the_scale_of_its_block(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.01
    got = dequantise(weight, scale)
    assert got.shape == weight.shape and got.dtype == torch.float32
    for i in {0, min(127, rows - 1), min(128, rows - 1), rows - 1, seed % rows}:
        for j in {0, min(127, columns - 1), min(128, columns - 1), columns - 1, seed % columns}:
            assert got[i, j] == weight[i, j].float() * scale[i // 128, j // 128]
