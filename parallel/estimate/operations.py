"""How long the phases of one layer take, and the ends of the model, from their shapes and the rates of a cluster.

A phase is its matrix products, at the rate measured for such shapes, plus its small kernels (norms, casts, rotary
embedding, SwiGLU, permutation), counted in bytes of memory moved. Dispatch and combine are bytes over the slower of
the two links, plus the wait for peers. Seconds throughout.

T tokens, D model, R rows of routed experts on this rank, F width of one expert, H heads.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dualpipe.overlap import Part, Phase
from dualpipe.program import Op
from parallel.estimate.hardware import Cluster, ClusterError
from parallel.estimate.workload import Routes, Workload

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741, the names that schedules are written with

LayerCost = Mapping[Part, float]

PHASES: Mapping[Part, str] = {
    (Phase.ATTENTION, F): "attn_forward",
    (Phase.ATTENTION, I): "attn_backward",
    (Phase.ATTENTION, W): "attn_weight",
    (Phase.MLP, F): "mlp_forward",
    (Phase.MLP, I): "mlp_backward",
    (Phase.MLP, W): "mlp_weight",
}
"""Phases that compute, by what the keys of a cluster that are about them begin with."""
SMALL = [part for part in PHASES if part != (Phase.ATTENTION, W)]
"""Those with small kernels beside their products."""


class Matrix(NamedTuple):
    """A weight [outputs, inputs]; ``experts`` of them where rows are grouped by expert."""

    outputs: int
    inputs: int
    experts: int = 0


class EndCost(NamedTuple):
    """What stands before the first or behind the last layer of the model; it overlaps with nothing."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> "EndCost":  # type: ignore[override]
        return EndCost(*(a + b for a, b in zip(self, other, strict=True)))


