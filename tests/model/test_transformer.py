"""The whole model and its pieces: initial values and names do not depend on how it is cut; the loss is what it says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.exchange import LocalExchange
from model.transformer import Transformer, expert_parameters, initialise
from tests.model.tiny import tiny

CONFIG = tiny(num_hidden_layers=4)


def values(model: Transformer, seed: int = 3) -> dict[str, Tensor]:
    initialise(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


@settings(deadline=None, max_examples=25)
@given(
    st.sets(st.integers(1, CONFIG.num_hidden_layers - 1)),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 2**31),
)
def test_a_cut_model_has_the_values_of_the_whole(cuts: set[int], ways: int, noise: int) -> None:
    whole = values(Transformer(CONFIG))
    split = {name for name, p in Transformer(CONFIG).named_parameters() if ".experts." in name}
    each = CONFIG.n_routed_experts // ways
    found: set[str] = set()
    for first, last in pairwise([0, *sorted(cuts), CONFIG.num_hidden_layers]):
        for way in range(ways):
            experts = slice(way * each, (way + 1) * each)
            torch.manual_seed(noise)  # the state of the global generator is no input
            piece = values(Transformer(CONFIG, range(first, last), range(CONFIG.n_routed_experts)[experts]))
            for name, value in piece.items():
                assert torch.equal(value, whole[name][experts] if name in split else whole[name]), name
        assert found.isdisjoint(piece)
        found |= set(piece)
    assert found == set(whole)


def test_every_matrix_and_expert_has_values_of_its_own() -> None:
    whole = values(Transformer(CONFIG))
    matrices = []
    for value in whole.values():
        matrices += list(value) if value.ndim == 3 else [value] if value.ndim == 2 else []
    firsts = [matrix.flatten()[:8] for matrix in matrices]
    for i, a in enumerate(firsts):
        assert not any(torch.equal(a, b) for b in firsts[:i])
    for name, other in values(Transformer(CONFIG), seed=4).items():
        assert other.ndim == 1 or not torch.equal(other, whole[name]), name


def test_initial_values_are_normal_with_the_configured_deviation_and_norms_one() -> None:
    config = tiny(hidden_size=64, initializer_range=0.006)
    for name, value in values(Transformer(config)).items():
        if value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            # Five standard errors of a mean and of a deviation.
            error = 5 * 0.006 / value.numel() ** 0.5
            assert abs(value.mean().item()) < error, name
            assert abs(value.std().item() - 0.006) < error, name


def test_initialising_leaves_the_global_generator_alone() -> None:
    model = Transformer(CONFIG)
    before = torch.get_rng_state()
    initialise(model, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_expert_parameters_are_those_of_the_routed_experts() -> None:
    model = Transformer(CONFIG)
    names = {name for name, p in model.named_parameters() if p in expert_parameters(model)}
    assert names == {f"layers.{i}.experts.{m}.weight" for i in (1, 2, 3) for m in ("gate_up", "down")}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 7))
    return tokens[:, :-1], tokens[:, 1:]


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """[B, S, V], block after block."""
    x = model.embed(tokens)
    for _, block in model.blocks():
        x, _ = block(x, model.positions(None, x, None), LocalExchange(CONFIG.n_routed_experts))
    return model.head(model.norm(x))


def test_cross_entropy_is_the_sum_over_the_targets() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    tokens, targets = batch(1)
    scores = logits(model, tokens).double()
    want = sum(
        -(scores[b, s, targets[b, s]] - scores[b, s].exp().sum().log()).item() for b in range(2) for s in range(6)
    )
    assert model(tokens, targets).cross_entropy.item() == pytest.approx(want, rel=1e-5)
    # A target of -100 is none: a padded row counts for nothing.
    padded = model(torch.cat([tokens, tokens[:1]]), torch.cat([targets, torch.full((1, 6), -100)]))
    assert padded.cross_entropy.item() == pytest.approx(want, rel=1e-5)


def test_the_balance_loss_is_summed_over_the_layers_and_sequences() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    tokens, targets = batch(2)
    parts: list[float] = []
    for _, block in model.blocks():
        if block.router is not None:
            block.router.register_forward_hook(lambda module, inputs, out: parts.append(out.balance.item()))
    balance = model(tokens, targets).balance.item()
    assert len(parts) == 3
    assert balance == pytest.approx(sum(parts), rel=1e-6)
    alone = [model(tokens[b : b + 1], targets[b : b + 1]).balance.item() for b in range(2)]
    assert balance == pytest.approx(sum(alone), rel=1e-5)


def test_a_later_token_changes_no_earlier_prediction() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    tokens, _ = batch(3)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


@pytest.mark.parametrize("changes", [{"n_shared_experts": 0}, {"first_k_dense_replace": 0}, {"n_shared_experts": 2}])
def test_other_blocks_have_a_loss_and_a_gradient_for_every_parameter(changes: dict[str, int]) -> None:
    config = tiny(**changes)
    model = Transformer(config)
    initialise(model, 1)
    tokens, targets = batch(4)
    loss = model(tokens, targets)
    (loss.cross_entropy + loss.balance).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
