"""What a rank holds: parameters, gradients, optimizer state, and the activations at the simulated peak. Bytes.

A rank holds every stage that some route of the schedule takes to it, under DualPipe two. Of each it has the parameters
in the compute format and FP32 gradients whole; FP32 masters and both moments are sharded over the stage's replica
group (``parallel/mesh.py``), which for routed experts is smaller by the expert-parallel factor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.fp8 import SIZE
from parallel.estimate.operations import Operations
from parallel.estimate.peak import Placement
from parallel.estimate.workload import Workload


@dataclass(frozen=True)
class StageParameters:
    """Elements of one stage: those that every replica has, and the routed experts of one expert-parallel rank.
    ``products``: of the dense ones, those of layers that compute in FP8 where that is asked for
    (``model/fp8/assign.py``); routed experts all do."""

    dense: int
    routed: int
    products: int

    @property
    def total(self) -> int:
        return self.dense + self.routed


@dataclass(frozen=True)
class RankMemory:
    parameters: float
    """In the compute format, and in FP8 what products take of them, kept from GATHER to GATHER."""
    gradients: float
    optimizer: float
    """Masters and moments of the owned shards."""
    activations: float
    buffers: float
    """Pipeline messages received ahead and on their way out, and the rows of one dispatch and one combine."""
    logits: float
    """Of the head, while one micro-batch passes it."""

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.logits


def stage_parameters(operations: Operations, layers: Sequence[range]) -> list[StageParameters]:
    """Counted from the widths, stage by stage."""
    w, c = operations.workload, operations.workload.model
    projections = sum(m.outputs * m.inputs for m in operations.attention_matrices().values())
    attention = projections + c.kv_lora_rank + (c.q_lora_rank or 0) + 2 * c.hidden_size  # norms
    routed = c.n_routed_experts // w.layout.expert * 3 * c.hidden_size * c.moe_intermediate_size
    shared = 3 * c.hidden_size * c.moe_intermediate_size * c.n_shared_experts
    moe = attention + shared + c.n_routed_experts * c.hidden_size
    dense = attention + 3 * c.hidden_size * c.intermediate_size
    table = c.vocab_size * c.hidden_size
    found = []
    for stage, each in enumerate(layers):
        experts = [layer for layer in each if c.is_moe(layer)]
        own = len(experts) * moe + (len(each) - len(experts)) * dense
        count = len(experts)
        products = len(each) * projections + count * shared
        products += (len(each) - count) * 3 * c.hidden_size * c.intermediate_size
        own += table if stage == 0 else 0
        if stage == len(layers) - 1:
            own += table + c.hidden_size
            # Embedding and head of a multi-token-prediction module are the main model's (report, 2.2).
            own += w.mtp * (moe + 2 * c.hidden_size**2 + 3 * c.hidden_size)
            products += w.mtp * (projections + shared)
            count += w.mtp
        found.append(StageParameters(own, count * routed, products))
    return found


def active_parameters(operations: Operations) -> int:
    """As ``model.size`` counts them on the model itself: those that one token is multiplied with, the routers' biases
    included, without multi-token prediction."""
    w, c = operations.workload, operations.workload.model
    alone = replace(w, mtp=0, imbalance=1.0, layout=replace(w.layout, expert=1))
    (whole,) = stage_parameters(Operations(alone, operations.cluster), [range(c.num_hidden_layers)])
    biases = c.n_routed_experts * sum(map(c.is_moe, range(c.num_hidden_layers)))
    reached = whole.routed // c.n_routed_experts * c.num_experts_per_tok
    return whole.dense - c.vocab_size * c.hidden_size + reached + biases


def layer_activation_bytes(workload: Workload, moe: bool) -> float:
    """What one layer keeps of one micro-batch from its forward to the end of its backward, as ``parallel/layer.py``
    runs it under ``model.recompute``. Results of the MLP are sent on."""
    c, width = workload.model, workload.activation_width
    full = c.recompute == "full"
    shared = c.n_shared_experts * c.moe_intermediate_size if moe else c.intermediate_size
    row = (lambda intermediate: 0.0) if full else _row_bytes(workload)
    token = c.hidden_size * width * (2 if shared else 1) if full else _token_bytes(workload, moe)
    token += row(shared)
    if not moe:
        return workload.tokens * token
    as_sent = workload.layout.expert > 1 and workload.fp8_payload
    received = _operand_bytes(workload) if as_sent or not full else width
    # Of each row of an expert its gate value and two places.
    routed = row(c.moe_intermediate_size) + c.hidden_size * received + 20
    return workload.tokens * (token + c.num_experts_per_tok * workload.imbalance * routed)


def _operand_bytes(workload: Workload) -> float:
    """Of one number as a product reads it; in FP8 with its share of an FP32 scale."""
    return {"fp8": 1 + 4 / 128, "bf16": 2.0, "fp32": 4.0}[workload.precision]


def _token_bytes(workload: Workload, moe: bool) -> float:
    """Of a token in attention, norms and router: inputs of norms and products; queries, keys, values and results of the
    core, as wide as the keys (``model.attention.core_inputs``) but for a result that is kept alone."""
    c, width, operand = workload.model, workload.activation_width, _operand_bytes(workload)
    heads, latents = c.num_attention_heads, (c.q_lora_rank or 0) + c.kv_lora_rank
    norms = 2 * c.hidden_size + latents
    token: float = norms * width + c.qk_rope_head_dim * width
    token += 4 * (4 if c.q_lora_rank is not None else 3) + 4 * heads  # statistics
    token += heads * (c.v_head_dim if workload.makes_again("mla_up") else c.qk_head_dim) * width  # the core's result
    if not workload.makes_again("norm"):
        token += norms * operand + (4 * c.hidden_size if moe and width < 4 else 0)  # the router reads FP32
    if workload.makes_again("mla_up") and not workload.makes_again("norm") and workload.precision == "fp8":
        token += latents * width  # what they are made of, beside its FP8 copy
    if not workload.makes_again("mla_up"):
        token += 3 * heads * c.qk_head_dim * width
        token += heads * c.v_head_dim * (1.5 + 4 / 128 if workload.precision == "fp8" else width)
    if moe:  # scores in FP32; of each choice its number, its score and its weight
        token += 4 * c.n_routed_experts + 16 * c.num_experts_per_tok + 4
    return token


def _row_bytes(workload: Workload) -> Callable[[int], float]:
    """Of a row in an MLP of some width: SwiGLU's input, and its output unless that is made again, as in FP8 always."""
    parts = 2 if workload.makes_again("swiglu") else 3
    return lambda intermediate: parts * intermediate * _operand_bytes(workload)


