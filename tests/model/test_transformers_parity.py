"""Our model is the DeepSeek-V3 that Hugging Face transformers implements: same weights, same logits, same gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benchmarks.transformers_peer import copy_weights, pairs, peer_loss
from model.config import ModelConfig
from model.huggingface import published_config
from model.transformer import Transformer, initialise

BASE = ModelConfig(
    vocab_size=72,
    hidden_size=48,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=80,
    moe_intermediate_size=24,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    initializer_range=0.2,
)
CASES = {
    "group-limited": BASE,
    "query without latent": replace(BASE, q_lora_rank=None),
    "all layers sparse": replace(BASE, first_k_dense_replace=0),
    "all layers dense": replace(BASE, first_k_dense_replace=3),
    "one group": replace(BASE, n_group=1, topk_group=1),
    "scores not normalised": replace(BASE, norm_topk_prob=False, routed_scaling_factor=1.0),
    "values as wide as keys": replace(BASE, v_head_dim=20),
    "another epsilon": replace(BASE, rms_norm_eps=1e-3),
    "small": replace(BASE, hidden_size=16, moe_intermediate_size=8, num_attention_heads=1, n_shared_experts=1),
    "large": replace(BASE, hidden_size=136, num_attention_heads=8, q_lora_rank=48, kv_lora_rank=72, v_head_dim=8),
}
# A context of 12 tokens stretched to 48: of the four rotary pairs two keep their frequency, one is blended, and one is
# slowed by the whole factor.
YARN = replace(
    BASE,
    rope_theta=50.0,
    original_max_position_embeddings=12,
    yarn_factor=4.0,
    yarn_beta_fast=0.7,
    yarn_beta_slow=0.2,
)
CASES |= {
    "yarn": YARN,
    "yarn, other scales": replace(YARN, yarn_mscale=0.7, yarn_mscale_all_dim=2.0),
    "yarn, logits unscaled": replace(YARN, yarn_mscale=0.0, yarn_mscale_all_dim=0.0),
    "yarn, query without latent": replace(YARN, q_lora_rank=None, yarn_mscale=2.0),
    "yarn, the released constants": replace(BASE, yarn_factor=40.0),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    """One seed: of two experts that are closer than rounding, each model may choose another."""
    torch.manual_seed(11)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def build(config: ModelConfig, bias: float) -> Transformer:
    """Fresh weights, norms too, and selection biases of the size ``bias``."""
    seed = int(torch.randint(1 << 30, ()))
    model = Transformer(config)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        for _, block in model.blocks():
            if block.router is not None:
                block.router.bias_E.normal_(0, bias)
    return model


def build_peer(ours: Transformer, experts: str) -> torch.nn.Module:
    """Their model, as they read the configuration that we publish, with the weights of ours."""
    special = {"bos_token_id": None, "eos_token_id": None}
    values = published_config(ours.config, "float32", special)
    config = DeepseekV3Config(**values, experts_implementation=experts)
    theirs: torch.nn.Module = DeepseekV3ForCausalLM(config)
    copy_weights(ours, theirs)
    return theirs.train()


def chosen(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The experts of every token in each MoE layer."""
    indices: list[Tensor] = []
    hooks = [
        block.router.register_forward_hook(lambda _, __, routing: indices.append(routing.indices_TK))
        for _, block in model.blocks()
        if block.router is not None
    ]
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:])
    for hook in hooks:
        hook.remove()
    return indices


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_loss_and_gradients_are_those_of_transformers(config: ModelConfig, experts: str) -> None:
    ours = build(config, bias=0.3)
    theirs = build_peer(ours, experts)
    tokens = torch.randint(config.vocab_size, (2, 33))
    logits: list[Tensor] = []
    assert ours.head is not None
    ours.head.register_forward_hook(lambda _, __, output: logits.append(output.detach()))

    loss = ours(tokens[:, :-1], tokens[:, 1:]).cross_entropy / tokens[:, 1:].numel()
    their_loss = peer_loss(theirs, tokens, tokens[:, 1:].numel())
    with torch.no_grad():
        their_logits = theirs(input_ids=tokens[:, :-1]).logits

    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert distance(logits[0], their_logits) < 1e-5

    loss.backward()
    their_loss.backward()
    for pair in pairs(ours, theirs):
        assert pair.ours.grad is not None and pair.theirs.grad is not None, pair.name
        assert distance(pair.ours.grad[pair.rows], pair.theirs.grad) < 1e-5, pair.name


def test_the_bias_of_the_parity_test_changes_the_choice() -> None:
    """Otherwise the biases above would prove nothing."""
    ours = build(BASE, bias=0.3)
    tokens = torch.randint(BASE.vocab_size, (2, 33))
    with_bias = chosen(ours, tokens)
    for _, block in ours.blocks():
        if block.router is not None:
            block.router.bias_E.zero_()
    without = chosen(ours, tokens)
    assert any(not torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in zip(with_bias, without, strict=True))


@pytest.mark.parametrize("key", ["yarn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale"])
def test_each_constant_of_yarn_in_the_parity_test_changes_the_model(key: str) -> None:
    """Otherwise a constant that is ignored on both sides would pass."""
    ours = build(YARN, bias=0.3)
    changed = Transformer(replace(YARN, **{key: getattr(YARN, key) * 1.5}))
    changed.load_state_dict(ours.state_dict())
    tokens = torch.randint(YARN.vocab_size, (2, 33))
    losses = [model(tokens[:, :-1], tokens[:, 1:]).cross_entropy.item() for model in (ours, changed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
