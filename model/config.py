"""The sizes and constants of a DeepSeek-V3-style model, under the names that its published configuration uses."""

from dataclasses import dataclass
from math import log
from typing import Literal

Recomputed = Literal["norm", "mla_up", "swiglu"]
Recompute = tuple[Recomputed, ...] | Literal["full"]
"""What is made again in backward; see ``model/recompute.py``."""


@dataclass(frozen=True)
class Yarn:
    """How RoPE's frequencies are stretched to a longer context (YaRN, Peng et al. 2023, as DeepSeek-V3 uses it).

    ``factor``: the context after over the one before; ``original_length``: the one before, in tokens. A pair that turns
    more than ``beta_fast`` times in the original context keeps its frequency, one that turns less than ``beta_slow``
    times is slowed by ``factor``, and those between are blended.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def rotation_scale(self) -> float:
        """What rotated queries and keys are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_scale(self) -> float:
        """What all attention logits are multiplied with, beside the usual inverse root."""
        return self._temperature(self.mscale_all_dim) ** 2

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * log(self.factor) + 1


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-style transformer: MLA attention, the first layers dense, the rest MoE.

    The defaults are DeepSeek-V3's own (report, 4.2, and the released configuration). Sizes are counts unless a unit is
    given. Raises ValueError, naming ``model.KEY``, when the values do not fit together.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    """Layers before the first MoE layer; these have a dense MLP of ``intermediate_size``."""
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    """Width of one expert, routed or shared."""
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    """Groups of experts, one a node; a token is routed to at most ``topk_group`` of them."""
    topk_group: int = 4
    norm_topk_prob: bool = True
    """Normalise the chosen experts' scores to sum to one, before the scaling factor."""
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    """Width of the query latent; null projects queries from the hidden state directly."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    original_max_position_embeddings: int = 4096
    """Context, in tokens, that the model is made for before YaRN stretches it."""
    yarn_factor: float = 1.0
    """Times that YaRN stretches the context; 1 leaves RoPE as it is. The released DeepSeek-V3 has 40."""
    yarn_beta_fast: float = 32.0
    """Turns in the original context above which a rotary pair keeps its frequency."""
    yarn_beta_slow: float = 1.0
    """Turns below which its frequency is divided by the factor; in between the two are blended."""
    yarn_mscale: float = 1.0
    """Weight of ln(factor) in the scale of rotated queries and keys; 0 stands for a file that has none."""
    yarn_mscale_all_dim: float = 1.0
    """Weight of ln(factor) in the scale of all attention logits, which also divides the one above; 0 is none."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    """Standard deviation of every weight matrix at the start."""
    bias_update_speed: float = 0.001
    """gamma: how far a step moves an expert's selection bias towards balance (report, 2.1.2)."""
    balance_loss_alpha: float = 0.0001
    """alpha: weight of the sequence-wise balance loss (report, eq. 17)."""
    num_nextn_predict_layers: int = 0
    """Multi-token-prediction modules behind the last layer, 0 or 1; the released DeepSeek-V3 has 1 (report, 2.2)."""
    mtp_loss_weight: float = 0.3
    """lambda: weight of the module's loss; the report has 0.3 for the first 10T tokens, then 0.1."""
    recompute: Recompute = ()
    """What backward makes again instead of keeping it, for less memory and the same bits: a list out of norm, mla_up,
    swiglu; or full. See docs/recompute.md."""

    def __post_init__(self) -> None:
        self._check_ranges()
        for key in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, key) % 8:
                raise ValueError(
                    f"model.{key}={getattr(self, key)} must be a multiple of 8: grouped products read 16 bytes at once"
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} must be from 0 to "
                f"num_hidden_layers ({self.num_hidden_layers})"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"model.n_group={self.n_group} must divide n_routed_experts ({self.n_routed_experts})")
        if self.topk_group > self.n_group:
            raise ValueError(f"model.topk_group={self.topk_group} must be at most n_group ({self.n_group})")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} must be at most the experts in "
                f"topk_group groups ({reachable})"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta={self.rope_theta} must be above 1")
        self._check_yarn()
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(
                f"model.num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or 1: one token beyond the "
                "next is as deep as prediction goes here"
            )
        if self.recompute != "full" and len(set(self.recompute)) < len(self.recompute):
            raise ValueError(f"model.recompute={list(self.recompute)} must name nothing twice")

    def _check_ranges(self) -> None:
        """Of every number by itself."""
        for key, limit in _LIMITS.items():
            size, least = getattr(self, key), 0 if key == "n_shared_experts" else 1
            if size is None:
                continue
            if size < least:
                rule = f"must be at least {least}" if least else "must not be negative"
                raise ValueError(f"model.{key}={size} {rule}{', or null' if key == 'q_lora_rank' else ''}")
            if size > limit:
                raise ValueError(f"model.{key}={size} must be at most {limit}")
        for key in _POSITIVE_NUMBERS:
            if not getattr(self, key) >= SMALLEST:
                raise ValueError(f"model.{key}={getattr(self, key)} must be above 0: at least {SMALLEST:.4g}, in FP32")
        for key in _NUMBERS:
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must not be negative")
            if not getattr(self, key) <= LARGEST:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at most {LARGEST:.4g}")

    def _check_yarn(self) -> None:
        if self.yarn_factor < 1:
            raise ValueError(f"model.yarn_factor={self.yarn_factor} must be at least 1: it stretches the context")
        if not 0 < self.yarn_beta_slow < self.yarn_beta_fast:
            raise ValueError(
                f"model.yarn_beta_slow={self.yarn_beta_slow} must be above 0 and below "
                f"model.yarn_beta_fast ({self.yarn_beta_fast})"
            )

    @property
    def yarn(self) -> Yarn | None:
        """None leaves RoPE as it is."""
        if self.yarn_factor == 1:
            return None
        return Yarn(
            factor=self.yarn_factor,
            original_length=self.original_max_position_embeddings,
            beta_fast=self.yarn_beta_fast,
            beta_slow=self.yarn_beta_slow,
            mscale=self.yarn_mscale,
            mscale_all_dim=self.yarn_mscale_all_dim,
        )

    @property
    def softmax_scale(self) -> float:
        """What attention logits are multiplied with. YaRN's part of it holds for every length, as in transformers;
        DeepSeek's own inference code leaves both out up to the original context."""
        scale: float = self.qk_head_dim**-0.5
        return scale if self.yarn is None else scale * self.yarn.softmax_scale

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace


SMALLEST = 2.0**-126
"""The smallest number that FP32 has in full precision."""
LARGEST = 2.0**60
"""What a number of the model is at most; FP32 still has its square, times what YaRN makes of it."""
WIDTH_LIMIT, COUNT_LIMIT, LAYERS_LIMIT = 2**20, 2**16, 2**9
"""What sizes are at most: above all published models, and the bytes of every tensor are still a number of 64 bits."""
_WIDTHS = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size q_lora_rank kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim"
).split()
_COUNTS = "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group num_attention_heads".split()
_LIMITS = {
    **dict.fromkeys(_WIDTHS, WIDTH_LIMIT),
    **dict.fromkeys(_COUNTS, COUNT_LIMIT),
    "num_hidden_layers": LAYERS_LIMIT,
    "original_max_position_embeddings": 2**31,
}
_POSITIVE_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")
_NUMBERS = (
    *_POSITIVE_NUMBERS,
    *("rope_theta", "yarn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"),
    *("bias_update_speed", "balance_loss_alpha", "mtp_loss_weight"),
)
