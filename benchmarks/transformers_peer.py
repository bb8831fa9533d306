"""The same architecture in Hugging Face transformers, and which of its tensors is which of ours.

Their RoPE turns adjacent pairs as ours does when ``rope_interleave`` is set, and leaves queries and keys in another
order of dims, which their product does not see. Expert weights have our layout, [gate; up] in one matrix; a dense MLP
keeps the two apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model.block import Block
from model.config import ModelConfig
from model.mlp import MLP
from model.transformer import Transformer

_ROTARY_POSITIONS = 1 << 20  # positions that their model accepts; nothing is allocated for them


@dataclass(frozen=True)
class Pair:
    """One of their parameters and the rows of ours that it equals."""

    name: str
    ours: nn.Parameter
    rows: slice
    theirs: nn.Parameter


def peer_config(config: ModelConfig, attention: str = "sdpa", experts: str = "grouped_mm") -> DeepseekV3Config:
    """Their configuration of our model. Their two latent norms have a fixed epsilon, so ours must be that one.

    Raises ValueError, naming ``model.KEY``, for what their model cannot be.
    """
    if config.rms_norm_eps != 1e-6:
        raise ValueError(f"model.rms_norm_eps={config.rms_norm_eps} must be 1e-6: transformers fixes it in MLA's norms")
    if config.n_shared_experts < 1:
        raise ValueError(f"model.n_shared_experts={config.n_shared_experts} must be at least 1 in transformers")
    same = (
        "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size moe_intermediate_size "
        "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group norm_topk_prob "
        "routed_scaling_factor num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim rms_norm_eps initializer_range"
    ).split()
    values: dict[str, Any] = {key: getattr(config, key) for key in same}
    implementations: dict[str, Any] = {"attn_implementation": attention, "experts_implementation": experts}
    return DeepseekV3Config(
        **values,
        num_key_value_heads=config.num_attention_heads,
        num_mtp_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rope_interleave=True,
        max_position_embeddings=_ROTARY_POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **implementations,
    )


def build_peer(
    ours: Transformer, dtype: torch.dtype, attention: str = "sdpa", experts: str = "grouped_mm"
) -> nn.Module:
    """Their model in ``dtype`` with the weights of ours, ready to train."""
    theirs: nn.Module = DeepseekV3ForCausalLM(peer_config(ours.config, attention, experts))
    theirs.to(dtype)
    copy_weights(ours, theirs)
    theirs.train()
    return theirs


@torch.no_grad()
def copy_weights(ours: Transformer, theirs: nn.Module) -> None:
    """Make their parameters and selection biases equal to ours. Raises ValueError for one of theirs without a pair."""
    written = set()
    for pair in pairs(ours, theirs):
        pair.theirs.copy_(pair.ours[pair.rows])
        written.add(pair.name)
    left = {name for name, _ in theirs.named_parameters()} - written
    if left:
        raise ValueError(f"transformers has parameters that our model lacks: {sorted(left)}")
    for layer, block in ours.blocks():
        if block.router is not None:
            gate = theirs.get_submodule(f"model.layers.{layer}.mlp.gate")
            # Theirs is FP32 when loaded from a checkpoint, whatever the model's dtype.
            gate.e_score_correction_bias = block.router.bias_E.clone()


def pairs(ours: Transformer, theirs: nn.Module) -> Iterator[Pair]:
    """Every parameter of theirs with its equal in ours; ``ours`` is a whole model."""
    their = dict(theirs.named_parameters())
    for name, parameter, rows in _named(ours):
        yield Pair(name, parameter, rows, their[name])


def _named(ours: Transformer) -> Iterator[tuple[str, nn.Parameter, slice]]:
    assert ours.embed is not None and ours.norm is not None and ours.head is not None
    every = slice(None)
    yield "model.embed_tokens.weight", ours.embed.weight, every
    for layer, block in ours.blocks():
        for name, parameter, rows in _named_in_block(block):
            yield f"model.layers.{layer}.{name}", parameter, rows
    yield "model.norm.weight", ours.norm.weight, every
    yield "lm_head.weight", ours.head.weight, every


def _named_in_block(block: Block) -> Iterator[tuple[str, nn.Parameter, slice]]:
    every, attn = slice(None), block.attn
    yield "input_layernorm.weight", block.attn_norm.weight, every
    if attn.config.q_lora_rank is None:
        yield "self_attn.q_proj.weight", attn.q.weight, every
    else:
        yield "self_attn.q_a_proj.weight", attn.q_a.weight, every
        yield "self_attn.q_a_layernorm.weight", attn.q_a_norm.weight, every
        yield "self_attn.q_b_proj.weight", attn.q_b.weight, every
    yield "self_attn.kv_a_proj_with_mqa.weight", attn.kv_a.weight, every
    yield "self_attn.kv_a_layernorm.weight", attn.kv_a_norm.weight, every
    yield "self_attn.kv_b_proj.weight", attn.kv_b.weight, every
    yield "self_attn.o_proj.weight", attn.o.weight, every
    yield "post_attention_layernorm.weight", block.mlp_norm.weight, every
    assert block.mlp is not None
    if block.router is None or block.experts is None:
        yield from _named_in_mlp("mlp", block.mlp)
        return
    yield "mlp.gate.weight", block.router.centroids.weight, every
    yield "mlp.experts.gate_up_proj", block.experts.gate_up.weight, every
    yield "mlp.experts.down_proj", block.experts.down.weight, every
    yield from _named_in_mlp("mlp.shared_experts", block.mlp)


def _named_in_mlp(prefix: str, mlp: MLP) -> Iterator[tuple[str, nn.Parameter, slice]]:
    width = mlp.down.weight.shape[1]
    yield f"{prefix}.gate_proj.weight", mlp.gate_up.weight, slice(0, width)
    yield f"{prefix}.up_proj.weight", mlp.gate_up.weight, slice(width, 2 * width)
    yield f"{prefix}.down_proj.weight", mlp.down.weight, slice(None)


def peer_loss(theirs: nn.Module, tokens: Tensor, target_tokens: int) -> Tensor:
    """Cross-entropy of ``tokens`` [B, S+1], summed and divided by ``target_tokens`` as transformers' trainer does it
    under gradient accumulation."""
    targets = tokens[:, 1:].contiguous()
    output = theirs(
        input_ids=tokens[:, :-1],
        labels=targets,
        shift_labels=targets,
        num_items_in_batch=target_tokens,
        use_cache=False,
    )
    loss: Tensor = output.loss
    return loss
