"""Profiler's traces: one made by hand, with a GPU's kernels, and one that torch's profiler writes here."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.estimate.calibrate.describe import describe_trace
from parallel.estimate.calibrate.kineto import TraceFileError, read
from parallel.estimate.hardware import ClusterError, from_mapping
from tests.parallel.estimate.published import H800


def operator(name: str, number: int, shapes: list[list[int]], kind: str = "c10::BFloat16") -> dict[str, Any]:
    args = {"External id": number, "Input Dims": shapes, "Input type": [kind] * len(shapes)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 0, "dur": 5, "args": args}


def kernel(number: int, microseconds: float, **about: Any) -> dict[str, Any]:
    args = {"External id": number, "correlation": number, **about}
    return {"ph": "X", "cat": "kernel", "name": "k", "ts": 0, "dur": microseconds, "args": args}


GPU = [
    operator("aten::mm", 1, [[4096, 7168], [7168, 2048]]),
    kernel(1, 200.0),
    kernel(1, 50.0),  # two kernels of one operator
    operator("aten::mm", 2, [[4096, 7168], [7168, 2048]]),
    kernel(2, 350.0),
    operator("aten::_grouped_mm", 3, [[8192, 2048], [4, 2048, 7168]]),
    kernel(3, 500.0),
    operator("aten::_scaled_dot_product_flash_attention", 4, [[1, 128, 4096, 192]] * 2 + [[1, 128, 4096, 128]]),
    kernel(4, 2000.0),
    operator("aten::copy_", 5, [[4096, 7168], [4096, 7168]]),
    kernel(5, 50.0),
    operator("aten::mm", 6, [[16, 16], [16, 16]]),  # whose kernel is not in the trace
    kernel(7, 1000.0, **{"Collective name": "all_to_allv", "In msg nelems": 10_000_000, "dtype": "BFloat16"})
    | {"name": "ncclDevKernel_SendRecv"},
]


def written(folder: Path, events: list[dict[str, Any]], packed: bool = False) -> Path:
    path = folder / ("trace.json.gz" if packed else "trace.json")
    raw = json.dumps({"traceEvents": events}).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_gpus_products_take_what_their_kernels_take(tmp_path: Path, packed: bool) -> None:
    GPU[-1]["args"]["Group size"] = 64
    description = describe_trace(read(written(tmp_path, GPU, packed)), H800, "a trace")
    cluster = from_mapping("mine", {key: of for key, of in description.items() if key != "like"}, H800)
    peak = H800.bf16_tflops * 1e12
    rate = 2 * 4096 * 7168 * 2048 / 300e-6  # the median of 250 and 350 us
    assert cluster.efficiency("bf16", 4096, 2048, 7168) == pytest.approx(rate / peak, rel=1e-3)
    assert cluster.efficiency("bf16_wgrad", 4096, 2048, 7168) == cluster.efficiency("bf16", 4096, 2048, 7168)
    assert cluster.efficiency("bf16_grouped", 8192, 7168, 2048) == pytest.approx(
        2 * 8192 * 7168 * 2048 / 500e-6 / peak, rel=1e-3
    )
    core = 4096 * 4096 * 128 * (192 + 128) / 2000e-6
    assert cluster.attention_forward_efficiency == pytest.approx(core / peak, rel=1e-3)
    assert cluster.memory_efficiency == pytest.approx(2 * 2 * 4096 * 7168 / 50e-6 / 3350e9, rel=1e-3)
    assert cluster.ib_efficiency == pytest.approx(20e6 / 1000e-6 / 50e9, rel=1e-3)
    # What the trace does not say is the base's: other formats, and the core's backward.
    assert cluster.attention_backward_efficiency == H800.attention_backward_efficiency
    assert cluster.efficiency("fp8", 4096, 1536, 7168) == H800.efficiency("fp8", 4096, 1536, 7168)
    assert cluster.sources["ib_efficiency"] == "measured: a trace"


def test_a_rate_above_the_named_devices_peak_is_refused(tmp_path: Path) -> None:
    events = [operator("aten::mm", 1, [[4096, 7168], [7168, 2048]]), kernel(1, 1.0)]
    with pytest.raises(ClusterError, match=r"cluster h800: bf16_tflops=989\.4 is below the .* measured here"):
        describe_trace(read(written(tmp_path, events)), H800, "a trace")


def test_a_trace_of_torchs_profiler_on_this_cpu(tmp_path: Path) -> None:
    x, weight = torch.randn(96, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    q = torch.randn(2, 4, 32, 24, requires_grad=True)
    v = torch.randn(2, 4, 32, 24)
    long = torch.randn(1 << 19)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        F.linear(x, weight).sum().backward()
        torch.zeros(48, 64).addmm_(torch.randn(48, 96), x.detach())
        F.scaled_dot_product_attention(q, q, v, is_causal=True).sum().backward()
        long.bfloat16()
    path = tmp_path / "profile.json"
    profile.export_chrome_trace(str(path))
    trace = read(path)
    shapes = set(trace.product_seconds())
    assert {("fp32", 96, 48, 64), ("fp32", 96, 64, 48), ("fp32_wgrad", 48, 64, 96)} <= shapes
    assert [len(found) for found in trace.core] == [1, 1] and not trace.on_gpu
    assert trace.core[0][0][0] == 2 * 4 * 32 * 32 * 48
    assert [size for size, _ in trace.copies] == [(1 << 19) * 6]
    cluster = from_mapping("mine", {k: of for k, of in describe_trace(trace, H800, "x").items() if k != "like"}, H800)
    seconds = trace.product_seconds()["fp32", 96, 48, 64]
    rate = cluster.efficiency("fp32", 96, 48, 64) * cluster.fp32_tflops * 1e12
    assert rate == pytest.approx(2 * 96 * 48 * 64 / seconds, rel=2e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a readable file"),
        ("{", "not a Chrome trace"),
        ('{"events": []}', "it has no list traceEvents"),
        (
            '{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 1, "args": {}}]}',
            "record_shapes=True",
        ),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TraceFileError, match=message) as refused:
        read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
