"""Linear layers in FP8: their results are those of FP64 within what rounding explains, whoever owns the gradients and
whenever W runs; and which layers they are."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from model.fp8 import payload
from model.fp8.assign import AFTER_ATTENTION, COMBINED, DISPATCHED, PLAIN, set_precision
from model.fp8.gemm import Emulated, Gemm, Reference
from model.fp8.linear import Fp8Products, Recipe, WeightBlocks
from model.fp8.quantise import Scale, Tile, dequantise, quantise
from model.linear import GroupedLinear, Linear, WeightGradients, own
from model.mlp import MLP, Experts
from tests.model.tiny import tiny

seeds = st.integers(0, 2**31)
recipe_names = {"plain": PLAIN, "after attention": AFTER_ATTENTION, "dispatched": DISPATCHED, "combined": COMBINED}
HALF_UNIT = 2.0**-4
"""Of a number of E4M3, relative; of its subnormal ones 2^-10 of the scale, absolute."""


def layer(recipe: Recipe, f: int, d: int, rows: list[int] | None, seed: int, gemm: Gemm | None = None) -> nn.Module:
    torch.manual_seed(seed)
    module = Linear(d, f) if rows is None else GroupedLinear(len(rows), d, f)
    nn.init.normal_(module.weight, std=0.5)
    module.products = Fp8Products(gemm or Emulated(), recipe)
    return module


def ends_of(rows: list[int] | None) -> list[Tensor]:
    return [] if rows is None else [torch.tensor(rows).cumsum(0).to(torch.int32)]


def immediate(module: nn.Module, x: Tensor, gy: Tensor, *rest: Tensor) -> list[Tensor]:
    """[y, gx, gW] under plain autograd."""
    x = x.detach().requires_grad_()
    y = module(x, *rest)
    return [y.detach(), *torch.autograd.grad(y, [x, module.weight], gy)]


def deferred(module: nn.Module, x: Tensor, gy: Tensor, *rest: Tensor) -> list[Tensor]:
    """[y, gx, gW] with an owner, whose W runs after everything else has gone."""
    buffer = torch.zeros(module.weight.shape)
    owner = WeightGradients({module.weight: buffer})
    own(module, owner)
    x = x.clone().requires_grad_()
    y = module(x, *rest)
    (gx,) = torch.autograd.grad(y, x, gy)
    assert not buffer.any()
    results = [y.detach().clone(), gx]
    x.data.fill_(torch.nan)
    del x, y
    owner.apply(owner.take())
    own(module, None)
    return [*results, buffer]


def slack(x: Tensor, times: int) -> Tensor:
    """How far the numbers of ``x`` can be off after being quantised so many times, whatever the tiles: a scale is at
    most 2 max|x| / 448."""
    off = torch.zeros_like(x)
    for _ in range(times):
        off += HALF_UNIT * (x.abs() + off) + 2 / 448 * 2.0**-10 * (x.abs() + off).max()
    return off * (1 + 1e-5)


def assert_within(got: Tensor, a: Tensor, b: Tensor, times_a: int, times_b: int) -> None:
    """``got`` is a b within what quantising a and b so often explains."""
    a, b = a.double(), b.double()
    off_a, off_b = slack(a, times_a), slack(b, times_b)
    bound = a.abs() @ off_b + off_a @ (b.abs() + off_b) + 1e-5 * (a.abs() @ b.abs())
    assert ((got.double() - a @ b).abs() <= bound).all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(recipe_names)),
    st.one_of(st.none(), st.lists(st.integers(0, 150), min_size=1, max_size=3)),
    st.integers(1, 200),
    st.integers(1, 25),
    st.integers(1, 25),
    seeds,
)
def test_gradients_are_those_of_fp64_within_the_bound(
    name: str, rows: list[int] | None, t: int, f: int, d: int, seed: int
) -> None:
    f, d = 8 * f, 8 * d
    module = layer(recipe_names[name], f, d, rows, seed)
    t = t if rows is None else sum(rows)
    x, gy = torch.randn(t, d), torch.randn(t, f) * torch.randn(t, 1).exp()
    y, gx, gw = immediate(module, x, gy, *ends_of(rows))
    w = module.weight.detach()
    groups = [(slice(None), w, gw)] if rows is None else []
    if rows is not None:
        bounds = pairwise([0, *ends_of(rows)[0].tolist()])
        groups = [(slice(a, b), w[e], gw[e]) for e, (a, b) in enumerate(bounds) if a < b]
    for part, weight, gradient in groups:
        assert_within(y[part], x[part], weight.t(), 1, 1)
        assert_within(gx[part], gy[part], weight, 1, 1)
        assert_within(gradient, gy[part].t(), x[part], 1, 2)
    if rows is not None:
        assert not gw[torch.tensor(rows) == 0].any()


@pytest.mark.parametrize(
    "name,wgrad", [("plain", 3**0.5), ("after attention", 2**0.5), ("dispatched", 2**0.5), ("combined", 3**0.5)]
)
def test_errors_are_the_predicted_ones(name: str, wgrad: float) -> None:
    # Independent roundings of .026 each add up as squares. The copy for Wgrad is rounded once more, unless its scales
    # are powers of two.
    module = layer(recipe_names[name], 384, 512, None, seed=1)
    x, gy, w = torch.randn(640, 512), torch.randn(640, 384), module.weight.detach()
    wide = x @ w.t(), gy @ w, gy.t() @ x
    for got, want, predicted in zip(immediate(module, x, gy), wide, (2**0.5, 2**0.5, wgrad), strict=True):
        assert ((got - want).norm() / want.norm()).item() == pytest.approx(0.026 * predicted, rel=0.06)


cases = pytest.mark.parametrize("rows", [None, [130, 0, 7]], ids=["linear", "grouped"])


@cases
@pytest.mark.parametrize("name", sorted(recipe_names))
@pytest.mark.parametrize("way", [immediate, deferred])
def test_a_weight_is_quantised_once_until_it_changes_for_the_same_bits(
    rows: list[int] | None, name: str, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, made = WeightBlocks(), []

    def counted(x: Tensor, tile: Tile, *rest: Any, **more: Any) -> Any:
        made.append(tile)
        return quantise(x, tile, *rest, **more)

    monkeypatch.setattr("model.fp8.linear.quantise", counted)
    module, recipe = layer(recipe_names[name], 136, 200, rows, seed=3), recipe_names[name]
    x, gy = torch.randn(137, 200).bfloat16(), torch.randn(137, 136).bfloat16()
    for write in range(2):
        module.weight.data += write  # a write that nobody sees but who does it
        blocks.forget()
        module.products = Fp8Products(Emulated(), recipe)
        wanted = way(module, x, gy, *ends_of(rows))
        made.clear()
        module.products = Fp8Products(Emulated(), recipe, blocks)
        for _ in range(2):
            assert all(map(torch.equal, way(module, x, gy, *ends_of(rows)), wanted))
        assert made.count(Tile.BLOCK) == 1
        assert blocks.nbytes == module.weight.numel() + 4 * (len(rows) if rows else 1) * 2 * 2


@cases
@pytest.mark.parametrize("name", sorted(recipe_names))
@pytest.mark.parametrize("gemm", [Reference(), Emulated()], ids=lambda g: g.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_gradients_are_bitwise_the_immediate_ones(
    rows: list[int] | None, name: str, gemm: Gemm, dtype: torch.dtype
) -> None:
    module = layer(recipe_names[name], 136, 200, rows, seed=2, gemm=gemm)
    x, gy = torch.randn(137, 200).to(dtype), torch.randn(137, 136).to(dtype)
    now, later = (way(module, x, gy, *ends_of(rows)) for way in (immediate, deferred))
    assert [t.dtype for t in now] == [dtype, dtype, torch.float32]
    for a, b in zip(now, later, strict=True):
        assert torch.equal(a, b)


@cases
def test_micro_batches_add_up_in_fp32_in_the_order_of_their_w(rows: list[int] | None) -> None:
    module = layer(PLAIN, 40, 48, rows, seed=3)
    batches = [(torch.randn(137, 48), torch.randn(137, 40)) for _ in range(3)]
    alone = [immediate(module, x, gy, *ends_of(rows))[2] for x, gy in batches]
    buffer = torch.zeros(module.weight.shape)
    owner = WeightGradients({module.weight: buffer})
    own(module, owner)
    taken = []
    for x, gy in batches:
        module(x.requires_grad_(), *ends_of(rows)).backward(gy)
        taken.append(owner.take())
    for collected in reversed(taken):
        owner.apply(collected)
    assert torch.equal(buffer, alone[2] + alone[1] + alone[0])


@pytest.mark.parametrize("name,bits", [("plain", 8), ("after attention", 12)])
def test_what_is_kept_for_backward_is_narrow(name: str, bits: int) -> None:
    module = layer(recipe_names[name], 128, 512, None, seed=4)
    kept = saved_bytes(lambda: module(torch.randn(256, 512, requires_grad=True)), but=module.weight)
    assert kept == 256 * 512 * (bits / 8 + 4 / 128)


def saved_bytes(function: Any, but: Tensor) -> int:
    """Bytes that autograd keeps for a backward of ``function``, each storage once, without the tensor ``but``."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    del kept
    storages.pop(but.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_an_mlp_keeps_its_swiglu_input_in_fp8_and_no_output() -> None:
    mlp = MLP(256, 384)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    for child in (mlp.gate_up, mlp.down):
        child.products = Fp8Products(Emulated(), PLAIN)
    kept = saved_bytes(lambda: mlp(torch.randn(64, 256, requires_grad=True)), but=mlp.down.weight)
    kept -= mlp.gate_up.weight.nbytes
    assert kept == 64 * (256 + 768) * (1 + 4 / 128)


@cases
def test_nothing_is_kept_after_w(rows: list[int] | None) -> None:
    module = layer(PLAIN, 40, 48, rows, seed=5)
    owner = WeightGradients({module.weight: torch.zeros(module.weight.shape)})
    own(module, owner)
    x, gy = torch.randn(137, 48, requires_grad=True), torch.randn(137, 40)
    y = module(x, *ends_of(rows))
    y.backward(gy)
    wide = [StorageWeakRef(t.untyped_storage()) for t in (x, gy)]
    del x, y, gy
    assert all(ref.expired() for ref in wide), "W needs the narrow copies alone"
    collected = owner.take()
    owner.apply(collected)


def gated(experts: bool, seed: int) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """(module, inputs that carry gradients, the rest) in sizes at which rounding errors average out."""
    torch.manual_seed(seed)
    module = Experts(tiny(hidden_size=256, moe_intermediate_size=192), range(3)) if experts else MLP(256, 192)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=256**-0.5)
    x = torch.randn(300, 256)
    return (module, [x, torch.rand(300) + 0.1], ends_of([170, 0, 130])) if experts else (module, [x], [])