class Operations:
    """The operations of a workload on a cluster. Raises ClusterError where the cluster's description lacks a rate."""

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        self.workload, self.cluster = workload, cluster
        self._layers: dict[bool, LayerCost] = {}
        self.operand_width = {"fp8": 1, "bf16": 2, "fp32": 4}[workload.precision]

    def attention_matrices(self) -> dict[str, Matrix]:
        c = self.workload.model
        heads = c.num_attention_heads
        query = {"q": Matrix(heads * c.qk_head_dim, c.hidden_size)}
        if c.q_lora_rank is not None:
            query = {
                "q_a": Matrix(c.q_lora_rank, c.hidden_size),
                "q_b": Matrix(heads * c.qk_head_dim, c.q_lora_rank),
            }
        return {
            **query,
            "kv_a": Matrix(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
            "kv_b": Matrix(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            "o": Matrix(c.hidden_size, heads * c.v_head_dim),
        }

    def layer(self, moe: bool) -> LayerCost:
        """The ten phases of one layer."""
        if moe not in self._layers:
            self._layers[moe] = self._layer(moe)
        return self._layers[moe]

    def _layer(self, moe: bool) -> LayerCost:
        attention = [(matrix, self.workload.tokens) for matrix in self.attention_matrices().values()]
        mlp = list(self._mlp_matrices(moe))
        cost: dict[Part, float] = {
            (Phase.ATTENTION, F): sum(self.forward(*each) for each in attention)
            + self.core(F)
            + (self._router(F) if moe else 0.0),
            (Phase.ATTENTION, I): sum(self.backward_input(*each) for each in attention)
            + self._up_again()
            + self.core(I)
            + (self._router(I) + self._router(W) if moe else 0.0),
            (Phase.ATTENTION, W): sum(self.backward_weight(*each) for each in attention),
            (Phase.MLP, F): sum(self.forward(*each) for each in mlp),
            (Phase.MLP, I): sum(self.backward_input(*each) for each in mlp),
            (Phase.MLP, W): sum(self.backward_weight(*each) for each in mlp),
            **{part: self.exchange(part) if moe else 0.0 for part in _COMMUNICATION},
        }
        for part, name in PHASES.items():
            cost[part] += getattr(self.cluster, f"{name}_us") * 1e-6
            if part in SMALL:
                cost[part] += self._small(f"{name}_memory", self.small_bytes(part, moe))
        if self.workload.model.recompute == "full":
            for phase in (Phase.ATTENTION, Phase.MLP):
                cost[phase, I] += cost[phase, F]
        if self.cluster.shares_cores:  # a core that moves bytes computes nothing meanwhile
            for phase, op in _COMMUNICATION:
                cost[Phase.MLP, op] += cost[phase, op]
                cost[phase, op] = 0.0
        return cost

    def embedding(self) -> EndCost:
        """A look-up, and a sum into FP32 rows."""
        size, width = self.workload.tokens * self.workload.model.hidden_size, self.workload.activation_width
        fixed = self.cluster.end_us * 1e-6
        return EndCost(self._long(2 * width * size) + fixed, self._long((width + 8) * size) + fixed, 0.0)

    def head(self) -> EndCost:
        """Final norm and output head in BF16, cross-entropy on FP32 logits: made, their softmax kept; in backward the
        gradient in FP32, then in BF16."""
        w, c = self.workload, self.workload.model
        width = w.activation_width
        kind = "fp32" if w.precision == "fp32" else "bf16"
        logits = w.tokens * c.vocab_size
        small = self._long(2 * width * w.tokens * c.hidden_size) + self.cluster.end_us * 1e-6
        return EndCost(
            self._product(kind, w.tokens, c.vocab_size, c.hidden_size) + self._long(logits * (width + 12)) + small,
            self._product(kind, w.tokens, c.hidden_size, c.vocab_size) + self._long(logits * (width + 12)) + small,
            self._product(f"{kind}_wgrad", c.vocab_size, c.hidden_size, w.tokens),
        )

    def message(self) -> EndCost:
        """What receiving and sending pipeline messages costs a core that has to do it itself."""
        w = self.workload
        size = w.tokens * w.model.hidden_size * w.activation_width
        each = size / self.cluster.nvlink_one_way + self.cluster.latency_us * 1e-6
        return EndCost(each, each)

    def mtp_projection(self) -> EndCost:
        """The matrix [D, 2D] at the entry of a multi-token-prediction module, and its two norms."""
        c = self.workload.model
        matrix = Matrix(c.hidden_size, 2 * c.hidden_size)
        norms = self._long(4 * self.workload.activation_width * self.workload.tokens * c.hidden_size)
        ways = (self.forward, self.backward_input, self.backward_weight)
        each = [way(matrix, self.workload.tokens) for way in ways]
        return EndCost(each[0] + norms, each[1] + 2 * norms, each[2])

    def forward(self, matrix: Matrix, rows: float) -> float:
        return self._product(self._kind(matrix), rows, matrix.outputs, matrix.inputs)

    def backward_input(self, matrix: Matrix, rows: float) -> float:
        return self._product(self._kind(matrix), rows, matrix.inputs, matrix.outputs)

    def backward_weight(self, matrix: Matrix, rows: float) -> float:
        """Of grouped matrices, a product for each expert over its share of the rows."""
        experts = max(matrix.experts, 1)
        kind = f"{self._kind(matrix)}_wgrad"
        return experts * self._product(kind, matrix.outputs, matrix.inputs, rows / experts)

    def core(self, op: Op) -> float:
        """Causal attention without its projections: half of the S x S scores, and two products forward, five back."""
        w, c = self.workload, self.workload.model
        operations = 1.0 * w.tokens * w.attended * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        efficiency = self.cluster.attention_forward_efficiency
        if op is I:
            operations, efficiency = 2.5 * operations, self.cluster.attention_backward_efficiency
        peak = self._peak("fp32" if w.precision == "fp32" else "bf16")
        return operations / (peak * self.cluster.computing_share * efficiency)

    def exchange(self, part: Part) -> float:
        """Dispatch or combine, forward or backward: over InfiniBand once to each node, then over NVLink to the ranks
        (report, 3.2.2), or once to each rank over the link that leads there. The gradient of dispatch travels as a
        combine does, that of combine as a dispatch."""
        w, cluster = self.workload, self.cluster
        if w.layout.expert == 1:
            return 0.0
        phase, op = part
        name = f"{phase.value}_{'forward' if op is F else 'backward'}"
        sent = (phase, op) in ((Phase.DISPATCH, F), (Phase.COMBINE, I))
        size = w.tokens * w.imbalance * (self._row_bytes() if sent else w.activation_width * w.model.hidden_size)
        routes, local = self._routes(), min(cluster.ranks_per_node, w.layout.expert)
        crossing = routes.remote_nodes if w.hierarchical else routes.remote_ranks
        arriving = routes.ranks if w.hierarchical else routes.ranks - routes.remote_ranks
        between = size * crossing / (cluster.ib_gb_per_s * 1e9 * getattr(cluster, f"{name}_link"))
        inside = size * arriving * (1 - 1 / local) / cluster.nvlink_one_way
        wait = getattr(cluster, f"{name}_skew_us") + cluster.latency_us
        return max(between, inside) + wait * 1e-6

    def _routes(self) -> Routes:
        return self.workload.routes(int(self.cluster.ranks_per_node))

    def _row_bytes(self) -> float:
        """Of a token on its way to an expert: FP8 with an FP32 scale for each 128 numbers, or as it is computed."""
        hidden = self.workload.model.hidden_size
        narrow = self.workload.precision == "fp8" and self.workload.fp8_payload
        return hidden * (1 + 4 / 128) if narrow else hidden * self.workload.activation_width

    def _rows(self) -> float:
        """R: rows of the busiest rank's routed experts, for one micro-batch of every rank of the group."""
        return self.workload.tokens * self.workload.model.num_experts_per_tok * self.workload.imbalance

    def _mlp_matrices(self, moe: bool) -> Iterable[tuple[Matrix, float]]:
        w, c = self.workload, self.workload.model
        if not moe:
            yield Matrix(2 * c.intermediate_size, c.hidden_size), w.tokens
            yield Matrix(c.hidden_size, c.intermediate_size), w.tokens
            return
        experts = c.n_routed_experts // w.layout.expert
        yield Matrix(2 * c.moe_intermediate_size, c.hidden_size, experts), self._rows()
        yield Matrix(c.hidden_size, c.moe_intermediate_size, experts), self._rows()
        if c.n_shared_experts:
            shared = c.n_shared_experts * c.moe_intermediate_size
            yield Matrix(2 * shared, c.hidden_size), w.tokens
            yield Matrix(c.hidden_size, shared), w.tokens

    def _up_again(self) -> float:
        """MLA's up-projections, where they run again on their own."""
        if not self.workload.makes_again("mla_up"):
            return 0.0
        matrices = self.attention_matrices()
        again = [matrices[name] for name in ("q", "q_b", "kv_b") if name in matrices]
        return sum(self.forward(matrix, self.workload.tokens) for matrix in again)

    def _router(self, op: Op) -> float:
        """One product of the router's, in BF16 where linear layers are FP8."""
        w, c = self.workload, self.workload.model
        kind = "fp32" if w.precision == "fp32" else "bf16"
        return self._product(kind, w.tokens, c.n_routed_experts, c.hidden_size)

    def small_bytes(self, part: Part, moe: bool) -> float:
        """Memory moved by the small kernels of one of the phases in ``SMALL``."""
        phase, op = part
        return self._attention_bytes(op) if phase is Phase.ATTENTION else self._mlp_bytes(op, moe)

    def _attention_bytes(self, op: Op) -> float:
        """Memory moved by the small kernels of an attention phase."""
        c, width = self.workload.model, self.workload.activation_width
        heads = c.num_attention_heads
        hidden, query, value = c.hidden_size, heads * c.qk_head_dim, heads * c.v_head_dim
        up = heads * (c.qk_nope_head_dim + c.v_head_dim)
        latents = (c.q_lora_rank or 0) + c.kv_lora_rank
        norms = 2 * hidden + 2 * latents  # numbers read and written by one norm of each
        assembled = 2 * query + (query + heads * c.qk_nope_head_dim) + 2 * value  # rotary turns, heads put together
        if op is F:
            numbers = norms + assembled + 3 * hidden + 2 * hidden  # residual sum and the second norm
            return self.workload.tokens * (width * numbers + self._casts(2 * hidden + latents + value))
        again = (norms if self.workload.makes_again("norm") else 0) + (
            assembled if self.workload.makes_again("mla_up") else 0
        )
        taken_apart = 2 * query + (query + up)
        norms_back = 2 * 3 * hidden + 3 * latents + 2 * 3 * hidden  # with the two sums into the residual gradient
        casts = self._casts(hidden + latents) if self.workload.makes_again("norm") else 0.0
        casts += self._casts(hidden + query + up + latents, both=True) + self._transposes(value + hidden + latents)
        return self.workload.tokens * (width * (again + taken_apart + norms_back) + casts)

    def _mlp_bytes(self, op: Op, moe: bool) -> float:
        """Memory moved by the small kernels of an MLP phase, routed rows and the token's own path together."""
        w, c = self.workload, self.workload.model
        routed = self._row_traffic(op, c.moe_intermediate_size, moved=True) * self._rows() if moe else 0.0
        own = c.n_shared_experts * c.moe_intermediate_size if moe else c.intermediate_size
        return routed + self._row_traffic(op, own, moved=False) * w.tokens

    def _row_traffic(self, op: Op, intermediate: int, moved: bool) -> float:
        """For one row of an MLP. ``moved``: it is copied to its expert's place before, and summed behind."""
        hidden, width = self.workload.model.hidden_size, self.workload.activation_width
        if op is F:
            swiglu = 2 * intermediate * width + intermediate * self.operand_width
            return swiglu + (2 * hidden * self.operand_width + 2 * hidden * width if moved else 3 * hidden * width)
        if op is W:
            return self._transposes((2 if moved else 1) * hidden)
        swiglu = (2 + 1 + 2) * intermediate * width  # its input, the gradient, and the input's gradient
        again = intermediate * self.operand_width if self.workload.makes_again("swiglu") else 0
        casts = self._casts(2 * intermediate, both=True) + (0.0 if moved else self._casts(hidden, both=True))
        return swiglu + again + casts + (2 * hidden * (self.operand_width + width) if moved else 0.0)

    def _casts(self, numbers: float, both: bool = False) -> float:
        """Bytes of quantising BF16 numbers, ``both`` along rows and, for weight gradients, along columns."""
        return numbers * (2 + (2 if both else 1)) if self.workload.precision == "fp8" else 0.0

    def _transposes(self, numbers: float) -> float:
        """Bytes of requantising stored FP8 numbers along columns, for weight gradients (report, 3.3.2)."""
        return numbers * 2.0 if self.workload.precision == "fp8" else 0.0

    def _kind(self, matrix: Matrix) -> str:
        precision = self.workload.precision
        grouped = f"{precision}_grouped"  # those that were not measured apart run like others
        return grouped if matrix.experts and self.cluster.knows(grouped) else precision

    def _product(self, kind: str, m: float, n: float, k: float) -> float:
        """Seconds of [m, k] x [k, n]."""
        name = kind.partition("_")[0]
        peak = self._peak(name) * self.cluster.computing_share
        sizes = (max(round(m), 1), max(round(n), 1), max(round(k), 1))
        return 2 * m * n * k / (peak * self.cluster.efficiency(kind, *sizes))

    def _peak(self, precision: str) -> float:
        """Operations a second."""
        peak: float = getattr(self.cluster, f"{precision}_tflops")
        if not peak:
            others = [p for p in ("bf16", "fp8") if getattr(self.cluster, f"{p}_tflops")]
            raise ClusterError(
                f"cluster {self.cluster.name}: {precision}_tflops=0: the device has no such products, but those of "
                f"precision={' or '.join(others)}"
            )
        return peak * 1e12

    def _small(self, rate: str, size: float) -> float:
        return size / (self.cluster.memory_gb_per_s * 1e9 * getattr(self.cluster, rate))

    def _long(self, size: float) -> float:
        return size / (self.cluster.memory_gb_per_s * 1e9 * self.cluster.memory_efficiency)


_COMMUNICATION = ((Phase.DISPATCH, F), (Phase.COMBINE, F), (Phase.DISPATCH, I), (Phase.COMBINE, I))
