"""Attention against softmax written out, and causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.attention import Attention, attend, core_inputs, core_result
from model.config import Recompute
from model.linear import WeightGradients, own
from model.positions import Positions, documents_of, places_in
from model.recompute import Recomputation
from model.rope import rotations
from tests.model.tiny import tiny

seeds = st.integers(0, 2**31)
FP32, FP64 = 1e-5, 1e-13


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For each query the weighted mean of the values up to it; FP64, one query at a time."""
    batch, length, heads, width = q.shape
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                scores = (k[b, : i + 1, h].double() @ q[b, i, h].double()) / width**0.5
                powers = torch.exp(scores - scores.max())
                out[b, i, h] = (powers / powers.sum()) @ v[b, : i + 1, h].double()
    return out


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.float64]),
    seeds,
)
def test_core_is_a_causal_softmax(
    batch: int, length: int, heads: int, width: int, values: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, width, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, length, heads, values, dtype=dtype)
    got = core_result(attend(*core_inputs(q, k, v)), v.shape[-1], v.dtype)
    assert got.shape == v.shape and got.dtype == dtype
    tolerance = {torch.float32: FP32, torch.float64: FP64}[dtype]
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v), rtol=0, atol=tolerance)


def test_core_in_bf16_rounds_its_result() -> None:
    torch.manual_seed(1)
    q, k = (torch.randn(2, 9, 2, 12).bfloat16() for _ in range(2))
    v = torch.randn(2, 9, 2, 8).bfloat16()
    got = core_result(attend(*core_inputs(q, k, v)), v.shape[-1], v.dtype)
    assert got.dtype == torch.bfloat16
    # A kernel that multiplies in BF16 rounds the probabilities too: one rounding of each value's share.
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v), rtol=2.0**-8, atol=2.0**-8 * v.abs().max())


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_core_within_documents_is_each_of_them_alone(lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, sum(lengths), 2, width).to(dtype) for width in (12, 12, 8))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    core = attend(*core_inputs(q, k, v), positions=Positions(torch.empty(0), documents))
    got = core_result(core, v.shape[-1], v.dtype)
    parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    assert got.dtype == dtype
    tolerance = {torch.float32: FP32, torch.bfloat16: 2.0**-8 * v.abs().max().item()}[dtype]
    torch.testing.assert_close(
        got.double(), torch.cat([softmax_attention(*part) for part in parts], dim=1), rtol=tolerance, atol=tolerance
    )


def filled(query_latent: int | None) -> Attention:
    torch.manual_seed(2)
    attention = Attention(tiny(q_lora_rank=query_latent))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Adjacent pairs of a vector, by RoPE's angle."""
    angles = position * 10000.0 ** (-torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(0, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    ).flatten()


@pytest.mark.parametrize("query_latent", [12, None])
def test_latent_attention_as_the_report_writes_it(query_latent: int | None) -> None:
    attention = filled(query_latent)
    c = attention.config
    weights = {name: p.detach().double() for name, p in attention.named_parameters()}
    heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    x = torch.randn(2, 6, c.hidden_size)
    q, k = (torch.zeros(2, 6, heads, nope + rope, dtype=torch.float64) for _ in range(2))
    v = torch.zeros(2, 6, heads, value, dtype=torch.float64)
    for b in range(2):
        for position in range(6):
            token = x[b, position].double()
            if query_latent is None:
                queries = weights["q.weight"] @ token
            else:
                latent = norm(weights["q_a.weight"] @ token, weights["q_a_norm.weight"])
                queries = weights["q_b.weight"] @ latent
            compressed = weights["kv_a.weight"] @ token
            latent = norm(compressed[: c.kv_lora_rank], weights["kv_a_norm.weight"])
            shared_key = turned(compressed[c.kv_lora_rank :], position)
            for h, pair in enumerate((weights["kv_b.weight"] @ latent).unflatten(0, (heads, -1))):
                query = queries.unflatten(0, (heads, -1))[h]
                q[b, position, h] = torch.cat([query[:nope], turned(query[nope:], position)])
                k[b, position, h] = torch.cat([pair[:nope], shared_key])
                v[b, position, h] = pair[nope:]
    want = softmax_attention(q, k, v).flatten(2) @ weights["o.weight"].T
    got = attention(x, Positions(rotations(6, rope, c.rope_theta))).detach().double()
    torch.testing.assert_close(got, want, rtol=0, atol=FP32 * want.abs().max().item())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 7), seeds)
