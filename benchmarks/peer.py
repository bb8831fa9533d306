"""Our training step against Hugging Face transformers' DeepseekV3ForCausalLM, in turns.

    python -m benchmarks.peer [--precision bf16 fp32] [--hidden 256] [--layers 8] [--json]

Both sides train the same architecture at the same sizes on the same micro-batches, with the same threads and the same
allocator settings, optimizer step and clipping included. Ours is the ``Worker`` of a 1 x 1 x 1 layout: FP32 master
weights and FP32 gradients. Theirs is what a transformers user writes: parameters, gradients and moments in the compute
dtype, torch's fused AdamW, ``clip_grad_norm_``; experts and attention in whichever implementation is fastest here. In
BF16 ours therefore does more: it keeps and rounds masters, and adds up gradients in FP32.

Each side has a process of its own, since a CPU's compiled BF16 products have one cache in a process, which theirs, of a
new shape for every number of rows of an expert, would keep emptying for ours. One side waits while the other computes,
and the first steps of both do not count.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.measure import Sample, fastest, median, take_turns, timed, top_operators
from benchmarks.transformers_peer import build_peer, peer_loss
from launch.config import Config, load
from launch.rank import keep_memory
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.mesh import Layout
from parallel.worker import Job, Worker

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION = ("sdpa", "eager")
WARM_UP_STEPS = 4
HOPELESS = 2.0
"""A candidate that is this much slower than the best on one sequence is not tried on a whole micro-batch."""


class Ours:
    """A worker that is the whole world."""

    def __init__(self, job: Job, tokens: Tensor) -> None:
        self.tokens, self.rate = tokens, job.optimizer.learning_rate
        self.worker = Worker(job, rank=0)

    @property
    def model(self) -> Transformer:
        (held,) = self.worker.held.values()
        return held.stage.model

    def step(self) -> float:
        """The mean cross-entropy of the step, before its update."""
        return self.worker.train_step(self.tokens, self.rate).cross_entropy


class Theirs:
    """Gradient accumulation over the micro-batches, then clip and update: a plain loop, as their users write it."""

    def __init__(self, model: nn.Module, job: Job, tokens: Tensor) -> None:
        self.model, self.job, self.tokens = model, job, tokens
        c = job.optimizer
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=c.learning_rate,
            betas=(c.beta1, c.beta2),
            eps=c.epsilon,
            fused=True,
        )

    def step(self) -> float:
        """The mean cross-entropy of the step, before its update."""
        total = 0.0
        target_tokens = self.tokens[:, 1:].numel()
        for part in self.tokens.split(self.job.micro_batch_size):
            loss = peer_loss(self.model, part, target_tokens)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.job.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


class Side:
    """One side in a process of its own: theirs in the implementations ``chosen``, ours without. It ends with the
    context."""

    def __init__(self, job: Job, tokens: Tensor, threads: int, chosen: "Trial | None" = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, job, tokens, threads, chosen), daemon=True)

    def __enter__(self) -> "Side":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def ask(self, what: str) -> Any:
        """Take a step -> its ``loss``, its ``sample`` of seconds or its top ``operators``; or the number of
        ``parameters``. Raises EOFError when the process is gone, which has said why."""
        self._pipe.send(what)
        return self._pipe.recv()


def _serve(pipe: Connection, job: Job, tokens: Tensor, threads: int, chosen: "Trial | None") -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    keep_memory()
    ours = Ours(job, tokens)
    side: Ours | Theirs = ours
    if chosen is not None:
        side = Theirs(build_peer(ours.model, job.dtype, chosen.attention, chosen.experts), job, tokens)
    answers: dict[str, Callable[[], Any]] = {
        "loss": side.step,
        "sample": lambda: timed(side.step),
        "operators": lambda: top_operators(side.step),
        "parameters": lambda: sum(p.numel() for p in side.model.parameters()),
    }
    while True:
        pipe.send(answers[pipe.recv()]())


@dataclass(frozen=True)
class Trial:
    """A candidate implementation of theirs: CPU seconds of a forward and backward on one sequence and on one whole
    micro-batch, or why there is no figure."""

    attention: str
    experts: str
    sequence_s: float | None = None
    micro_batch_s: float | None = None
    refused: str | None = None


def try_implementations(ours: Transformer, job: Job, tokens: Tensor) -> list[Trial]:
    """Every pair of implementations that transformers accepts by name, fastest first; those that do not run here last.

    First on one sequence, for some need gigabytes for it, then the promising ones on a micro-batch.
    """
    model = build_peer(ours, job.dtype)
    micro_batch = tokens[: job.micro_batch_size]
    able: dict[tuple[str, str], Trial] = {}
    unable: list[Trial] = []
    for attention in ATTENTION:
        for experts in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())):
            try:
                with _implementations(model, attention, experts):
                    seconds = _pass_seconds(model, tokens[:1])
            except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
                unable.append(Trial(attention, experts, refused=str(error).splitlines()[0][:80]))
            else:
                able[attention, experts] = Trial(attention, experts, seconds)
    best = min(t.sequence_s for t in able.values() if t.sequence_s is not None)
    for key, trial in able.items():
        if trial.sequence_s is not None and trial.sequence_s <= HOPELESS * best:
            with _implementations(model, *key):
                able[key] = replace(trial, micro_batch_s=_pass_seconds(model, micro_batch))
    ranked = sorted(able.values(), key=lambda t: (t.micro_batch_s is None, t.micro_batch_s or t.sequence_s))
    return ranked + unable


@contextmanager
def _implementations(model: nn.Module, attention: str, experts: str) -> Iterator[None]:
    """Their own switches, and no gradient left behind."""
    switch: Any = model
    switch.set_attn_implementation(attention)
    switch.set_experts_implementation(experts)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def _pass_seconds(model: nn.Module, tokens: Tensor, repeats: int = 3) -> float:
    def forward_backward() -> None:
        peer_loss(model, tokens, tokens[:, 1:].numel()).backward()

    forward_backward()
    return fastest(take_turns({"pass": forward_backward}, repeats)["pass"])


def loss_difference(ours: Transformer, job: Job, tokens: Tensor) -> float:
    """How far their loss on one micro-batch is from ours, relative, with the weights of ours in FP32: whether the two
    compute the same thing."""
    reference = Transformer(job.model)
    reference.load_state_dict(ours.state_dict())
    theirs = build_peer(reference, torch.float32)
    part = tokens[: job.micro_batch_size]
    with torch.no_grad():
        our_loss = reference(part[:, :-1], part[:, 1:]).cross_entropy.item() / part[:, 1:].numel()
        their_loss = peer_loss(theirs, part, part[:, 1:].numel()).item()
    return abs(our_loss - their_loss) / their_loss


def compare(job: Job, steps: int, threads: int, profile: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """One precision: choose their implementation, check, run in turns."""
    generator = torch.Generator().manual_seed(job.seed)
    shape = (job.global_batch_size, job.sequence_length + 1)
    tokens = torch.randint(0, job.model.vocab_size, shape, generator=generator)
    model = Ours(job, tokens).model
    difference = loss_difference(model, job, tokens)
    trials = try_implementations(model, job, tokens)
    chosen = trials[0]
    with Side(job, tokens, threads) as ours, Side(job, tokens, threads, chosen) as theirs:
        contestants = {"ours": ours, "transformers": theirs}
        first_losses = {name: side.ask("loss") for name, side in contestants.items()}
        for side in contestants.values():
            for _ in range(WARM_UP_STEPS - 1):
                side.ask("loss")
        samples: dict[str, list[Sample]] = {name: [] for name in contestants}
        for turn in range(steps):
            for name in contestants if turn % 2 == 0 else reversed(contestants):
                samples[name].append(contestants[name].ask("sample"))
        for name, side in contestants.items() if profile else ():
            say(f"{name}: one step by operator\n{side.ask('operators')}")
        parameters = {name: side.ask("parameters") for name, side in contestants.items()}
    medians = {name: median(of) for name, of in samples.items()}
    tokens_a_step = job.global_batch_size * job.sequence_length
    return {
        "precision": next(name for name, dtype in DTYPES.items() if dtype == job.dtype),
        "parameters": parameters,
        "fp32_loss_difference": difference,
        "first_loss": first_losses,
        "trials": [vars(t) for t in trials],
        "attention": chosen.attention,
        "experts": chosen.experts,
        "tokens_a_step": tokens_a_step,
        "step_s": {name: m.wall_s for name, m in medians.items()},
        "step_cpu_s": {name: m.cpu_s for name, m in medians.items()},
        "tokens_per_second": {name: tokens_a_step / m.wall_s for name, m in medians.items()},
        "speedup": medians["transformers"].wall_s / medians["ours"].wall_s,
        "speedup_cpu": medians["transformers"].cpu_s / medians["ours"].cpu_s,
        "spread": {name: _spread([s.wall_s for s in of]) for name, of in samples.items()},
    }


def _spread(values: list[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def widened(config: ModelConfig, hidden: int, layers: int) -> ModelConfig:
    """``config`` with every width and the number of heads scaled to ``hidden``. Raises ValueError naming the option."""
    wide = ["intermediate_size", "moe_intermediate_size", "num_attention_heads", "kv_lora_rank"]
    wide += ["q_lora_rank"] if config.q_lora_rank is not None else []
    scaled = {key: getattr(config, key) * hidden / config.hidden_size for key in wide}
    if hidden < 1 or any(value != int(value) for value in scaled.values()):
        raise ValueError(f"--hidden={hidden} must scale every width of hidden_size {config.hidden_size} to a whole one")
    values: dict[str, Any] = {key: int(value) for key, value in scaled.items()}
    return replace(config, hidden_size=hidden, num_hidden_layers=layers, **values)


def print_result(console: Console, job: Job, result: dict[str, Any], threads: int) -> None:
    precision = result["precision"]
    trials = Table(title=f"transformers' implementations, {precision}: CPU seconds of forward + backward")
    for column in ("attention", "experts", "one sequence", "one micro-batch"):
        trials.add_column(column, justify="right" if column.startswith("one") else "left")
    for t in result["trials"]:
        figures = [f"{s:.3f}" if s is not None else "-" for s in (t["sequence_s"], t["micro_batch_s"])]
        trials.add_row(t["attention"], t["experts"], *([t["refused"], ""] if t["refused"] else figures))
    console.print(trials)

    table = Table(title=f"training step, {precision}, {threads} thread(s), {result['tokens_a_step']} tokens")
    for column in ("", "parameters", "first loss", "step s", "± IQR/2", "CPU s", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("ours", "transformers"):
        table.add_row(
            name if name == "ours" else f"{name} ({result['attention']}, {result['experts']})",
            f"{result['parameters'][name]:,}",
            f"{result['first_loss'][name]:.5f}",
            f"{result['step_s'][name]:.3f}",
            f"{100 * result['spread'][name]:.0f} %",
            f"{result['step_cpu_s'][name]:.3f}",
            f"{result['tokens_per_second'][name]:,.0f}",
        )
    console.print(table)
    console.print(
        f"ours / transformers, tokens/s: {result['speedup']:.2f}x by wall clock, {result['speedup_cpu']:.2f}x by CPU "
        f"time; FP32 loss differs by {result['fp32_loss_difference']:.1e} relative"
    )
    if job.dtype == torch.bfloat16:
        console.print(
            "ours keeps FP32 masters, FP32 gradients and FP32 moments; transformers has parameters, gradients and "
            "moments in BF16"
        )


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    config = load(CONFIG)
    try:
        model = widened(config.model, options.hidden, options.layers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    keep_memory()
    console = Console(stderr=options.json, width=110)
    results = []
    for precision in options.precision:
        job = Job(
            model=model,
            layout=Layout(),
            schedule="dualpipe",
            dtype=DTYPES[precision],
            device=torch.device("cpu"),
            seed=config.train.seed,
            sequence_length=options.sequence,
            global_batch_size=options.micro_batch * options.micro_batches,
            micro_batch_size=options.micro_batch,
            optimizer=config.optimizer,
        )
        results.append(compare(job, options.steps, options.threads, options.profile, console.print))
        print_result(console, job, results[-1], options.threads)
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"threads": options.threads, "versions": versions, "results": results}))
    return 0


def _micro_batches(config: Config) -> int:
    return config.train.global_batch_size // config.train.micro_batch_size


def _options(arguments: list[str] | None) -> argparse.Namespace:
    config = load(CONFIG)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES), help="which to compare in")
    parser.add_argument("--hidden", type=int, default=config.model.hidden_size, help="scales every width of the model")
    parser.add_argument("--layers", type=int, default=config.model.num_hidden_layers)
    parser.add_argument("--sequence", type=int, default=config.train.sequence_length, help="tokens")
    parser.add_argument("--micro-batch", type=int, default=config.train.micro_batch_size, help="sequences")
    parser.add_argument("--micro-batches", type=int, default=_micro_batches(config), help="accumulated in a step")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each, at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the top operators of one step of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the tables go to stderr")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
