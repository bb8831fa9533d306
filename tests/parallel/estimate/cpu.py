"""What a CPU keeps that a GPU does not."""

import torch

from model.attention import core_inputs
from model.config import ModelConfig
from model.kernels import attention_core


def widens_the_core(model: ModelConfig) -> bool:
    """Whether this CPU keeps the core's result in FP32."""
    narrow = torch.zeros(3, 1, 1, 1, 8, dtype=torch.bfloat16)
    own = attention_core.serves(narrow, model.qk_head_dim, model.v_head_dim)
    return not own and core_inputs(*narrow)[0].dtype == torch.float32
