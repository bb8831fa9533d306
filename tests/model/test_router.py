"""Routing against a brute-force reading of the report (2.1.2), and the two ways in which it is balanced."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.linear import WeightGradients, own
from model.router import Router, balance_loss, choose
from tests.model.tiny import tiny

seeds = st.integers(0, 2**31)


@st.composite
def routings(draw: st.DrawFn) -> ModelConfig:
    """Any shape of experts, groups and choices that fits together."""
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, kept * each))
    return tiny(n_routed_experts=groups * each, n_group=groups, topk_group=kept, num_experts_per_tok=chosen)


def brute_force(biased_E: list[float], config: ModelConfig) -> set[int]:
    """Of all sets of groups the one whose two best experts each sum highest; in it, of all sets of K experts the
    highest."""
    each = config.n_routed_experts // config.n_group
    members = [range(g * each, (g + 1) * each) for g in range(config.n_group)]

    def worth(groups: tuple[int, ...]) -> float:
        return sum(sum(sorted((biased_E[e] for e in members[g]), reverse=True)[:2]) for g in groups)

    open_groups = max(combinations(range(config.n_group), config.topk_group), key=worth)
    candidates = [e for g in open_groups for e in members[g]]
    best = max(combinations(candidates, config.num_experts_per_tok), key=lambda es: sum(biased_E[e] for e in es))
    return set(best)


@settings(deadline=None, max_examples=80)
@given(routings(), seeds)
def test_selection_is_a_brute_force_reading_of_the_report(config: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    scores, bias = torch.rand(3, config.n_routed_experts), torch.randn(config.n_routed_experts) * 0.3
    chosen = choose(scores, bias, config)
    assert chosen.shape == (3, config.num_experts_per_tok)
    each = config.n_routed_experts // config.n_group
    for token in range(3):
        assert set(chosen[token].tolist()) == brute_force((scores[token] + bias).tolist(), config)
        assert len({e // each for e in chosen[token].tolist()}) <= config.topk_group


def routed(config: ModelConfig, seed: int) -> tuple[Router, Tensor, Tensor]:
    """A router with random centroids and bias, hidden states, and their raw scores."""
    torch.manual_seed(seed)
    router = Router(config)
    torch.nn.init.normal_(router.centroids.weight, std=0.3)
    router.bias_E.normal_(std=0.3)
    x = torch.randn(2, 5, config.hidden_size)
    return router, x, torch.sigmoid(x.flatten(0, 1) @ router.centroids.weight.detach().T)


@settings(deadline=None, max_examples=40)
@given(routings(), st.booleans(), seeds)
def test_gate_values_are_the_raw_scores_of_the_chosen(config: ModelConfig, normalised: bool, seed: int) -> None:
    config = tiny(
        n_routed_experts=config.n_routed_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=normalised,
    )
    router, x, scores = routed(config, seed)
    routing = router(x)
    for token, experts in enumerate(routing.indices_TK.tolist()):
        raw = scores[token, experts]
        want = raw / raw.sum() if normalised else raw
        torch.testing.assert_close(
            routing.weights_TK[token].detach(), want * config.routed_scaling_factor, rtol=1e-5, atol=1e-6
        )
    if normalised:
        total = torch.full((10,), config.routed_scaling_factor)
        torch.testing.assert_close(routing.weights_TK.sum(1).detach(), total, rtol=1e-5, atol=0)


def test_the_bias_steers_the_selection_and_not_the_gate() -> None:
    config = tiny(num_experts_per_tok=3, n_group=1, topk_group=1)
    router, x, scores = routed(config, seed=1)
    router.bias_E.zero_()
    router.bias_E[6] = 10.0
    router.bias_E[2] = -10.0
    routing = router(x)
    assert (routing.indices_TK == 6).any(1).all()
    assert not (routing.indices_TK == 2).any()
    raw = scores.gather(1, routing.indices_TK)
    torch.testing.assert_close(routing.weights_TK.detach(), 2.5 * raw / raw.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_the_gate_runs_in_fp32_under_bf16() -> None:
    # Rounding a score to BF16 changes which expert is chosen.
    config = tiny()
    router, x, _ = routed(config, seed=2)
    router.centroids.weight.data = router.centroids.weight.data.bfloat16()
    x = torch.randn(8, 64, config.hidden_size).bfloat16()
    scores = torch.sigmoid(x.float().flatten(0, 1) @ router.centroids.weight.detach().float().T)
    want = choose(scores, router.bias_E, config)
    for owner in (None, WeightGradients({router.centroids.weight: torch.zeros(router.centroids.weight.shape)})):
        own(router, owner)
        routing = router(x)
        assert routing.weights_TK.dtype == torch.float32
        assert (routing.indices_TK == want).all()


def test_the_gradient_passes_through_the_gate_values() -> None:
    router, x, _ = routed(tiny(), seed=3)
    x.requires_grad_()
    weight = router.centroids.weight
    routing = router(x)
    pull = torch.randn_like(routing.weights_TK)
    found = torch.autograd.grad((routing.weights_TK * pull).sum(), [x, weight])
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    raw = torch.sigmoid(x64.flatten(0, 1) @ weight64.T).gather(1, routing.indices_TK)
    want = torch.autograd.grad((2.5 * raw / raw.sum(1, keepdim=True) * pull).sum(), [x64, weight64])
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def balance_by_loops(scores_BSE: Tensor, chosen: int) -> Tensor:
    """Eq. 17-20 for one sequence after another, without alpha."""
    total = torch.zeros((), dtype=torch.float64)
    for scores_SE in scores_BSE:
        length, experts = scores_SE.shape
        for i in range(experts):
            count = 0
            for s in scores_SE.tolist():
                count += i in sorted(range(experts), key=lambda e: -s[e])[:chosen]
            f_i = experts / (chosen * length) * count
            p_i = sum(scores_SE[t, i] / scores_SE[t].sum() for t in range(length)) / length
            total = total + f_i * p_i
    return total


@settings(deadline=None, max_examples=25)
@given(routings(), st.integers(1, 2), st.integers(1, 5), seeds)
def test_balance_loss_is_equations_17_to_20(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.rand(batch, length, config.n_routed_experts, requires_grad=True)
    scores64 = scores.detach().double().requires_grad_()
    got, want = balance_loss(scores, config), balance_by_loops(scores64, config.num_experts_per_tok)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (gradient,), (exact,) = torch.autograd.grad(got, scores), torch.autograd.grad(want, scores64)
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=1e-5)


def test_the_router_reports_the_balance_loss_of_its_raw_scores() -> None:
    router, x, scores = routed(tiny(), seed=4)
    want = balance_by_loops(scores.unflatten(0, (2, 5)).double(), 2).item()
    assert router(x).balance.item() == pytest.approx(want, rel=1e-5)


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_the_bias_moves_towards_balance_by_gamma(loads: list[int]) -> None:
    router = Router(tiny())
    router.update_bias(torch.tensor(loads), 0.25)
    mean = sum(loads) / 8
    want = [0.25 if load < mean else -0.25 if load > mean else 0.0 for load in loads]
    assert router.bias_E.tolist() == want
    router.update_bias(torch.tensor(loads), 0.25)
    assert router.bias_E.tolist() == [2 * b for b in want]


def test_moving_the_bias_balances_the_load() -> None:
    config = tiny(n_group=1, topk_group=1)
    router, _, _ = routed(config, seed=5)
    router.bias_E.zero_()
    x = torch.randn(4, 128, config.hidden_size) + 0.5  # a common part that some experts like

    def load() -> Tensor:
        return torch.bincount(router(x).indices_TK.flatten(), minlength=8).float()

    busiest_before = (load().max() / load().mean()).item()
    for _ in range(100):
        router.update_bias(load(), 0.01)
    assert (load().max() / load().mean()).item() < 1.2 < busiest_before
