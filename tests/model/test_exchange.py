"""The exchange within one process against a loop over tokens, and its gradients against autograd's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.exchange import LocalExchange, count_experts

seeds = st.integers(0, 2**31)
shapes = (st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), seeds)


def routing(tokens: int, experts: int, chosen: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, gate values and distinct experts for each token; often some experts get none."""
    torch.manual_seed(seed)
    chosen = min(chosen, experts)
    favoured = torch.randn(experts) * 3
    indices = (torch.randn(tokens, experts) + favoured).argsort(1)[:, :chosen]
    return torch.randn(tokens, 5), torch.rand(tokens, chosen), indices


@settings(deadline=None)
@given(*shapes)
def test_dispatch_is_a_loop_over_experts_and_tokens(tokens: int, experts: int, chosen: int, seed: int) -> None:
    x, weights, indices = routing(tokens, experts, chosen, seed)
    sent = LocalExchange(experts).dispatch(x, weights, indices).wait()
    rows, gates, ends = [], [], []
    for expert in range(experts):
        for token in range(tokens):
            for slot in range(indices.shape[1]):
                if indices[token, slot] == expert:
                    rows.append(x[token])
                    gates.append(weights[token, slot])
        ends.append(len(rows))
    assert torch.equal(sent.rows_RD, torch.stack(rows))
    assert torch.equal(sent.weights_R, torch.stack(gates))
    assert sent.ends_E.tolist() == ends and sent.ends_E.dtype == torch.int32
    loads = count_experts(indices, experts).tolist()
    assert loads == [b - a for a, b in zip([0, *ends], ends, strict=False)]


@settings(deadline=None)
@given(*shapes)
def test_combine_sums_each_tokens_rows(tokens: int, experts: int, chosen: int, seed: int) -> None:
    x, weights, indices = routing(tokens, experts, chosen, seed)
    exchange = LocalExchange(experts)
    sent = exchange.dispatch(x, weights, indices).wait()
    # Every expert scales and shifts in a way of its own, so that a row in the wrong place shows.
    expert_R = torch.repeat_interleave(torch.arange(experts), count_experts(indices, experts))
    y = sent.rows_RD * (expert_R[:, None] + 1) * sent.weights_R[:, None] + expert_R[:, None]
    z = exchange.combine(y, sent.layout).wait()
    for token in range(tokens):
        want = sum(
            x[token] * (expert + 1) * gate + expert for expert, gate in zip(indices[token], weights[token], strict=True)
        )
        torch.testing.assert_close(z[token], want, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(*shapes)
def test_gradients_are_autograds(tokens: int, experts: int, chosen: int, seed: int) -> None:
    x, weights, indices = (t.double() if t.is_floating_point() else t for t in routing(tokens, experts, chosen, seed))
    exchange = LocalExchange(experts)
    x.requires_grad_()
    weights.requires_grad_()
    sent = exchange.dispatch(x, weights, indices).wait()
    y = sent.rows_RD.detach().clone().requires_grad_()
    z = exchange.combine(y, sent.layout).wait()

    gz = torch.randn_like(z)
    gy = exchange.dispatch_gradient(gz, sent.layout).wait()
    assert torch.equal(gy, torch.autograd.grad(z, y, gz)[0])

    grows, gweights = torch.randn_like(sent.rows_RD), torch.randn_like(sent.weights_R)
    found = exchange.combine_gradient(grows, gweights, sent.layout).wait()
    want = torch.autograd.grad([sent.rows_RD, sent.weights_R], [x, weights], [grows, gweights])
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