def layer_deferred_bytes(workload: Workload, moe: bool) -> float:
    """What one layer keeps of one micro-batch from I to W, whatever is made again: the inputs of its linear layers and
    the gradients of their outputs, both as products read them."""
    c, operand = workload.model, _operand_bytes(workload)
    fp8 = workload.precision == "fp8"
    heads, query_latent = c.num_attention_heads, c.q_lora_rank or 0
    inputs = c.hidden_size + query_latent + c.kv_lora_rank
    outputs = query_latent + heads * c.qk_head_dim + c.kv_lora_rank + c.qk_rope_head_dim
    outputs += heads * (c.qk_nope_head_dim + c.v_head_dim) + c.hidden_size
    token: float = operand * (inputs + outputs) + heads * c.v_head_dim * (1.5 + 4 / 128 if fp8 else operand)

    def row(intermediate: int) -> float:
        """Of a row in an MLP; in FP8 the second layer's input is made of the first one's output."""
        return operand * (2 * c.hidden_size + (4 if fp8 else 3) * intermediate)

    if not moe:
        return workload.tokens * (token + row(c.intermediate_size))
    token += 4 * c.n_routed_experts + (4 * c.hidden_size if workload.precision != "fp32" else 0)  # of the router, FP32
    token += row(c.n_shared_experts * c.moe_intermediate_size) if c.n_shared_experts else 0
    return workload.tokens * (token + c.num_experts_per_tok * workload.imbalance * row(c.moe_intermediate_size))


