"""Matrix products, attention core and optimizer, each in the form in which the layers run it.

B batch, S sequence, H heads, E experts, R rows sorted by expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.attention import attend, core_inputs
from model.kernels import attention_core
from model.linear import GroupedLinear, Linear, WeightGradients
from parallel.bucket import Bucket
from parallel.estimate.calibrate.clock import Clock
from parallel.estimate.hardware import KINDS, Cluster, Gemm
from parallel.estimate.products import Product, products_of
from parallel.estimate.workload import Workload
from parallel.optimizer import AdamW
from parallel.optimizer_config import OptimizerConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGE = 1024
"""Rows, columns and depth of the product that stands for a peak, unless the model has a better one."""
OPTIMIZER_ELEMENTS = 1 << 21


def measured_products(workload: Workload, base: Cluster) -> list[Product]:
    """Those of the workload, grouped ones apart from others, and a large one of each format for its peak. Weight
    gradients of all experts on one rank too: what they take beyond their products is told from a layer that has them
    all, and an expert's gradient costs its FP32 sum however few its rows are."""
    every_kind = replace(base, gemm=tuple(Gemm(kind, 1, 1, 1, 1.0) for kind in KINDS))
    large = (Product(kind, LARGE, LARGE, LARGE) for kind in DTYPES)
    alone = replace(workload, layout=replace(workload.layout, expert=1))
    by_expert = (product for product in products_of(alone, every_kind) if product.kind.endswith("_grouped_wgrad"))
    return sorted({*products_of(workload, every_kind), *by_expert, *large})


def product_seconds(product: Product, device: torch.device, clock: Clock) -> float:
    """Of one product of this shape; of grouped weight gradients, an expert's share of all."""
    share = product.experts if product.experts and product.kind.endswith("_wgrad") else 1
    return clock.seconds(_run(product, device)) / share


def core_seconds(workload: Workload, device: torch.device, clock: Clock) -> tuple[float, float]:
    """(forward, backward) of the causal core on one micro-batch."""
    c, dtype = workload.model, DTYPES[workload.precision]
    shape = workload.micro_batch_size, workload.sequence_length, c.num_attention_heads

    def drawn(width: int) -> Tensor:
        return torch.randn(*shape, width, device=device, dtype=dtype)

    read = drawn(c.qk_head_dim), drawn(c.qk_head_dim), drawn(c.v_head_dim)
    own_core = attention_core.serves(read[0], c.qk_head_dim, c.v_head_dim)
    with torch.no_grad():
        inputs = [x.transpose(1, 2) for x in read] if own_core else core_inputs(*read)
    operands = q, k, v = tuple(x.requires_grad_() for x in inputs)
    forward = clock.seconds(lambda: attend(q, k, v))
    out = attend(q, k, v)
    gradient = torch.randn_like(out)
    backward = clock.seconds(lambda: torch.autograd.grad(out, operands, gradient, retain_graph=True))
    return forward, backward


def optimizer_rate(workload: Workload, device: torch.device, clock: Clock) -> float:
    """Bytes a second of the update, counted as ``parallel/estimate/plan.py`` counts them."""
    config = OptimizerConfig(moments="bf16" if workload.moment_bytes == 2 else "fp32")
    weight = torch.nn.Parameter(torch.randn(OPTIMIZER_ELEMENTS // 256, 256, device=device))
    bucket = Bucket([("weight", weight, 0, OPTIMIZER_ELEMENTS)], None, DTYPES[workload.precision])
    optimizer = AdamW(config, [bucket])
    width = 4 * 4 + 2 * 4 + 4 * workload.moment_bytes + workload.activation_width
    return OPTIMIZER_ELEMENTS * width / clock.seconds(lambda: optimizer.update(1e-4, 1.0))


def _run(product: Product, device: torch.device) -> Callable[[], object]:
    """The product as a linear layer that somebody owns computes it; rows by expert are equally many."""
    dtype, experts = DTYPES[product.kind.partition("_")[0]], product.experts
    of_weights = product.kind.endswith("_wgrad")
    # A weight gradient [m, n] is that of a layer from n to m numbers over k rows.
    rows, inputs, outputs = (product.k, product.n, product.m) if of_weights else (product.m, product.k, product.n)
    if experts:
        rows = rows * experts if of_weights else max(rows // experts, 1) * experts
    layer: Linear | GroupedLinear = GroupedLinear(experts, inputs, outputs) if experts else Linear(inputs, outputs)
    layer = layer.to(device)
    layer.weight.data = torch.randn_like(layer.weight).to(dtype)
    owner = WeightGradients({layer.weight: torch.zeros_like(layer.weight, dtype=torch.float32)})
    layer.owner = owner
    x_RD = torch.randn(rows, inputs, device=device, dtype=dtype, requires_grad=of_weights)
    ends = [torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)] if experts else []
    if not of_weights:
        return torch.no_grad()(lambda: layer(x_RD, *ends))
    y_RF = layer(x_RD, *ends)
    torch.autograd.grad(y_RF, x_RD, torch.randn_like(y_RF))
    deferred = owner.take()
    return lambda: owner.apply(deferred)


def peaks(seconds: Mapping[Product, float]) -> dict[str, float]:
    """The best rate of each format, in operations a second."""
    best: dict[str, float] = {}
    for product, each in seconds.items():
        name = product.kind.partition("_")[0]
        best[name] = max(best.get(name, 0.0), product.operations / each)
    return best
