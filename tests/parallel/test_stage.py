"""A stage runs in phases with collectives between them, and is still the plain model under plain autograd."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualpipe.program import Work
from model.config import ModelConfig
from model.exchange import Dispatched, LocalExchange, Pending
from model.fp8.assign import set_precision
from model.fp8.gemm import Emulated
from model.linear import WeightGradients, own
from model.router import Routing
from model.transformer import Transformer, initialise
from parallel.stage import PADDING, ModelStage, StepScale
from tests.model.tiny import tiny

CPU = torch.device("cpu")
MICROBATCHES, SEQUENCES, LENGTH = 3, 2, 6
SCALE = StepScale(MICROBATCHES * SEQUENCES * LENGTH, MICROBATCHES * SEQUENCES)
VARIANTS = {
    "tiny": {},
    "all MoE": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 3},
    "no shared expert": {"n_shared_experts": 0},
    "no query latent": {"q_lora_rank": None},
    "raw gate values": {"norm_topk_prob": False},
    "multi-token prediction": {"num_nextn_predict_layers": 1},
}


def batch(config: ModelConfig, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, LENGTH + 1)
    return {m: torch.randint(0, config.vocab_size, shape, generator=generator) for m in range(MICROBATCHES)}


def staged(
    config: ModelConfig, cuts: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> tuple[list[ModelStage], dict[str, Tensor]]:
    """The model as stages that end before the layers ``cuts``, and its gradient buffers by name: one for copies too."""
    ends = [*cuts, config.num_hidden_layers]
    stages: list[ModelStage] = []
    buffers: dict[str, Tensor] = {}
    for first, last in zip([0, *cuts], ends, strict=True):
        model = Transformer(config, range(first, last))
        initialise(model, 1)
        model.to(dtype)
        here = {name: buffers.get(name, torch.zeros(p.shape)) for name, p in model.named_parameters()}
        gradients = WeightGradients({p: here[name] for name, p in model.named_parameters()})
        own(model, gradients)
        stages.append(ModelStage(model, gradients, LocalExchange(config.n_routed_experts), CPU))
        buffers |= here
    return stages, buffers


def forward(stages: list[ModelStage], m: int) -> None:
    x = None
    for number, stage in enumerate(stages):
        x = stage.forward(Work(number, m), x)
    assert x is None


def backward_input(stages: list[ModelStage], m: int) -> None:
    gradient = None
    for number, stage in reversed(list(enumerate(stages))):
        gradient = stage.backward_input(Work(number, m), gradient)
    assert gradient is None


def train(stages: list[ModelStage], tokens: dict[int, Tensor], deferred: bool) -> None:
    for stage in stages:
        stage.begin(tokens, SCALE, training=True)
    if not deferred:
        for m in tokens:
            forward(stages, m)
            gradient = None
            for number, stage in reversed(list(enumerate(stages))):
                gradient = stage.backward(Work(number, m), gradient)
                stage.free(Work(number, m))
        return
    # All forwards, then the inputs' gradients from the last micro-batch to the first, then the weights' in any order.
    for m in tokens:
        forward(stages, m)
    for m in reversed(tokens):
        backward_input(stages, m)
    for m in (1, 0, 2):
        for number, stage in enumerate(stages):
            stage.backward_weight(Work(number, m))
            stage.free(Work(number, m))


def reference(
    config: ModelConfig, tokens: dict[int, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[float, float, dict[str, Tensor]]:
    """(cross-entropy, balance, gradients) of the plain model under plain autograd."""
    model = Transformer(config)
    initialise(model, 1)
    model.to(dtype)
    cross_entropy = balance = 0.0
    for batch in tokens.values():
        sums = model(batch[:, :-1], batch[:, 1:])
        loss = (sums.cross_entropy + config.mtp_loss_weight * sums.mtp) / SCALE.tokens
        (loss + config.balance_loss_alpha * sums.balance / SCALE.sequences).backward()
        cross_entropy += sums.cross_entropy.item()
        balance += sums.balance.item()
    return cross_entropy, balance, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("deferred,cuts", [(False, ()), (True, (1, 2))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_are_the_plain_model(variant: str, deferred: bool, cuts: tuple[int, ...]) -> None:
    config = tiny(**VARIANTS[variant])
    tokens = batch(config)
    stages, buffers = staged(config, cuts)
    train(stages, tokens, deferred)
    cross_entropy, balance, gradients = reference(config, tokens)
    assert sum(s.cross_entropy.item() for s in stages) == pytest.approx(cross_entropy, rel=1e-6)
    assert sum(s.balance.item() for s in stages) == pytest.approx(balance, rel=1e-6)
    assert buffers.keys() == gradients.keys()
    for name, want in gradients.items():
        torch.testing.assert_close(
            buffers[name], want, rtol=0, atol=1e-5 * want.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
        assert buffers[name].grad_fn is None
    for stage in stages:
        assert all(p.grad is None for p in stage.model.parameters())


def test_a_step_may_have_a_weight_of_its_own_for_the_loss_of_multi_token_prediction() -> None:
    tokens, found = batch(tiny()), []
    for weight, scale in ((0.7, SCALE), (0.3, replace(SCALE, mtp_loss_weight=0.7)), (0.3, SCALE)):
        (stage,), buffers = staged(tiny(num_nextn_predict_layers=1, mtp_loss_weight=weight))
        stage.begin(tokens, scale, training=True)
        forward([stage], 0)
        stage.backward(Work(0, 0), None)
        found.append(buffers["mtp.eh_proj.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_no_weight_gradient_of_a_linear_layer_before_w() -> None:
    config = tiny()
    stages, buffers = staged(config)
    stages[0].begin(batch(config), SCALE, training=True)
    forward(stages, 0)
    backward_input(stages, 0)
    early = {name for name, buffer in buffers.items() if buffer.any()}
    assert early == {"embed.weight"} | {name for name in buffers if name.rsplit(".", 2)[-2].endswith("norm")}
    stages[0].backward_weight(Work(0, 0))
    assert all(buffer.any() for buffer in buffers.values())


def test_bf16_stages_are_no_further_from_fp32_than_plain_bf16() -> None:
    # All experts are chosen, so that a rounded score cannot change the routing.
    config = tiny(num_experts_per_tok=8, n_group=1, topk_group=1)
    tokens = batch(config)
    stages, buffers = staged(config, (2,), torch.bfloat16)
    train(stages, tokens, deferred=True)
    exact_loss, _, exact = reference(config, tokens)
    plain_loss, _, plain = reference(config, tokens, torch.bfloat16)
    got_loss = sum(s.cross_entropy.item() for s in stages)
    assert abs(got_loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 2.0**-8 * exact_loss

    def distance(found: dict[str, Tensor]) -> float:
        return sum((found[n].float() - exact[n]).square().sum().item() for n in exact) ** 0.5

    assert distance(buffers) <= 1.2 * distance(plain)


def test_loads_count_the_tokens_of_every_expert() -> None:
    config = tiny()
    tokens = batch(config)
    stages, _ = staged(config, (2,))
    model = Transformer(config)
    initialise(model, 1)
    want = {layer: torch.zeros(config.n_routed_experts, dtype=torch.int64) for layer in (1, 2)}

    def count(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, routing: Routing) -> None:
            want[layer] += torch.bincount(routing.indices_TK.flatten(), minlength=config.n_routed_experts)

        return hook

    for layer, block in model.blocks():
        if block.router is not None:
            block.router.register_forward_hook(count(layer))
    for batch_tokens in tokens.values():
        model(batch_tokens[:, :-1], batch_tokens[:, 1:])
    for _ in range(2):  # the second step counts from zero again
        train(stages, tokens, deferred=False)
        loads = stages[0].loads | stages[1].loads
        assert {layer: load.tolist() for layer, load in loads.items()} == {k: v.tolist() for k, v in want.items()}


def test_evaluation_gives_the_loss_and_counts_no_padding() -> None:
    config = tiny(num_nextn_predict_layers=1)
    tokens = batch(config)
    cross_entropy, _, _ = reference(config, tokens)
    tokens[MICROBATCHES] = torch.full((SEQUENCES, LENGTH + 1), PADDING)
    stages, buffers = staged(config, (1,))
    for stage in stages:
        stage.begin(tokens, StepScale(1, 1), training=False)
    for m in tokens:
        x = stages[0].forward(Work(0, m), None)
        assert x is not None and not x.requires_grad
        stages[1].forward(Work(1, m), x)
    assert stages[1].cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-6)
    assert not any(buffer.any() for buffer in buffers.values())


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_pair_is_bitwise_a_forward_and_then_a_backward(cuts: tuple[int, ...], precision: str) -> None:
    config = tiny(num_hidden_layers=4, num_nextn_predict_layers=1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tokens = batch(config)

    def run(paired: bool) -> tuple[list[Tensor], list[float], dict[int, list[int]]]:
        """Forward of micro-batch 1 in each stage together with the backward of micro-batch 0 in every other one."""
        stages, buffers = staged(config, cuts, dtype)
        for stage in stages:
            if precision == "fp8":
                set_precision(stage.model, Emulated())
            stage.begin(tokens, SCALE, training=True)
        forward(stages, 0)
        x: Tensor | None = None
        gradient: Tensor | None = None
        found = []
        for number, stage in enumerate(stages):
            # The head comes first: the pair brings the last stage's backward together with the first one's forward.
            other = len(stages) - 1 - number
            here, there = Work(number, 1), Work(other, 0)
            if paired:
                x, gradient = stage.overlapped(here, x, stages[other], there, gradient)
            else:
                x = stage.forward(here, x)
                gradient = stages[other].backward(there, gradient)
            stages[other].free(there)
            found += [t.clone() for t in (x, gradient) if t is not None]
        backward_input(stages, 1)
        for number, stage in enumerate(stages):
            stage.backward_weight(Work(number, 1))
        sums = [total.item() for s in stages for total in (s.cross_entropy, s.balance, s.mtp)]
        loads = {layer: load.tolist() for stage in stages for layer, load in stage.loads.items()}
        return [*found, *buffers.values()], sums, loads

    tensors, sums, loads = run(paired=True)
    tensors_alone, sums_alone, loads_alone = run(paired=False)
    assert len(tensors) == len(tensors_alone)
    assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_alone, strict=True))
    assert sums == sums_alone and loads == loads_alone


class Recording(LocalExchange):
    """Writes down when a collective starts and when it is waited for."""

    def __init__(self, experts: int, log: list[str]) -> None:
        super().__init__(experts)
        self.log = log

    def _recorded(self, name: str, pending: Pending[Any]) -> Pending[Any]:
        self.log.append(f"start {name}")

        def finish() -> Any:
            self.log.append(f"wait {name}")
            return pending.wait()

        return Pending(finish)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Pending[Dispatched]:
        return self._recorded("dispatch(F)", super().dispatch(x_TD, weights_TK, indices_TK))

    def combine(self, y_RD: Tensor, layout: Any) -> Pending[Tensor]:
        return self._recorded("combine(F)", super().combine(y_RD, layout))

    def dispatch_gradient(self, gz_TD: Tensor, layout: Any) -> Pending[Tensor]:
        return self._recorded("combine(B)", super().dispatch_gradient(gz_TD, layout))

    def combine_gradient(self, grows_RD: Tensor, gweights_R: Tensor, layout: Any) -> Pending[tuple[Tensor, Tensor]]:
        return self._recorded("dispatch(B)", super().combine_gradient(grows_RD, gweights_R, layout))


def test_in_a_pair_every_collective_flies_while_the_other_half_computes() -> None:
    config = tiny(num_hidden_layers=1, first_k_dense_replace=0)
    stages, _ = staged(config)
    (stage,) = stages
    log: list[str] = []
    stage.exchange = Recording(config.n_routed_experts, log)
    stage.begin(batch(config), SCALE, training=True)
    forward(stages, 0)
    (_, block), *_ = stage.model.blocks()
    assert block.experts is not None
    block.attn.register_forward_hook(lambda *_: log.append("attn(F)"))
    block.experts.register_forward_hook(lambda *_: log.append("mlp(F)"))
    apply = stage.gradients.apply
    stage.gradients.apply = lambda deferred: (log.append("weights(B)"), apply(deferred))[1]  # type: ignore[method-assign]
    log.clear()
    stage.overlapped(Work(0, 1), None, stage, Work(0, 0), None)
    assert log == [
        "weights(B)",  # of the head
        "start combine(B)",
        "attn(F)",
        "start dispatch(F)",
        "wait combine(B)",
        "start dispatch(B)",
        "weights(B)",  # of the experts
        "wait dispatch(F)",
        "mlp(F)",
        "start combine(F)",
        "wait dispatch(B)",
        "weights(B)",  # of the attention
        "wait combine(F)",
    ]