def deferred_bytes(workload: Workload, layers: Sequence[range]) -> list[float]:
    """Of one micro-batch between I and W, by stage; a head keeps the gradient of its logits."""
    c, width = workload.model, workload.activation_width
    dense, moe = layer_deferred_bytes(workload, False), layer_deferred_bytes(workload, True)
    found = [sum(moe if c.is_moe(layer) else dense for layer in each) for each in layers]
    projection = 3 * c.hidden_size * _operand_bytes(workload)
    found[-1] += (1 + workload.mtp) * workload.tokens * width * (c.hidden_size + c.vocab_size)
    found[-1] += workload.mtp * (moe + workload.tokens * projection)
    return found


def activation_bytes(workload: Workload, layers: Sequence[range]) -> list[float]:
    """Of one micro-batch, by stage. The head keeps its input, the embedding its tokens."""
    c = workload.model
    dense, moe = layer_activation_bytes(workload, False), layer_activation_bytes(workload, True)
    found = [sum(moe if c.is_moe(layer) else dense for layer in each) for each in layers]
    state = message_bytes(workload)
    found[-1] += 2 * state + workload.mtp * (moe + 6 * state)
    found[0] += 8 * workload.tokens
    return found


def rank_memory(
    placement: Placement,
    workload: Workload,
    parameters: Sequence[StageParameters],
    peak_R: np.ndarray,
) -> list[RankMemory]:
    """For each pipeline rank; the same for all its replicas."""
    parts = ranks_memory(placement, workload, parameters, peak_R)
    rows = zip(*(part_R.tolist() for part_R in parts.values()), strict=True)
    return [RankMemory(**dict(zip(parts, row, strict=True))) for row in rows]


def ranks_memory(
    placement: Placement, workload: Workload, parameters: Sequence[StageParameters], peak_R: np.ndarray
) -> dict[str, np.ndarray]:
    """The fields of ``RankMemory``, each for all pipeline ranks at once."""
    layout, c, width = workload.layout, workload.model, workload.activation_width
    dense_S, routed_S, products_S = (
        np.array([getattr(each, name) for each in parameters], dtype=float) for name in ("dense", "routed", "products")
    )
    block = 1 + 4 / SIZE**2 if workload.precision == "fp8" else 0.0
    first_R, last_R = placement.held_RS[:, 0], placement.held_RS[:, -1]
    elements_R = placement.held_RS @ (dense_S + routed_S)
    if workload.mtp:
        # Multi-token prediction embeds tokens too: with a copy, whose optimizer state is the first stage's.
        elements_R = elements_R + c.vocab_size * c.hidden_size * last_R * (1 - first_R)
    owned_S = (dense_S + routed_S * layout.expert) / (placement.copies_S * layout.data)
    return {
        "parameters": width * elements_R + block * (placement.held_RS @ (products_S + routed_S)),
        "gradients": 4.0 * elements_R,
        "optimizer": placement.held_RS @ owned_S * (4 + 2 * workload.moment_bytes),
        "activations": peak_R,
        "buffers": np.full(placement.ranks, _buffers(workload, placement.ranks)),
        "logits": last_R * (workload.tokens * c.vocab_size * (width + 8.0)),
    }


def _buffers(workload: Workload, ranks: int) -> float:
    c, width, state = workload.model, workload.activation_width, message_bytes(workload)
    # What is made again of a layer is there while its backward runs.
    again = layer_activation_bytes(workload.recomputing(()), True) if workload.model.recompute == "full" else 0.0
    messages = 4 * 3 * state if ranks > 1 else 0  # four channels: two received ahead, one being sent
    rows = workload.tokens * c.num_experts_per_tok * c.hidden_size * width * workload.imbalance
    return again + messages + (2 * rows if workload.layout.expert > 1 else 0.0)


def message_bytes(workload: Workload) -> float:
    """Of one pipeline message: the residual stream of one micro-batch."""
    return float(workload.tokens * workload.model.hidden_size * workload.activation_width)
