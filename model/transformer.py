"""The model, or any run of its layers: embedding, blocks, final norm, output head and multi-token prediction.

A piece of the model keeps the names that its parameters have in the whole ("layers.3.attn.o.weight" wherever layer 3
lives), so that initial values, checkpoints and comparisons need not know how it was cut.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.exchange import Exchange, LocalExchange
from model.linear import Embedding, GroupedLinear, Linear
from model.mlp import Experts
from model.mtp import MTP, NO_TARGET, targets_after
from model.norm import RMSNorm
from model.positions import Positions, documents_of, places_in
from model.rope import rotations


@dataclass(frozen=True)
class Loss:
    """Sums, so that micro-batches and ranks can be added up: the cross-entropy over the target tokens (nats), the
    balance loss over sequences and layers, without alpha, and the cross-entropy of the multi-token-prediction module,
    without lambda; 0 where there is none. FP32 scalars."""

    cross_entropy: Tensor
    balance: Tensor
    mtp: Tensor


class Transformer(nn.Module):
    """Layers ``layers`` of the model with routed experts ``experts`` of each; with all of both it is the whole model.

    The first piece has the embedding, the last one the final norm and the head, and a piece may be both. If there is a
    multi-token-prediction module it is in the last piece, which then has the embedding too. ``embed``: that of another
    piece in this process, to be shared.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int] | None = None,
        experts: Sequence[int] | None = None,
        embed: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        layers = range(config.num_hidden_layers) if layers is None else layers
        experts = range(config.n_routed_experts) if experts is None else experts
        self.first, self.last = layers[0] == 0, layers[-1] == config.num_hidden_layers - 1
        predicts_further = self.last and config.num_nextn_predict_layers > 0
        needs_embed = self.first or predicts_further
        self.embed = (embed or Embedding(config.vocab_size, config.hidden_size)) if needs_embed else None
        self.layers = nn.ModuleDict({str(layer): Block(config, layer, experts) for layer in layers})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if self.last else None
        self.head = Linear(config.hidden_size, config.vocab_size) if self.last else None
        self.mtp = MTP(config, experts) if predicts_further else None
        self._rotations: dict[tuple[int, torch.device], Tensor] = {}

    def rotations(self, length: int, device: torch.device) -> Tensor:
        """RoPE's turns for a sequence length, made once."""
        key = (length, device)
        if key not in self._rotations:
            c = self.config
            self._rotations[key] = rotations(length, c.qk_rope_head_dim, c.rope_theta, device, c.yarn)
        return self._rotations[key]

    def positions(self, tokens_BS: Tensor | None, like_BSD: Tensor, document_start: int | None) -> Positions:
        """Of the tokens whose activations are ``like_BSD``. ``document_start``: the token that begins a document, if
        documents are kept apart; otherwise the tokens themselves need not be known."""
        turns_SP = self.rotations(like_BSD.shape[1], like_BSD.device)
        if document_start is None:
            return Positions(turns_SP)
        assert tokens_BS is not None
        documents_BS = documents_of(tokens_BS, document_start)
        return Positions(turns_SP[places_in(documents_BS)], documents_BS)

    def main_blocks(self) -> Iterator[tuple[int, Block]]:
        """(layer number, block) of the layers, in order."""
        for name, block in self.layers.items():
            assert isinstance(block, Block)
            yield int(name), block

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The same, and the multi-token-prediction module's block as the layer after the last."""
        yield from self.main_blocks()
        if self.mtp is not None:
            yield self.config.num_hidden_layers, self.mtp.block

    def cross_entropy(self, features_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Head, and the summed cross-entropy in FP32. Targets of ``model.mtp.NO_TARGET`` count for nothing."""
        assert self.head is not None
        logits_TV = self.head(features_BSD).flatten(0, 1)
        return F.cross_entropy(logits_TV.float(), targets_BS.flatten(), ignore_index=NO_TARGET, reduction="sum")

    def embed_next(self, targets_BS: Tensor) -> Tensor:
        """The embeddings of the next tokens, which are the targets; in a sequence of padding it is any token."""
        assert self.embed is not None
        next_BSD: Tensor = self.embed(targets_BS.clamp_min(0))
        return next_BSD

    def leave_layers(self, targets_BS: Tensor, x_BSD: Tensor, next_BSD: Tensor | None = None) -> tuple[Tensor, ...]:
        """What follows the last layer: (summed cross-entropy,), and given the embeddings of the next tokens also what
        enters the multi-token-prediction module's block."""
        assert self.norm is not None
        features_BSD = self.norm(x_BSD)
        cross_entropy = self.cross_entropy(features_BSD, targets_BS)
        if next_BSD is None:
            return (cross_entropy,)
        assert self.mtp is not None
        return cross_entropy, self.mtp.enter(features_BSD, next_BSD)

    def leave_mtp(self, targets_BS: Tensor, document_start: int | None, x_BSD: Tensor) -> Tensor:
        """What follows the multi-token-prediction module's block: its summed cross-entropy. ``document_start`` as for
        ``positions``."""
        assert self.mtp is not None
        return self.cross_entropy(self.mtp.norm(x_BSD), targets_after(targets_BS, document_start))

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        exchange: Exchange | None = None,
        document_start: int | None = None,
    ) -> Loss:
        """The whole model under plain autograd: the reference that every parallel layout is compared with.
        ``document_start`` as for ``positions``."""
        assert self.embed is not None
        exchange = exchange or LocalExchange(self.config.n_routed_experts)
        x_BSD = self.embed(tokens_BS)
        positions = self.positions(tokens_BS, x_BSD, document_start)
        balance = torch.zeros((), device=x_BSD.device)
        for _, block in self.main_blocks():
            x_BSD, layer_balance = block(x_BSD, positions, exchange)
            if layer_balance is not None:
                balance = balance + layer_balance
        if self.mtp is None:
            (cross_entropy,) = self.leave_layers(targets_BS, x_BSD)
            return Loss(cross_entropy, balance, torch.zeros_like(balance))
        cross_entropy, x_BSD = self.leave_layers(targets_BS, x_BSD, self.embed_next(targets_BS))
        x_BSD, mtp_balance = self.mtp.block(x_BSD, positions, exchange)
        assert mtp_balance is not None
        return Loss(cross_entropy, balance + mtp_balance, self.leave_mtp(targets_BS, document_start, x_BSD))


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that are split over the expert-parallel ranks."""
    return {m.weight for m in model.modules() if isinstance(m, GroupedLinear)}


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Draw the initial parameters: normal with the configured deviation, norms one.

    Every matrix has a generator of its own, seeded by (seed, name, global expert number), so that the values are the
    same wherever a matrix lives and however many ranks share the model.
    """
    std = model.config.initializer_range
    experts = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, GroupedLinear)}
    for name, parameter in model.named_parameters():
        if name in experts:
            owner = model.get_submodule(name.rsplit(".", 2)[0])
            assert isinstance(owner, Experts)
            for number, matrix in zip(owner.experts, parameter, strict=True):
                _draw(matrix, f"{seed}:{name}:{number}", std)
        elif parameter.ndim > 1:
            _draw(parameter, f"{seed}:{name}", std)
        else:
            parameter.fill_(1.0)


def _draw(matrix: Tensor, key: str, std: float) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    matrix.copy_(torch.empty(matrix.shape).normal_(0.0, std, generator=generator))
