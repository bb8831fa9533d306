"""AdamW on shards is torch's AdamW on the whole, and BF16 moments are FP32 updates rounded for storage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.bucket import Bucket
from parallel.optimizer import AdamW, clip_scale
from parallel.optimizer_config import OptimizerConfig
from tests.parallel.test_bucket import member

# More elements than the update handles in one pass, and a boundary of the decay inside a pass.
SHAPES = [(300, 301), (1000,), (5, 7), (3,)]
CONFIG = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.3)
RATES = [0.05, 0.02, 0.02, 0.1]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def named() -> list[tuple[str, nn.Parameter, int, int]]:
    return [(f"p{number}", p, 0, p.numel()) for number, p in enumerate(parameters())]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def fill(bucket: Bucket, step: int) -> None:
    values = gradients(step)
    # A bucket takes matrices first; its buffers and segments are in its own order.
    for segment, buffer in zip(bucket.segments, bucket.buffers.values(), strict=True):
        buffer.copy_(values[int(segment.name[1:])])


def by_torch(scale: float) -> list[nn.Parameter]:
    weights = parameters()
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.epsilon)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, g in zip(weights, gradients(step), strict=True):
            p.grad = g * scale
        optimizer.step()
    return weights


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_update_is_torchs_adamw(scale: float) -> None:
    bucket = Bucket(items := named(), None, torch.float32)
    optimizer = AdamW(CONFIG, [bucket])
    for step, rate in enumerate(RATES):
        fill(bucket, step)
        optimizer.update(rate, scale)
    assert optimizer.steps == len(RATES)
    for (_, p, _, _), want in zip(items, by_torch(scale), strict=True):
        torch.testing.assert_close(p.detach(), want.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_updated_apart_are_the_whole(ranks: int, moments: str) -> None:
    config = OptimizerConfig(weight_decay=0.3, moments=moments)

    def masters(buckets: list[Bucket]) -> Tensor:
        optimizer = AdamW(config, buckets)
        for step, rate in enumerate(RATES):
            for bucket in buckets:
                fill(bucket, step)
            optimizer.update(rate, 0.5)
        return torch.cat([bucket.master for bucket in buckets])

    whole = masters([Bucket(named(), None, torch.float32)])
    parts = masters([member(position, ranks, named(), torch.float32) for position in range(ranks)])
    used = sum(p.numel() for p in parameters())
    assert torch.equal(parts[:used], whole[:used])


def test_bf16_moments_are_the_fp32_update_of_what_is_stored_rounded() -> None:
    config = OptimizerConfig(beta1=0.9, beta2=0.95, weight_decay=0.0, moments="bf16")
    bucket = Bucket([("w", nn.Parameter(torch.randn(1000)), 0, 1000)], None, torch.float32)
    optimizer = AdamW(config, [bucket])
    (first,), (second,) = optimizer.first, optimizer.second
    assert first.dtype == second.dtype == torch.bfloat16
    for step in range(1, 6):
        torch.manual_seed(step)
        bucket.gradients.normal_()
        g, w = bucket.gradients.double(), bucket.master.double()
        m = 0.9 * first.double() + 0.1 * g
        v = 0.95 * second.double() + 0.05 * g * g
        # The update uses the moments before they are rounded.
        want = w - 0.01 / (1 - 0.9**step) * m / ((v / (1 - 0.95**step)).sqrt() + config.epsilon)
        optimizer.update(0.01, 1.0)
        torch.testing.assert_close(bucket.master.double(), want, rtol=0, atol=1e-6)
        for stored, exact in ((first, m), (second, v)):
            # To nearest: no further than half a unit, but for what FP32 arithmetic moves across a tie.
            torch.testing.assert_close(stored.double(), exact, rtol=2.0**-8 * (1 + 1e-4), atol=1e-9)
            assert (stored == exact.float().bfloat16()).float().mean() > 0.998


@pytest.mark.parametrize("masters", ["fp32", "bf16"])
def test_updates_below_bf16s_resolution_add_up_in_fp32_masters_alone(masters: str) -> None:
    # A constant gradient makes every update the learning rate: 2^-12, where the numbers of BF16 below 1 are 2^-8 apart.
    bucket = Bucket([("w", nn.Parameter(torch.ones(64, 8)), 0, 512)], None, torch.bfloat16)
    optimizer = AdamW(OptimizerConfig(weight_decay=0.0, moments="bf16"), [bucket])
    seen = []
    for _ in range(64):
        bucket.gradients.fill_(0.5)
        optimizer.update(2.0**-12, 1.0)
        if masters == "bf16":  # what a master in BF16 would have kept
            bucket.master.copy_(bucket.master.bfloat16())
            bucket.publish()
        seen.append(bucket.parameters[0].item())
    assert bucket.master.dtype == torch.float32 and bucket.parameters.dtype == torch.bfloat16
    if masters == "bf16":
        assert torch.equal(bucket.master, torch.ones(512)) and set(seen) == {1.0}
        return
    want = 1 - 64 * 2.0**-12
    torch.testing.assert_close(bucket.master, torch.full((512,), want), rtol=0, atol=0.01 * (1 - want))
    assert len(set(seen)) == 5 and seen[-1] == want, "the parameters that compute follow, a step of BF16 at a time"


def test_bf16_moments_stay_close_to_fp32_ones() -> None:
    results = []
    for moments in ("fp32", "bf16"):
        bucket = Bucket(named(), None, torch.float32)
        optimizer = AdamW(OptimizerConfig(moments=moments), [bucket])
        start = bucket.master.clone()
        for step in range(4):
            fill(bucket, step)
            optimizer.update(0.01, 1.0)
        results.append(bucket.master - start)
    exact, rounded = results
    # A rounding a step in m and in the root of v: the update moves by a fraction of 2^-8 each.
    assert (rounded - exact).norm() < 4 * 2.0**-8 * exact.norm()
    assert not torch.equal(exact, rounded)


def test_without_a_gradient_a_matrix_decays_and_a_vector_stays() -> None:
    # An expert that no token chose, from the first step on.
    items = [("m", nn.Parameter(torch.randn(4, 4)), 0, 16), ("v", nn.Parameter(torch.randn(4)), 0, 4)]
    before = [p.detach().clone() for _, p, _, _ in items]
    optimizer = AdamW(CONFIG, [Bucket(items, None, torch.float32)])
    optimizer.update(0.1, 1.0)
    torch.testing.assert_close(items[0][1].detach(), before[0] * (1 - 0.1 * CONFIG.weight_decay))
    assert torch.equal(items[1][1].detach(), before[1])


@given(st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_clipping_is_torchs(norm: float, limit: float) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.tensor([norm], dtype=torch.float64)
    nn.utils.clip_grad_norm_([p], limit)
    assert norm * clip_scale(norm, limit) == pytest.approx(p.grad.item(), rel=1e-9)
    assert norm * clip_scale(norm, limit) <= limit * (1 + 1e-9)
