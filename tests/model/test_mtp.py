"""Multi-token prediction: what goes into the module, and which tokens it has to predict."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.exchange import LocalExchange
from model.generate import features_of
from model.mtp import MTP
from model.transformer import Transformer, initialise
from tests.model.tiny import tiny

CONFIG = tiny(num_nextn_predict_layers=1)
START = 3


def model_and_tokens(documents: list[int]) -> tuple[Transformer, Tensor]:
    """Random documents, each of so many tokens and begun by ``START``, in a row."""
    torch.manual_seed(1)
    model = Transformer(CONFIG)
    initialise(model, 5)
    tokens = torch.randint(START + 1, CONFIG.vocab_size, (1, sum(documents)))
    for end in torch.tensor([0, *documents]).cumsum(0)[:-1].tolist():
        tokens[0, end] = START
    return model, tokens


@torch.no_grad()
def test_the_loss_is_that_of_the_token_after_the_next_at_every_position_that_has_one() -> None:
    model, tokens = model_and_tokens([9])
    assert isinstance(model.mtp, MTP) and model.embed is not None and model.head is not None
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    # Position by position from the report: [enorm(e(t_i+1)), hnorm(h_i)] through the projection, the block, the head.
    features = features_of(model, inputs)
    joined = torch.cat([model.mtp.enorm(model.embed(targets)), model.mtp.hnorm(features)], dim=-1)
    x = joined @ model.mtp.eh_proj.weight.T
    positions = model.positions(inputs, x, None)
    y, _ = model.mtp.block(x, positions, LocalExchange(CONFIG.n_routed_experts))
    logits = model.head(model.mtp.norm(y))[0]
    want = F.cross_entropy(logits[:-1], tokens[0, 2:], reduction="sum")
    sums = model(inputs, targets)
    assert sums.mtp.item() == pytest.approx(want.item(), rel=1e-6)
    without = Transformer(tiny())
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    assert sums.cross_entropy.item() == without(inputs, targets).cross_entropy.item()


@torch.no_grad()
def test_a_document_that_is_kept_apart_is_what_it_is_alone() -> None:
    lengths = [5, 7, 4]
    model, tokens = model_and_tokens(lengths)
    ended = F.pad(tokens, (0, 1), value=START)  # what ends a document begins the next one
    packed = model(ended[:, :-1], ended[:, 1:], document_start=START).mtp
    alone = 0.0
    for part in tokens.split(lengths, dim=1):
        document = F.pad(part, (0, 1), value=START)
        alone += model(document[:, :-1], document[:, 1:]).mtp.item()
    assert packed.item() == pytest.approx(alone, rel=1e-5)
    assert model(ended[:, :-1], ended[:, 1:]).mtp.item() != pytest.approx(alone, rel=1e-3)
