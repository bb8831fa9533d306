"""The published form of a model: Hugging Face's ``config.json`` and tensor names for ``deepseek_v3``.

Every tensor of the published form is a run of elements of one of our parameters: our gate and up projections are one
matrix, gate above up, and the routed experts of a layer are one stack. RoPE turns adjacent pairs in both
(``rope_interleave``), so no row changes its place. The multi-token-prediction module is published as one more layer,
with copies of the embedding and the head, of which there is one here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from model.config import ModelConfig

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"


class HuggingFaceError(ValueError):
    """A folder cannot be read as, or a model not be written as, a Hugging Face model; one line that says why."""


@dataclass(frozen=True)
class Published:
    """The published tensor ``name``: the elements from ``offset`` on of our flattened ``parameter``, as ``shape``."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_bias(self) -> bool:
        """A router's selection bias: state and not a parameter, and FP32 in every file."""
        return self.parameter.endswith(".router.bias_E")


def published(config: ModelConfig) -> Iterator[Published]:
    """Every tensor of the model by layer, and those of one parameter in the order of its elements."""
    c = config
    table = (c.vocab_size, c.hidden_size)
    yield Published("model.embed_tokens.weight", "embed.weight", table)
    for layer in range(c.num_hidden_layers):
        yield from _layer(c, layer, f"layers.{layer}")
    yield Published("model.norm.weight", "norm.weight", (c.hidden_size,))
    yield Published("lm_head.weight", "head.weight", table)
    if c.num_nextn_predict_layers:
        their = _module(c)
        for name in ("enorm", "hnorm"):
            yield Published(f"{their}.{name}.weight", f"mtp.{name}.weight", (c.hidden_size,))
        yield Published(f"{their}.eh_proj.weight", "mtp.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size))
        yield from _layer(c, c.num_hidden_layers, "mtp.block")
        yield Published(f"{their}.shared_head.norm.weight", "mtp.norm.weight", (c.hidden_size,))


def published_copies(config: ModelConfig) -> list[Published]:
    """What a file holds once more, in the multi-token-prediction module: the embedding and the head."""
    if not config.num_nextn_predict_layers:
        return []
    table = (config.vocab_size, config.hidden_size)
    return [
        Published(f"{_module(config)}.embed_tokens.weight", "embed.weight", table),
        Published(f"{_module(config)}.shared_head.head.weight", "head.weight", table),
    ]


def _module(c: ModelConfig) -> str:
    """Where a file has the multi-token-prediction module: as the layer after the last."""
    return f"model.layers.{c.num_hidden_layers}"


def _layer(c: ModelConfig, layer: int, our: str) -> Iterator[Published]:
    their = f"model.layers.{layer}"
    yield Published(f"{their}.input_layernorm.weight", f"{our}.attn_norm.weight", (c.hidden_size,))
    yield from _attention(c, f"{their}.self_attn", f"{our}.attn")
    yield Published(f"{their}.post_attention_layernorm.weight", f"{our}.mlp_norm.weight", (c.hidden_size,))
    if not c.is_moe(layer):
        yield from _mlp(f"{their}.mlp", f"{our}.mlp", c.hidden_size, c.intermediate_size)
        return
    centroids = (c.n_routed_experts, c.hidden_size)
    yield Published(f"{their}.mlp.gate.weight", f"{our}.router.centroids.weight", centroids)
    yield Published(f"{their}.mlp.gate.e_score_correction_bias", f"{our}.router.bias_E", (c.n_routed_experts,))
    yield from _experts(c, f"{their}.mlp.experts", f"{our}.experts")
    if c.n_shared_experts:
        shared = c.n_shared_experts * c.moe_intermediate_size
        yield from _mlp(f"{their}.mlp.shared_experts", f"{our}.mlp", c.hidden_size, shared)


def _attention(c: ModelConfig, their: str, our: str) -> Iterator[Published]:
    heads, hidden = c.num_attention_heads, c.hidden_size
    queries = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        yield Published(f"{their}.q_proj.weight", f"{our}.q.weight", (queries, hidden))
    else:
        yield Published(f"{their}.q_a_proj.weight", f"{our}.q_a.weight", (c.q_lora_rank, hidden))
        yield Published(f"{their}.q_a_layernorm.weight", f"{our}.q_a_norm.weight", (c.q_lora_rank,))
        yield Published(f"{their}.q_b_proj.weight", f"{our}.q_b.weight", (queries, c.q_lora_rank))
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    yield Published(f"{their}.kv_a_proj_with_mqa.weight", f"{our}.kv_a.weight", (latent, hidden))
    yield Published(f"{their}.kv_a_layernorm.weight", f"{our}.kv_a_norm.weight", (c.kv_lora_rank,))
    expanded = heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield Published(f"{their}.kv_b_proj.weight", f"{our}.kv_b.weight", (expanded, c.kv_lora_rank))
    yield Published(f"{their}.o_proj.weight", f"{our}.o.weight", (hidden, heads * c.v_head_dim))


def _mlp(their: str, our: str, hidden: int, width: int) -> Iterator[Published]:
    yield Published(f"{their}.gate_proj.weight", f"{our}.gate_up.weight", (width, hidden))
    yield Published(f"{their}.up_proj.weight", f"{our}.gate_up.weight", (width, hidden), width * hidden)
    yield Published(f"{their}.down_proj.weight", f"{our}.down.weight", (hidden, width))


def _experts(c: ModelConfig, their: str, our: str) -> Iterator[Published]:
    hidden, width = c.hidden_size, c.moe_intermediate_size
    matrix = width * hidden
    for e in range(c.n_routed_experts):
        gate_up = f"{our}.gate_up.weight"
        yield Published(f"{their}.{e}.gate_proj.weight", gate_up, (width, hidden), 2 * e * matrix)
        yield Published(f"{their}.{e}.up_proj.weight", gate_up, (width, hidden), (2 * e + 1) * matrix)
    for e in range(c.n_routed_experts):
        yield Published(f"{their}.{e}.down_proj.weight", f"{our}.down.weight", (hidden, width), e * matrix)


# Keys that mean the same and have the same name on both sides, and the type of their value.
_SAME: dict[str, type] = {
    **dict.fromkeys(
        "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size moe_intermediate_size "
        "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group num_attention_heads kv_lora_rank "
        "qk_nope_head_dim qk_rope_head_dim v_head_dim".split(),
        int,
    ),
    "norm_topk_prob": bool,
    **dict.fromkeys(["routed_scaling_factor", "rms_norm_eps", "initializer_range"], float),
}
# Keys with the only value that the model here can have; a file may leave them out.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
FP8_BLOCK = 128


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a ``config.json`` describes; what it says nothing about, such as the balance loss, keeps
    the default. Raises HuggingFaceError, naming the key, for a model of another kind or with values that cannot be."""
    if values.get("model_type") != MODEL_TYPE:
        raise HuggingFaceError(f"model_type={values.get('model_type')!r} must be {MODEL_TYPE!r}")
    fixed = {**_FIXED, "num_key_value_heads": values.get("num_attention_heads")}
    for key, only in fixed.items():
        if values.get(key) is not None and values[key] != only:
            raise HuggingFaceError(f"{key}={values[key]!r} must be {only!r}")
    _check_quantization(values.get("quantization_config"))
    found = {key: _typed(values, key, kind) for key, kind in _SAME.items()}
    if "q_lora_rank" not in values:
        raise HuggingFaceError("q_lora_rank is missing and must be an integer or null")
    found["q_lora_rank"] = None if values["q_lora_rank"] is None else _typed(values, "q_lora_rank", int)
    if values.get("num_nextn_predict_layers") is not None:
        found["num_nextn_predict_layers"] = _typed(values, "num_nextn_predict_layers", int)
    try:
        return ModelConfig(**found, **_rope(values))
    except ValueError as error:
        if isinstance(error, HuggingFaceError):
            raise
        raise HuggingFaceError(str(error)) from None


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for position, from ``rope_theta`` and ``rope_scaling`` or, as transformers 5 writes it, from
    ``rope_parameters`` with all of it."""
    scaling = {"rope_theta": values.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key) or {}
        if not isinstance(part, Mapping):
            raise HuggingFaceError(f"{key}={part!r} must be an object or null")
        scaling.update(part)
    theta = _typed(scaling, "rope_theta", float)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "original_max_position_embeddings": _typed(values, "max_position_embeddings", int)}
    if kind != "yarn":
        raise HuggingFaceError(f"rope_scaling.type={kind!r} must be 'yarn' or 'default'")
    unknown = {key for key, value in scaling.items() if value is not None and (key, value) != ("truncate", True)}
    unknown -= _YARN_KEYS | {"type", "rope_type", "rope_theta"}
    if unknown:
        raise HuggingFaceError(f"rope_scaling.{min(unknown)} must be absent: this model's YaRN has no such constant")
    optional = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    constants = {key: _typed(scaling, key, float) if scaling.get(key) else value for key, value in optional.items()}
    return {
        "rope_theta": theta,
        "original_max_position_embeddings": _typed(scaling, "original_max_position_embeddings", int),
        "yarn_factor": _typed(scaling, "factor", float),
        **{f"yarn_{key}": value for key, value in constants.items()},
    }


