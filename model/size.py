"""How large a model is, without making it."""

from dataclasses import dataclass

import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer, expert_parameters


@dataclass(frozen=True)
class Size:
    """Numbers of a model, the routers' biases included. ``active``: those that one token is multiplied with, which
    leaves out the embedding (a look-up) and the routed experts that it does not go to. Neither counts the
    multi-token-prediction modules; ``mtp`` is what these have of their own."""

    total: int
    active: int
    mtp: int

    def __str__(self) -> str:
        beside = f"; {_short(self.mtp)} more for multi-token prediction" if self.mtp else ""
        return f"{_short(self.total)} parameters, {_short(self.active)} of them active for a token{beside}"


def size(config: ModelConfig) -> Size:
    """Counted from the modules themselves, on the meta device: nothing is allocated, whatever the size."""
    with torch.device("meta"):
        model = Transformer(config)
    module, model.mtp = model.mtp, None
    routed = sum(p.numel() for p in expert_parameters(model))
    assert model.embed is not None
    total = _numel(model)
    idle = routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return Size(total, total - idle - model.embed.weight.numel(), 0 if module is None else _numel(module))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)
