"""Documents that are kept apart in a packed sequence are what they would be alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.positions import Positions, documents_of, places_in
from model.transformer import Transformer, initialise
from tests.model.tiny import tiny

END = 39
IGNORED = -100
rows = st.lists(st.sampled_from([1, 2, END]), min_size=1, max_size=12)


@given(rows, rows)
def test_a_token_sees_its_own_document_up_to_itself(first: list[int], second: list[int]) -> None:
    length = min(len(first), len(second))
    tokens = torch.tensor([first[:length], second[:length]])
    documents = documents_of(tokens, END)
    mask = Positions(torch.empty(0), documents).mask(torch.float32)
    assert mask is not None and mask.shape == (2, 1, length, length)
    for row in range(2):
        starts = sorted({0, *(tokens[row] == END).nonzero().flatten().tolist()})
        for start, end in pairwise([*starts, length]):
            assert places_in(documents)[row, start:end].tolist() == list(range(end - start))
            for query in range(start, end):
                seen = (mask[row, 0, query] == 0).nonzero().flatten().tolist()
                assert seen == list(range(start, query + 1))


@contextmanager
def wide() -> Iterator[None]:
    """FP64 stays FP64 where the model takes FP32. A document of two tokens has gradients that nearly cancel, of which
    FP32 leaves as few digits as the rounding of another order of sums changes."""
    narrow, grouped = Tensor.float, F.grouped_mm

    def by_expert(x_RD: Tensor, w_EDF: Tensor, offs: Tensor) -> Tensor:
        if x_RD.dtype != torch.float64:
            return grouped(x_RD, w_EDF, offs=offs)
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        return torch.cat([x_TD @ w_DF for x_TD, w_DF in zip(x_RD.split(sizes), w_EDF, strict=True)])

    with (
        patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)),
        patch.object(F, "grouped_mm", by_expert),
    ):
        yield


def gradients(model: Transformer, inputs: Tensor, targets: Tensor, start: int | None) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    with wide():
        loss = model(inputs, targets, document_start=start).cross_entropy
        loss.backward()
    assert loss.dtype == torch.float64
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 2**31))
@example([1, 4, 1], 4)
def test_each_document_has_the_loss_and_the_gradients_that_it_has_alone(lengths: list[int], seed: int) -> None:
    """The other documents' targets are ignored."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(tiny())
    initialise(model, 1)
    model.double()
    documents = [torch.tensor([END, *torch.randint(0, END, (n,), generator=generator).tolist()]) for n in lengths]
    row = torch.cat([*documents, torch.tensor([END])])
    at = 0
    for document in documents:
        targets = torch.full_like(row[1:], IGNORED)
        targets[at : at + len(document)] = row[at + 1 : at + 1 + len(document)]
        loss, packed = gradients(model, row[None, :-1], targets[None], END)
        alone_loss, alone = gradients(model, document[None], row[None, at + 1 : at + 1 + len(document)], None)
        at += len(document)
        assert loss == pytest.approx(alone_loss, rel=1e-5)
        assert len(packed) == len(alone)
        for got, want in zip(packed, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    crossing, _ = gradients(model, row[None, :-1], targets[None], None)
    assert crossing != pytest.approx(loss, rel=1e-7), "without the boundaries, the last one sees those before it"
