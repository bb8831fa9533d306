"""Activations that backward makes again from what is kept, instead of keeping them (DeepSeek-V3 report, 3.2.3).

    norm      outputs of RMSNorm, and what is made of them alone: their FP8 copies, the FP32 input of the router
    mla_up    queries, keys and values as the attention core reads them, made again from the latents by the
              up-projections W_qb and W_kvb, and the input of W_o, which is the core's result in another form
    swiglu    outputs of SwiGLU (FP8 layers keep nothing but its input anyway)
    full      everything between the inputs of a layer's phases; what dispatch brought is such an input and is kept

``full`` runs a phase's forward again (``torch.utils.checkpoint``, the kind that keeps the graph and fills in its saved
tensors). The others leave the graph as it is, too: autograd asks hooks where to keep the tensors that an operation
saves, and of one that is made again they keep how: a function and its inputs. The first operation that needs it in
backward has it made, and it goes with the last one. No backward function runs twice, and what it reads has the bits of
the forward. A deferred weight gradient holds its input, once made, from I to W.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.config import Recompute, Recomputed

Made = TypeVar("Made", Tensor, tuple[Tensor, ...])
Result = TypeVar("Result")


class Recomputation:
    """What one forward of one layer has made again: called with a member of the policy, it makes such a value.

    After a phase ``forget`` lets go of all of its values but one that the next phase reads.
    """

    def __init__(self, policy: Recompute = ()) -> None:
        self.policy = policy
        self._marked: dict[int, tuple[Tensor, _Maker, int]] = {}  # by the address of the storage, which is kept alive
        self._derived: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    def phase(self, function: Callable[..., Result], *inputs: Any) -> Result:
        """``function(*inputs, self)``, one phase of the layer: under autograd, what it saves is kept by the policy."""
        if not self.policy or not torch.is_grad_enabled():
            return function(*inputs, self)
        if self.policy == "full":
            again: Result = checkpoint(
                lambda *given: function(*given, Recomputation()), *inputs, use_reentrant=False, preserve_rng_state=False
            )
            return again
        with saved_tensors_hooks(self._pack, _unpack):
            return function(*inputs, self)

    def __call__(self, member: Recomputed, function: Callable[..., Made], *inputs: Tensor | None) -> Made:
        """``function(*inputs)``, made again in backward if ``member`` is in the policy."""
        value = function(*inputs)
        if member in self.policy and torch.is_grad_enabled():
            self._mark(value, _Maker(function, [self._packed_input(x) for x in inputs]))
        return value

    def narrowed(
        self,
        member: Recomputed,
        function: Callable[[], Tensor],
        narrow: Callable[[Tensor], Tensor | None],
        widen: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """``function()``, of whose result backward keeps ``narrow`` of it only, if ``member`` is in the policy, and
        makes it again with ``widen``: to the same bits, and laid out in memory as it was. A result that cannot be made
        so, of which ``narrow`` is None, is kept as it is."""
        if member not in self.policy or not torch.is_grad_enabled():
            return function()
        saved: list[_Saved] = []

        def pack(tensor: Tensor) -> "_Again | _Saved":
            packed = self._pack(tensor)
            if isinstance(packed, _Again):
                return packed
            saved.append(_Saved(packed))
            return saved[-1]

        with saved_tensors_hooks(pack, _unpack):
            value = function()
        with torch.no_grad():
            kept = narrow(value.detach())
        if kept is None:
            return value
        maker = _Maker(widen, [kept])
        self._mark(value, maker)
        for each in saved:
            if _place(each.kept) == _place(value):
                each.kept = _Again(maker, 0, each.kept)
        return value

    def derived(self, x: Tensor, function: Callable[..., Made], *arguments: Any) -> Made:
        """``function(x, *arguments)`` without gradients, once for all who ask, and made again where ``x`` is."""
        if not torch.is_grad_enabled():
            return function(x, *arguments)
        key = (x.data_ptr(), x.shape, x.stride(), function, *arguments)
        if key not in self._derived:
            x = x.detach()
            with torch.no_grad():
                value = function(x, *arguments)
            self._derived[key] = x, value
            packed = self._pack(x)
            if isinstance(packed, _Again):
                self._mark(value, _Maker(lambda x: function(x, *arguments), [packed]))
        found: Made = self._derived[key][1]
        return found

    def forget(self, but: Tensor | None = None) -> None:
        place = None if but is None else _place(but)
        self._marked = {key: mark for key, mark in self._marked.items() if key == place}
        self._derived = {}

    def _mark(self, value: Tensor | tuple[Tensor, ...], maker: "_Maker") -> None:
        for index, tensor in enumerate(_tensors(value)):
            self._marked[_place(tensor)] = tensor.detach(), maker, index

    def _packed_input(self, x: Tensor | None) -> "Tensor | _Again | None":
        return None if x is None else self._pack(x.detach())

    def _pack(self, tensor: Tensor) -> "Tensor | _Again":
        marked, maker, index = self._marked.get(_place(tensor), (None, None, 0))
        if maker is None or marked is None or marked.dtype != tensor.dtype or not tensor.numel():
            return tensor  # empty tensors share an address
        return _Again(maker, index, tensor)


class _Maker:
    """Makes values, at the first call for one."""

    def __init__(self, function: Callable[..., Any], inputs: "list[Tensor | _Again | None]") -> None:
        self._function, self._inputs = function, inputs
        self._values: tuple[Tensor, ...] = ()

    def value(self, index: int) -> Tensor:
        if not self._values:
            with torch.no_grad():
                self._values = _tensors(self._function(*map(_unpack, self._inputs)))
            self._inputs = []
        return self._values[index]


class _Again:
    """In place of a saved tensor: which value of a maker it was, or which view of that."""

    def __init__(self, maker: _Maker, index: int, tensor: Tensor) -> None:
        self._maker, self._index = maker, index
        self._view = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self._maker.value(self._index).as_strided(*self._view)


class _Saved:
    """In place of a saved tensor that may be made again: which, is known once its operation has returned."""

    def __init__(self, kept: Tensor) -> None:
        self.kept: Any = kept


def _unpack(packed: Any) -> Any:
    packed = packed.kept if isinstance(packed, _Saved) else packed
    return packed.tensor() if isinstance(packed, _Again) else packed


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
