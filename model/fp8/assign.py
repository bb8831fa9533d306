"""Which linear layers compute in FP8, and with what scales (DeepSeek-V3 report, 3.3.1 and 3.3.3).

attention, all projections     FP8            the input of o, the one after the attention core, is kept in E5M6
dense and shared MLPs          FP8
routed experts                 FP8            power-of-two scales for what is dispatched: the input of gate_up,
                                              and the gradient that comes to down
gate, output head              as they were   beside embedding, norms and the attention core, which have no Linear
eh_proj of the MTP module      as it was      like the released weights, which have no scales for it
"""

from torch import nn

from model.attention import Attention
from model.fp8.formats import E5M6
from model.fp8.gemm import Gemm
from model.fp8.linear import Fp8Products, Recipe, WeightBlocks
from model.fp8.quantise import Scale
from model.linear import GroupedLinear, Linear
from model.mlp import MLP, Experts
from model.mtp import MTP
from model.router import Router
from model.transformer import Transformer

PLAIN = Recipe()
AFTER_ATTENTION = Recipe(input_scale=Scale.POWER_OF_TWO, stored=E5M6)
DISPATCHED = Recipe(input_scale=Scale.POWER_OF_TWO)
COMBINED = Recipe(gradient_scale=Scale.POWER_OF_TWO)

_LAYERS: dict[type[nn.Module], dict[str, Recipe | None]] = {
    Attention: {**dict.fromkeys(("q", "q_a", "q_b", "kv_a", "kv_b"), PLAIN), "o": AFTER_ATTENTION},
    MLP: {"gate_up": PLAIN, "down": PLAIN},
    Experts: {"gate_up": DISPATCHED, "down": COMBINED},
    Router: {"centroids": None},
    MTP: {"eh_proj": None},
    Transformer: {"head": None},
}
"""The linear layers of each kind of module; None stays in the dtype of its input."""


def recipes(model: nn.Module) -> dict[str, Recipe | None]:
    """The recipe of every linear layer in ``model``, by name. A layer that the table above does not know is an error:
    whether it computes in FP8 is a decision."""
    found: dict[str, Recipe | None] = {}
    for name, parent in model.named_modules():
        for leaf, child in parent.named_children():
            if isinstance(child, Linear | GroupedLinear):
                known = _LAYERS.get(type(parent), {})
                full = f"{name}.{leaf}" if name else leaf
                assert leaf in known, f"no precision is assigned to {full}"
                found[full] = known[leaf]
    return found


def set_precision(model: nn.Module, gemm: Gemm | None, blocks: WeightBlocks | None = None) -> None:
    """Let the linear layers of ``model`` compute in FP8 through ``gemm``, or none of them if that is None. Parameters,
    activations between layers and gradients keep their dtypes. ``blocks``: keeps the quantised weights; whoever gives
    it has it forget them when the parameters change."""
    for name, recipe in recipes(model).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear | GroupedLinear)
        layer.products = Fp8Products(gemm, recipe, blocks) if gemm is not None and recipe is not None else None
