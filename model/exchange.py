"""What an MoE layer asks of the world: bring tokens to their experts (dispatch), bring results back (combine).

Each has a backward that is the other one's forward: the gradient of combine is dispatched, the gradient of dispatch is
combined, both along the layout of the forward. All four return at once with a ``Pending`` to wait on. Here is the
default, for experts that are all in this process; it moves rows in memory and works under autograd too.

T tokens, D model, K experts a token, E experts held here, R rows: one for every (token, expert) pair whose expert is
held here, sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.payload import Handover
from model.fp8.quantise import Quantised

Result = TypeVar("Result", covariant=True)


class Pending(Generic[Result]):
    """A result on its way. ``wait`` blocks until it is there, once."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish = finish

    def wait(self) -> Result:
        return self._finish()


@dataclass(frozen=True)
class Dispatched:
    """``rows_RD`` and their gate values ``weights_R``, sorted by expert; expert e has the rows up to ``ends_E[e]``
    (int32). ``layout`` belongs to the exchange: whoever combines these rows hands it back. ``payload``: the rows in
    FP8, where they travelled so; ``rows_RD`` is then no more than what gradients hang on, and ``handover`` is where the
    gradient of what becomes of them is left (``fp8/payload.py``)."""

    rows_RD: Tensor
    weights_R: Tensor
    ends_E: Tensor
    layout: Any
    payload: Quantised | None = None
    handover: Handover | None = None


class Exchange(Protocol):
    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]: ...

    def combine(self, y_RD: Tensor, layout: Any) -> Pending[Tensor]:
        """-> [T, D], for each token the sum of its K rows, in the order of K."""
        ...

    def dispatch_gradient(self, gz_TD: Tensor, layout: Any) -> Pending[Tensor | Quantised]:
        """Backward of combine: gz [T, D] -> gradients of its rows [R, D], in FP8 where rows are dispatched so."""
        ...

    def combine_gradient(self, grows_RD: Tensor, gweights_R: Tensor, layout: Any) -> Pending[tuple[Tensor, Tensor]]:
        """Backward of dispatch: gradients of rows and weights -> (gx [T, D], gweights [T, K])."""
        ...


@dataclass(frozen=True)
class Sorted:
    """How (token, slot) pairs, numbered t·K + k, are sorted by expert. ``order_N``: the pair at each sorted place;
    ``place_N``: the sorted place of each pair; N = T·K."""

    order_N: Tensor
    place_N: Tensor
    experts_a_token: int

    def spread(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [N, D]: each token's row once for each of its experts."""
        return x_TD.index_select(0, self.order_N // self.experts_a_token)

    def gather(self, y_ND: Tensor) -> Tensor:
        """[N, D] -> [T, D]: the sum of each token's rows. Not an index_add: an embedding bag gathers and sums in one
        pass, in the order of K on every device."""
        return F.embedding_bag(self.place_N.view(-1, self.experts_a_token), y_ND, mode="sum")


def sort_by_expert(indices_TK: Tensor) -> Sorted:
    """The stable order, so that a rank's rows for one expert keep the order of its tokens."""
    order_N = torch.argsort(indices_TK.flatten(), stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return Sorted(order_N, place_N, indices_TK.shape[1])


def count_experts(indices_TK: Tensor, experts: int) -> Tensor:
    """Tokens that chose each expert, int64 [E]. Not bincount, which makes the host wait for a GPU."""
    flat = indices_TK.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


class LocalExchange:
    """Every expert is here: dispatch sorts, combine puts back and sums."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        by_expert = sort_by_expert(indices_TK)
        ends_E = count_experts(indices_TK, self.experts).cumsum(0).to(torch.int32)
        weights_R = weights_TK.flatten().index_select(0, by_expert.order_N)
        dispatched = Dispatched(by_expert.spread(x_TD), weights_R, ends_E, by_expert)
        return Pending(lambda: dispatched)

    def combine(self, y_RD: Tensor, layout: Sorted) -> Pending[Tensor]:
        z_TD = layout.gather(y_RD)
        return Pending(lambda: z_TD)

    def dispatch_gradient(self, gz_TD: Tensor, layout: Sorted) -> Pending[Tensor]:
        gy_RD = layout.spread(gz_TD)
        return Pending(lambda: gy_RD)

    def combine_gradient(self, grows_RD: Tensor, gweights_R: Tensor, layout: Sorted) -> Pending[tuple[Tensor, Tensor]]:
        gweights_TK = gweights_R.index_select(0, layout.place_N).unflatten(0, (-1, layout.experts_a_token))
        gx_TD = layout.gather(grows_RD)
        return Pending(lambda: (gx_TD, gweights_TK))
