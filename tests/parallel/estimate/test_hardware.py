"""Descriptions of clusters: what is refused, and what a measured rate says about other shapes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.plan import CLUSTERS, read_cluster
from parallel.estimate.hardware import ClusterError, changed, from_mapping, numbers
from tests.parallel.estimate.published import H800

SIZES = st.integers(1, 1 << 18)


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_every_value_of_every_cluster_has_a_source_of_a_known_sort(name: str) -> None:
    cluster = read_cluster(name)
    assert set(cluster.sources) == {*numbers(), "gemm"}
    sorts = ("vendor:", "report:", "published:", "measured:", "derived:", "assumed")
    assert [key for key, source in cluster.sources.items() if not source.startswith(sorts)] == []


@given(SIZES, SIZES, SIZES)
def test_an_efficiency_lies_between_the_measured_ones(m: int, n: int, k: int) -> None:
    measured = [point.efficiency for point in H800.gemm if point.kind == "fp8"]
    assert min(measured) - 1e-12 <= H800.efficiency("fp8", m, n, k) <= max(measured) + 1e-12


def test_a_measured_shape_keeps_its_own_efficiency() -> None:
    for point in H800.gemm:
        assert H800.efficiency(*point[:4]) == point.efficiency


def test_a_kind_that_was_never_measured_is_refused() -> None:
    with pytest.raises(ClusterError, match="cluster h800: gemm has no point of kind fp32"):
        H800.efficiency("fp32", 1, 1, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nvlnk_gb_per_s": {"value": 1, "source": "x"}}, "nvlnk_gb_per_s is not a key .* nearest is nvlink_gb_per_s"),
        ({"ib_gb_per_s": 50}, "ib_gb_per_s must be {value: NUMBER, source: TEXT}"),
        ({"ib_gb_per_s": {"value": "50 GB", "source": "x"}}, "ib_gb_per_s='50 GB' must be a number"),
        ({"ib_gb_per_s": {"value": 50, "source": " "}}, "ib_gb_per_s must say where its value is from"),
        ({"ib_gb_per_s": {"value": 0, "source": "x"}}, "ib_gb_per_s=0 must be finite and above 0"),
        ({"ib_efficiency": {"value": 40, "source": "x"}}, "ib_efficiency=40 must be a fraction"),
        ({"ranks_per_node": {"value": 2.5, "source": "x"}}, "ranks_per_node=2.5 must be a whole number"),
        ({"communication_multiprocessors": {"value": 132, "source": "x"}}, "must be below multiprocessors"),
        ({"gemm": {"source": "x", "points": [["fp9", 1, 1, 1, 0.5]]}}, "gemm point .* KIND one of fp8"),
        ({"gemm": {"source": "x", "points": [["fp8", 1, 1, 0.5]]}}, "gemm point .* must be as in"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message) as refused:
        from_mapping("mine", values, H800)
    assert "\n" not in str(refused.value)


def test_without_a_base_nothing_may_be_missing() -> None:
    with pytest.raises(ClusterError, match="cluster mine: bf16_tflops is missing"):
        from_mapping("mine", {})


def test_what_if_changes_one_value_and_says_so() -> None:
    other = changed(H800, "nvlink", "900")
    assert other.nvlink_gb_per_s == 900 and other.sources["nvlink_gb_per_s"] == "given as what-if"
    assert other.ib_gb_per_s == H800.ib_gb_per_s
