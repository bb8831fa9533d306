"""Greedy generation with drafts: the multi-token-prediction module guesses a token, the main model says if it is right.

A pass of the main model takes the token that is known to be next and a draft of the one after it. What the model
chooses after the first of them settles the draft: if it is the draft, the pass has given two tokens, for it has chosen
one after the draft as well; if not, it has given one, and what was cached of the draft is forgotten. So every token is
the main model's own choice, whatever the drafts are (DeepSeek-V3 report, 5.4.3). Two tokens at once are summed in
another order than one: where the two best tokens are equal up to rounding, in BF16 above all, the choice may differ.

The module keeps latents as every layer does, of the positions whose next token is known.

B batch, S sequence, D model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import LatentCache
from model.exchange import LocalExchange
from model.generate import features_of, latent_caches
from model.positions import Positions
from model.transformer import Transformer


@dataclass
class DraftCounts:
    """Of a generation so far. ``passes``: of the main model, the prompt's among them; without drafts each gives one of
    the ``tokens``."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.no_grad()
def generate_speculatively(
    model: Transformer, prompt: list[int], count: int, end: int, counts: DraftCounts
) -> Iterator[int]:
    """The tokens of ``generate`` at temperature 0, counted in ``counts``. ``model`` has a multi-token-prediction
    module."""
    assert prompt and model.mtp is not None
    with latent_caches(model, 1, len(prompt) + count, mtp=True) as caches:
        *main, further = caches
        row = [*prompt]
        features_BSD = _pass(model, prompt, counts)
        chosen = _choices(model, features_BSD[:, -1:])
        while True:
            for token in chosen:
                row.append(token)
                counts.tokens += 1
                yield token
                if token == end or counts.tokens == count:
                    return
            fed = row[-1:]
            if counts.tokens + 1 < count:  # the last token needs no draft of one after it
                fed.append(_draft(model, further, features_BSD, row[further.length + 1 :]))
            features_BSD = _pass(model, fed, counts)
            chosen = _choices(model, features_BSD)
            if len(fed) == 2:
                counts.drafted += 1
                if chosen[0] == fed[1]:
                    counts.accepted += 1
                else:
                    for cache in main:
                        cache.drop(1)
                    features_BSD, chosen = features_BSD[:, :1], chosen[:1]


def _pass(model: Transformer, tokens: list[int], counts: DraftCounts) -> Tensor:
    counts.passes += 1
    return features_of(model, torch.tensor([tokens], device=next(model.parameters()).device))


def _choices(model: Transformer, features_BSD: Tensor) -> list[int]:
    """The most probable token after each position, of equal ones the first, as ``generate.choose`` has it."""
    assert model.head is not None
    logits_SV = model.head(features_BSD)[0].cpu()
    return [int(token) for token in logits_SV.argmax(-1)]


def _draft(model: Transformer, cache: LatentCache, features_BSD: Tensor, following: list[int]) -> int:
    """The module's choice of the token after the last of ``following``, the tokens after the positions of
    ``features_BSD``, which follow those in its cache."""
    assert model.mtp is not None and model.embed is not None
    assert len(following) == features_BSD.shape[1], (len(following), features_BSD.shape)
    device = features_BSD.device
    turns_SP = model.rotations(cache.room, device)[cache.length : cache.length + len(following)]
    x_BSD = model.mtp.enter(features_BSD, model.embed(torch.tensor([following], device=device)))
    x_BSD, _ = model.mtp.block(x_BSD, Positions(turns_SP), LocalExchange(model.config.n_routed_experts))
    (draft,) = _choices(model, model.mtp.norm(x_BSD[:, -1:]))
    return draft
