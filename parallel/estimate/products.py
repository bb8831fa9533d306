"""The matrix products of a workload: which shapes its layers and its head multiply, in which format."""

from collections.abc import Callable
from typing import NamedTuple

from parallel.estimate.hardware import Cluster
from parallel.estimate.operations import Matrix, Operations
from parallel.estimate.workload import Workload


class Product(NamedTuple):
    """[m, k] x [k, n]. With ``experts``, m (of a weight gradient: experts times k) rows are sorted by expert."""

    kind: str
    m: int
    n: int
    k: int
    experts: int = 0

    @property
    def operations(self) -> float:
        """Of one product; of grouped weight gradients, of one expert's."""
        return 2.0 * self.m * self.n * self.k

    @property
    def precision(self) -> str:
        return self.kind.partition("_")[0]

    @property
    def bytes(self) -> float:
        """Memory that it has to move: its operands once, and its result, FP32 for weight gradients."""
        width, of_weights = {"fp8": 1, "bf16": 2, "fp32": 4}[self.precision], self.kind.endswith("_wgrad")
        copies = 1 if of_weights else max(self.experts, 1)  # of the weight [k, n]
        result = 4 if of_weights else max(width, 2)
        return width * (self.m * self.k + copies * self.k * self.n) + result * self.m * self.n


def products_of(workload: Workload, cluster: Cluster) -> list[Product]:
    """Every product of the workload's layers and head, of the kinds that the cluster's description tells apart."""
    recorder = _Recorder(workload, cluster)
    recorder.layer(False), recorder.layer(True), recorder.head()
    return sorted(recorder.seen)


class _Recorder(Operations):
    """Writes down every product that it is asked for."""

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        super().__init__(workload, cluster)
        self.seen: set[Product] = set()
        self._experts = 0

    def forward(self, matrix: Matrix, rows: float) -> float:
        return self._of(matrix, super().forward, rows)

    def backward_input(self, matrix: Matrix, rows: float) -> float:
        return self._of(matrix, super().backward_input, rows)

    def backward_weight(self, matrix: Matrix, rows: float) -> float:
        return self._of(matrix, super().backward_weight, rows)

    def _of(self, matrix: Matrix, way: Callable[[Matrix, float], float], rows: float) -> float:
        self._experts = matrix.experts
        seconds = way(matrix, rows)
        self._experts = 0
        return seconds

    def _product(self, kind: str, m: float, n: float, k: float) -> float:
        self.seen.add(Product(kind, max(round(m), 1), max(round(n), 1), max(round(k), 1), self._experts))
        return 0.0
