"""Calibration: from what ranks measure back to the rates that they had, and a measurement of this very machine."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from dualpipe.overlap import Phase
from dualpipe.program import Op
from model.config import ModelConfig
from parallel.cores import idle_share, own_cores
from parallel.estimate.calibrate.clock import Clock
from parallel.estimate.calibrate.describe import describe
from parallel.estimate.calibrate.products import measured_products
from parallel.estimate.calibrate.ranks import Measured, measure
from parallel.estimate.hardware import Cluster, ClusterError, Gemm, from_mapping
from parallel.estimate.operations import PHASES, Operations
from parallel.estimate.plan import Run, make_plan
from parallel.estimate.products import Product
from parallel.estimate.workload import Workload
from parallel.mesh import Layout
from tests.parallel.estimate.published import H800
from tests.parallel.estimate.test_memory import SMALL

WORKLOAD = Workload(SMALL, Layout(2, 4, 2), "dualpipe", 64, 2, 8, "bf16", 4)
READ = {
    "cores_per_node": (2.0, "read"),
    "ranks_per_node": (8.0, "read"),
    "multiprocessors": (1.0, "read"),
    "communication_multiprocessors": (0.0, "read"),
    "computing_busy": (1.0, "read"),
}


def machine() -> Cluster:
    """A machine whose every product has a rate of its own; nothing is at a peak but the large products."""
    products = measured_products(WORKLOAD, H800)
    points = [
        Gemm(p.kind, p.m, p.n, p.k, 1.0 if p.m == p.n == p.k == 1024 else 0.2 + 0.7 * i / len(products))
        for i, p in enumerate(products)
    ]
    own: dict[str, Any] = {key: value for key, (value, _) in READ.items()}
    rates = {f"{name}_memory": 0.1 + 0.1 * i for i, name in enumerate(PHASES.values()) if name != "attn_weight"}
    fixed = {f"{name}_us": 100.0 + 10 * i for i, name in enumerate(PHASES.values())}
    links: dict[str, Any] = {"nvlink_gb_per_s": 4.0, "nvlink_efficiency": 1.0, "latency_us": 100.0, "reduce_link": 0.5}
    peaks: dict[str, Any] = {"bf16_tflops": 0.2, "fp32_tflops": 0.1, "memory_gb_per_s": 10.0, "memory_efficiency": 1.0}
    return replace(H800, gemm=tuple(points), **own, **rates, **fixed, **links, **peaks)  # type: ignore[arg-type]


def measured_on(cluster: Cluster) -> Measured:
    """What ranks of that machine would measure."""
    alone = replace(WORKLOAD, layout=replace(WORKLOAD.layout, expert=1))
    operations = {each.tokens: Operations(each, cluster) for each in (alone, replace(alone, sequence_length=32))}
    seconds = {p: p.operations / _rate(cluster, p) for p in measured_products(WORKLOAD, H800)}
    head = operations[128].head()
    apart = replace(cluster, cores_per_node=0.0)
    waits = [
        sum(Operations(WORKLOAD, apart).exchange((phase, op)) for phase in (Phase.DISPATCH, Phase.COMBINE))
        for op in (Op.FORWARD, Op.BACKWARD_INPUT)
    ]
    small, large = 100e-6, 100e-6 + (4 << 20) / 2e9
    return Measured(
        products=seconds,
        core=(operations[128].core(Op.FORWARD), operations[128].core(Op.BACKWARD_INPUT)),
        phases={tokens: dict(of.layer(True)) for tokens, of in operations.items()},
        exchanged=(waits[0], waits[1]),
        head=(head.forward, head.backward_input + head.backward_weight),
        optimizer_bytes_per_s=10e9,
        idle=0.1,
        links={1: (small, large, large)},
        reduction=2 * (4 << 20) / (2e9 * 0.5),
    )


def _rate(cluster: Cluster, product: Product) -> float:
    peak: float = getattr(cluster, f"{product.kind.partition('_')[0]}_tflops")
    return peak * 1e12 * cluster.efficiency(*product[:4])


def described(measured: Measured, own_peaks: bool = True) -> Cluster:
    description = describe(measured, WORKLOAD, H800, "a test", READ, own_peaks)
    assert description.pop("like") == "h800"
    return from_mapping("here", description, H800)


def test_what_is_described_takes_what_was_measured() -> None:
    """A rate at 64 and at 128 tokens gives the rate between them too."""
    there = machine()
    here = described(measured_on(there))
    for length in (32, 48, 64):
        workload = replace(WORKLOAD, sequence_length=length)
        expected, found = (Operations(workload, cluster).layer(True) for cluster in (there, here))
        tolerance = 0.01 if length != 48 else 0.05  # no product was measured at 96 tokens
        assert dict(found) == pytest.approx(dict(expected), rel=tolerance)
    one, other = (Operations(WORKLOAD, cluster) for cluster in (there, here))
    assert sum(other.head()) == pytest.approx(sum(one.head()), rel=0.01)
    assert sum(other.message()) == pytest.approx(sum(one.message()), rel=0.01)
    assert here.reduce_link == pytest.approx(0.5, rel=0.01)
    assert here.cores_busy == pytest.approx(0.9)
    assert here.sources["attn_forward_us"] == "measured: a test"
    assert here.sources["detection_seconds"].startswith("assumed, as h800")


def test_a_phase_faster_than_its_products_takes_no_less_than_nothing_more() -> None:
    measured = measured_on(machine())
    measured.phases = {tokens: {part: 0.5 * s for part, s in of.items()} for tokens, of in measured.phases.items()}
    assert all(seconds >= 0 for seconds in Operations(WORKLOAD, described(measured)).layer(True).values())


def test_measured_rates_above_a_named_peak_are_refused() -> None:
    measured = measured_on(machine())
    measured.products = {product: seconds / 1e5 for product, seconds in measured.products.items()}
    with pytest.raises(ClusterError, match=r"cluster h800: \w+_tflops=.* measured here: name the description"):
        described(measured, own_peaks=False)


def test_this_machine_in_one_process() -> None:
    """All that one rank can measure, and a plan from it: the layer's phases are those that were measured."""
    model = ModelConfig(**{**SMALL.__dict__, "hidden_size": 64, "n_routed_experts": 8, "moe_intermediate_size": 64})
    workload = replace(WORKLOAD, model=model, layout=Layout(), schedule="1f1b")
    measured = measure(workload, H800, torch.device("cpu"), 1, rounds=1)
    assert set(measured.products) == set(measured_products(workload, H800))
    assert min(measured.products.values()) > 0 and min(measured.core) > 0
    description = describe(measured, workload, H800, "here", READ, own_peaks=True)
    description.pop("like")
    here = from_mapping("here", description, H800)
    found, took = Operations(workload, here).layer(True), measured.phases[workload.tokens]
    forward = sum(seconds for (_, op), seconds in took.items() if op is Op.FORWARD)
    planned = sum(seconds for (_, op), seconds in found.items() if op is Op.FORWARD)
    assert planned >= forward * 0.99  # products may take longer alone than in their phase, and nothing is negative
    assert make_plan(workload, here, Run(1, None, 1)).step_seconds > 0


def test_a_clock_counts_work_and_not_waiting() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.seconds(lambda: time.sleep(0.02), most=1) < 0.01


def test_cores_are_not_idle_while_something_runs_on_them() -> None:
    """One core of them, at least, as long as this process is busy."""

    def busy() -> None:
        while time.process_time() < until:
            pass

    until = time.process_time() + 0.2
    _, share = idle_share(busy)
    assert 0 <= share <= 1 - 1 / len(own_cores()) + 0.1