def _check_quantization(values: object) -> None:
    if values is None:
        return
    given = values if isinstance(values, Mapping) else {}
    expected = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    for key, only in expected.items():
        if given.get(key) != only:
            raise HuggingFaceError(f"quantization_config.{key}={given.get(key)!r} must be {only!r}")


def _typed(values: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of the type; a whole number is a float too, and a bool is no number."""
    words = {int: "an integer", float: "a number", bool: "true or false"}
    if key not in values:
        raise HuggingFaceError(f"{key} is missing and must be {words[kind]}")
    value = values[key]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise HuggingFaceError(f"{key}={value!r} must be {words[kind]}")
    return value


def published_config(config: ModelConfig, dtype: str, special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` for weights in ``dtype`` (torch's name of it), in the form of DeepSeek's own, which transformers,
    vLLM and SGLang read. ``special_tokens``: ``bos_token_id`` and ``eos_token_id``, which begin and end a text.

    Raises HuggingFaceError, naming ``model.KEY``, for a model that transformers' implementation cannot be.
    """
    c = config
    if c.n_shared_experts < 1 and c.first_k_dense_replace < c.num_hidden_layers:
        raise HuggingFaceError(f"model.n_shared_experts={c.n_shared_experts} must be at least 1 in {MODEL_TYPE}")
    if c.n_routed_experts < 2 * c.n_group:
        raise HuggingFaceError(
            f"model.n_group={c.n_group} must leave each group two of the {c.n_routed_experts} experts: {MODEL_TYPE} "
            f"ranks groups by their two best"
        )
    scaling = None
    if c.yarn is not None:
        scaling = {
            "type": "yarn",
            "factor": c.yarn.factor,
            "original_max_position_embeddings": c.yarn.original_length,
            "beta_fast": c.yarn.beta_fast,
            "beta_slow": c.yarn.beta_slow,
            "mscale": c.yarn.mscale,
            "mscale_all_dim": c.yarn.mscale_all_dim,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: getattr(c, key) for key in _SAME},
        "q_lora_rank": c.q_lora_rank,
        "num_key_value_heads": c.num_attention_heads,
        **_FIXED,
        "num_nextn_predict_layers": c.num_nextn_predict_layers,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": round(c.original_max_position_embeddings * c.yarn_factor),
        "torch_dtype": dtype,
        **special_tokens,
        "use_cache": True,
    }


def is_left_out(name: str, config: ModelConfig, modules: int) -> bool:
    """Whether a published tensor has no place in the model ``config`` by design: RoPE's frequencies, which follow from
    the configuration, and those of multi-token-prediction ``modules`` of the file that the model has not."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    first = config.num_hidden_layers
    left_out = range(first + config.num_nextn_predict_layers, first + modules)
    return any(name.startswith(f"model.layers.{layer}.") for layer in left_out)
