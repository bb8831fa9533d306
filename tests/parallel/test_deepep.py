"""DeepSeek's kernels' exchange, over a buffer of their interface, against one process and against the flat exchange."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from launch.config import ConfigError, load
from launch.rank import Place, device_of
from model.fp8.quantise import dequantise
from parallel import deepep
from parallel.activity import Activity
from parallel.comm_stream import HostStream
from parallel.deepep import DeepEPExchange
from parallel.hop import Traffic
from parallel.mesh import Layout
from tests.parallel.deep_ep_buffer import DocumentedBuffer
from tests.parallel.test_exchange import HIDDEN, Case, Exchanges, Way, alone, drawn, edges, mine, routings, through
from tests.ranks import run_ranks


def over(each: int, fp8: bool = False) -> DeepEPExchange:
    """Four ranks on two nodes."""
    layout, rank = Layout(1, 4, 4, ranks_per_node=2), dist.get_rank()
    own = Traffic(), HostStream(), fp8, Activity(rank), torch.device("cpu")
    return DeepEPExchange(DocumentedBuffer(), layout, rank, each, *own)


def together(rank: int, cases: Sequence[Case]) -> list[tuple[list[list[float]], tuple[float, float]]]:
    """For each case result and gradients, and the traffic of dispatch, there and back. What experts get and what they
    learn is the flat exchange's, to the bit."""
    found = []
    flat = Exchanges(4, [1])
    for case in cases:
        exchange = over(case.each)
        got, wanted = through(exchange, case), through(flat.over(Way(1), case.each), case)
        for ours, theirs in zip(got[3:], wanted[3:], strict=True):
            assert torch.equal(ours, theirs), case
        traffic = float(exchange.traffic.inside_bytes), float(exchange.traffic.between_bytes)
        found.append(([t.flatten().tolist() for t in got[:4]], traffic))
    return found


@settings(max_examples=1, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.lists(routings(), min_size=8, max_size=8))
def test_ranks_together_are_one_process_alone_and_rows_cross_once_to_a_node(cases: list[Case]) -> None:
    cases = [*edges(4), *cases]
    ranks = run_ranks(together, 4, cases)
    for number, case in enumerate(cases):
        for kind, wanted in enumerate(alone(case)):
            got = torch.cat([torch.tensor(rank[number][0][kind]) for rank in ranks])
            torch.testing.assert_close(got, wanted.flatten(), rtol=1e-6, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
        inside, between = 0, 0
        starts = torch.tensor(case.tokens).cumsum(0)
        for token, chosen in enumerate(drawn(case)[2].tolist()):
            home = int((starts <= token).sum())
            owners = {expert // case.each for expert in chosen}
            inside += sum(owner % 2 != home % 2 for owner in owners)
            between += len({owner // 2 for owner in owners} - {home // 2})
        # Rows of FP32 four times; expert numbers and gate values once, and the gradients of these.
        row_bytes = 4 * 4 * HIDDEN + case.chosen * (12 + 4)
        counted = [sum(rank[number][1][kind] for rank in ranks) for kind in (0, 1)]
        assert counted == [inside * row_bytes, between * row_bytes], case


def in_fp8(rank: int, cases: Sequence[Case]) -> None:
    flat = Exchanges(4, [1])
    for case in cases:
        x, weights, indices, gz, _ = drawn(case)
        own, ours, theirs = mine(case), over(case.each, fp8=True), flat.over(Way(1, fp8=True), case.each)
        sent, wanted = (e.dispatch(x[own], weights[own], indices[own]).wait() for e in (ours, theirs))
        assert sent.payload is not None and wanted.payload is not None and sent.rows_RD.shape == wanted.rows_RD.shape
        assert torch.equal(sent.payload.stored.view(torch.uint8), wanted.payload.stored.view(torch.uint8)), case
        assert torch.equal(sent.payload.scales, wanted.payload.scales), case
        assert torch.equal(sent.weights_R, wanted.weights_R) and torch.equal(sent.ends_E, wanted.ends_E), case
        gy, gy_wanted = (e.dispatch_gradient(gz[own], s.layout).wait() for e, s in ((ours, sent), (theirs, wanted)))
        assert torch.equal(dequantise(gy), dequantise(gy_wanted)), case
        rows = dequantise(sent.payload)
        z, z_wanted = (e.combine(rows, s.layout).wait() for e, s in ((ours, sent), (theirs, wanted)))
        torch.testing.assert_close(z, z_wanted, rtol=1e-6, atol=1e-6)


def test_what_travels_in_fp8_is_the_flat_exchanges_to_the_bit() -> None:
    run_ranks(in_fp8, 4, edges(4))


def refusal(device: str, compute: str = "bf16") -> str:
    with pytest.raises(ValueError) as caught:
        deepep.check(torch.device(device), compute)
    return str(caught.value)


def test_what_the_kernels_lack_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("configs/tiny-cpu.yaml", ["dispatch.kind=deepep", "train.device=cpu"])
    with pytest.raises(ConfigError) as caught:
        device_of(config, Place(0, 8, 0, 8))
    assert str(caught.value) == refusal("cpu")
    assert refusal("cpu").startswith("dispatch.kind='deepep' needs CUDA")
    assert "needs precision.compute=bf16 or fp8" in refusal("cuda", "fp32")
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert "needs the package deep_ep, github.com/deepseek-ai/DeepEP" in refusal("cuda")
    package: Any = ModuleType("deep_ep")
    package.__version__ = "1.2.1"
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    assert "needs deep_ep from version 2, not 1.2.1" in refusal("cuda")
    package.ElasticBuffer = DocumentedBuffer
    deepep.check(torch.device("cuda"), "bf16")
    group: Any = object()
    buffer: Any = deepep.make_buffer(group, config.model, 64, True, 0.5)
    assert buffer.group is group and buffer.options["num_gpu_timeout_secs"] == 1 and buffer.options["deterministic"]