def test_a_later_token_changes_nothing_earlier(place: int, seed: int) -> None:
    attention = filled(12)
    turns = Positions(rotations(8, attention.config.qk_rope_head_dim, attention.config.rope_theta))
    torch.manual_seed(seed)
    x = torch.randn(1, 8, attention.config.hidden_size)
    changed = x.clone()
    changed[:, place] += torch.randn(attention.config.hidden_size)
    with torch.no_grad():
        before, after = attention(x, turns), attention(changed, turns)
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([12, None]),
    st.sampled_from([(4, 4, 6, 8), (6, 2, 8, 7), (4, 2, 10, 8), (5, 4, 7, 8)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    seeds,
)
def test_attention_with_an_owner_is_the_plain_one(
    query_latent: int | None, dims: tuple[int, int, int, int], dtype: torch.dtype, documents: bool, seed: int
) -> None:
    nope, rope, value, latent = dims
    heads = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}
    config = tiny(q_lora_rank=query_latent, kv_lora_rank=latent, **heads)
    torch.manual_seed(seed)
    attention = Attention(config).to(dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    turns = rotations(7, rope, config.rope_theta)
    tokens = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]])
    positions = Positions(turns)
    if documents:
        documents_BS = documents_of(tokens, 0)
        positions = Positions(turns[places_in(documents_BS)], documents_BS)
    x, gy = (torch.randn(2, 7, config.hidden_size).to(dtype).requires_grad_() for _ in range(2))
    plain = attention(x, positions)
    wanted = [plain, *torch.autograd.grad(plain, [x, *attention.parameters()], gy)]
    buffers = {p: torch.zeros(p.shape) for p in attention.parameters()}
    owner = WeightGradients(buffers)
    own(attention, owner)
    got = attention(x, positions)
    found = torch.autograd.grad(got, x, gy)
    owner.apply(owner.take())
    rounding = FP32 if dtype == torch.float32 else 2.0**-5
    for mine, want in zip([got, *found, *buffers.values()], wanted, strict=True):
        torch.testing.assert_close(mine.double(), want.double(), rtol=0, atol=rounding * want.abs().max().item())


@pytest.mark.parametrize("policy", [("mla_up",), ("norm", "mla_up", "swiglu"), "full"])
@pytest.mark.parametrize("dims", [(4, 4, 6), (4, 4, 8), (4, 2, 10)])  # values narrower than keys, as wide, and wider
@pytest.mark.parametrize("documents", [False, True])
def test_recomputation_changes_no_bit_whatever_the_values_width(
    policy: Recompute, dims: tuple[int, int, int], documents: bool
) -> None:
    nope, rope, value = dims
    config = tiny(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
    turns = rotations(7, rope, config.rope_theta)
    documents_BS = documents_of(torch.tensor([[1, 0, 1, 1, 0, 1, 1]]), 0)
    positions = Positions(turns[places_in(documents_BS)], documents_BS) if documents else Positions(turns)
    torch.manual_seed(3)
    attention = Attention(config)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, gy = (torch.randn(1, 7, config.hidden_size) for _ in range(2))
    results = []
    for each in ((), policy):
        buffers = {p: torch.zeros(p.shape) for p in attention.parameters()}
        owner = WeightGradients(buffers)
        own(attention, owner)
        leaf = x.clone().requires_grad_()
        y = Recomputation(each).phase(lambda x, again: attention(x, positions, again), leaf)
        (gx,) = torch.autograd.grad(y, leaf, gy)
        owner.apply(owner.take())
        results.append([y.detach(), gx, *buffers.values()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