@pytest.mark.parametrize("experts", [False, True])
def test_swiglu_and_its_layers_are_fp64s_within_a_few_roundings(experts: bool) -> None:
    module, inputs, rest = gated(experts, seed=6)
    gy = torch.randn(300, 256)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = module(*leaves, *rest)
    wide = [y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], gy)]
    set_precision(module, Emulated())
    y = module(*leaves, *rest)
    narrow = [y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], gy)]
    # The longest way, to the gradient of a gate value, has about ten roundings: of x and W, of SwiGLU's input, which
    # enters twice, of gy and W.
    for got, want in zip(narrow, wide, strict=True):
        assert 0.02 < ((got - want).norm() / want.norm()).item() < 0.026 * 10**0.5 * 1.1

    buffers = [torch.zeros(p.shape) for p in module.parameters()]
    owner = WeightGradients(dict(zip(module.parameters(), buffers, strict=True)))
    own(module, owner)
    y = module(*leaves, *rest)
    found = torch.autograd.grad(y, leaves, gy)
    owner.apply(owner.take())
    for got, want in zip([y.detach(), *found, *buffers], narrow, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@cases
def test_nan_is_never_hidden(rows: list[int] | None, bad: float) -> None:
    module = layer(AFTER_ATTENTION, 40, 200, rows, seed=7)
    x, gy = torch.randn(137, 200), torch.randn(137, 40)
    x[135, 3] = bad
    y, gx, gw = immediate(module, x, gy, *ends_of(rows))
    assert y[135].isnan().all() and not y[:135].isnan().any() and gx.isfinite().all()
    assert gw[..., 3].isnan().any()
    x[135, 3], gy[0, 0] = 1.0, bad
    y, gx, gw = immediate(module, x, gy, *ends_of(rows))
    assert gx[0].isnan().all() and gx[1:].isfinite().all() and gw[..., 0, :].isnan().any()


def test_a_payload_is_the_quantised_input() -> None:
    rows = [130, 0, 7]
    module = layer(DISPATCHED, 40, 200, rows, seed=8)
    x, gy = torch.randn(137, 200).bfloat16(), torch.randn(137, 40).bfloat16()
    want = immediate(module, x, gy, *ends_of(rows))
    arrived = payload.unpack(payload.pack(x), 200)
    anchor = payload.anchor(arrived, torch.bfloat16).requires_grad_()
    y = module(anchor, *ends_of(rows), arrived)
    got = [y.detach(), *torch.autograd.grad(y, [anchor, module.weight], gy)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_gradient_payload_changes_the_weight_gradient_alone_and_by_one_more_rounding() -> None:
    """Rows that are large elsewhere lose digits of their small numbers on the way, which columns would have kept."""
    rows = [130, 0, 7]
    module = layer(COMBINED, 40, 200, rows, seed=8)
    x, gy = torch.randn(137, 200), torch.randn(137, 40) * torch.logspace(-9, 9, 40, base=2)
    arrived = dequantise(payload.unpack(payload.pack(gy), 40))
    plain, sent = (immediate(module, x, g, *ends_of(rows)) for g in (gy, arrived))
    assert torch.equal(plain[0], sent[0]) and torch.equal(plain[1], sent[1])
    assert not torch.equal(plain[2], sent[2])
    assert_within(sent[2][0], gy[:130].T, x[:130], 2, 2)


@pytest.mark.parametrize("gemm", [Reference(), Emulated()])
def test_a_gradient_payload_goes_into_the_products_as_it_came(gemm: Gemm) -> None:
    """To the bits of widening it and quantising it again, and whatever autograd hands on in its place."""
    module, (x, weights), rest = gated(True, seed=9)
    set_precision(module, gemm)
    x, gy = x.bfloat16(), torch.randn(300, 256) * torch.randn(300, 1).exp()
    arrived = payload.unpack(payload.pack(gy), 256)

    def gradients(gy: Tensor, handover: payload.Handover | None) -> list[Tensor]:
        buffers = {p: torch.zeros(p.shape) for p in module.parameters()}
        own(module, owner := WeightGradients(buffers))
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        y = module(*leaves, *rest, handover=handover)
        found = torch.autograd.grad(y, leaves, gy)
        owner.apply(owner.take())
        return [y.detach(), *found, *buffers.values()]

    handover = payload.Handover()
    handover.leave(arrived)
    want = gradients(dequantise(arrived).bfloat16(), None)
    got = gradients(torch.full_like(x, torch.nan), handover)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(AssertionError, match="none came"):
        gradients(x, handover)


def test_power_of_two_scales_where_they_are_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[tuple[Tile, Scale, str]]] = {}

    def spied(x: Tensor, tile: Tile, scale: Scale = Scale.FP32, *rest: Any, **more: Any) -> Any:
        q = quantise(x, tile, scale, *rest, **more)
        seen.setdefault(current, set()).add((tile, scale, q.format.name))
        return q

    for module in ("linear", "gemm"):
        monkeypatch.setattr(f"model.fp8.{module}.quantise", spied)
    one, two, e4m3 = Scale.FP32, Scale.POWER_OF_TWO, "E4M3"
    weight = (Tile.BLOCK, one, e4m3)
    for name in recipe_names:
        current = name
        immediate(layer(recipe_names[name], 8, 8, None, seed=0), torch.randn(3, 8), torch.randn(3, 8))
    # The gradient's columns have the scales of its rows; requantise makes the input's columns.
    assert seen["plain"] == {(Tile.ROW, one, e4m3), (Tile.COLUMN, one, e4m3), weight}
    assert seen["after attention"] == {
        (Tile.ROW, two, e4m3),
        (Tile.ROW, two, "E5M6"),
        (Tile.ROW, one, e4m3),
        (Tile.COLUMN, one, e4m3),
        weight,
    }
    assert seen["dispatched"] == {(Tile.ROW, two, e4m3), (Tile.ROW, one, e4m3), (Tile.COLUMN, one, e4m3), weight}
    assert seen["combined"] == {(Tile.ROW, one, e4m3), (Tile.ROW, two, e4m3), (Tile.COLUMN, two, e4m3), weight}
