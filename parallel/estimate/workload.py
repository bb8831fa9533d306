"""What is to be trained and how: the part of a configuration that decides costs, and the routing it leads to."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np

from model.config import ModelConfig, Recompute, Recomputed
from parallel.mesh import Layout

Precision = Literal["fp8", "bf16", "fp32"]

PRECISIONS: tuple[Precision, ...] = ("fp8", "bf16", "fp32")
SELECTIVE: Recompute = get_args(Recomputed)
"""As DeepSeek-V3 trained (report, 3.2.3 and 3.3.3)."""


def recomputes(precision: Precision) -> tuple[Recompute, ...]:
    """Every ``model.recompute`` that keeps or takes something else. FP8 layers make SwiGLU's output again anyway."""
    members = [name for name in get_args(Recomputed) if (name, precision) != ("swiglu", "fp8")]
    some = (names for count in range(len(members) + 1) for names in combinations(members, count))
    return *some, "full"


def spell(recompute: Recompute) -> str:
    """``model.recompute`` in one word."""
    return recompute if isinstance(recompute, str) else "+".join(recompute) or "none"


def recompute_of(text: str) -> Recompute:
    """The inverse of ``spell``. Raises ValueError for another word."""
    known = get_args(Recomputed)
    if text in ("none", "full"):
        return "full" if text == "full" else ()
    names = text.split("+")
    if set(names) <= set(known):
        if len(set(names)) < len(names):
            raise ValueError(f"recompute={text} must name nothing twice")
        return tuple(name for name in known if name in names)
    raise ValueError(f"recompute={text} must be none, full, or some of {'+'.join(known)} with + between them")


@dataclass(frozen=True)
class Workload:
    """Sizes in sequences and tokens. Raises ValueError, naming the key, for what cannot be."""

    model: ModelConfig
    layout: Layout
    schedule: str
    sequence_length: int
    micro_batch_size: int
    microbatches: int
    """Of one replica in one step, both directions together."""
    precision: Precision
    """Of the products of linear layers; head and router are BF16 where this is FP8."""
    moment_bytes: int
    """Of one of the optimizer's two moments, a parameter."""
    chunks: int | None = None
    """Stages of a rank, where the schedule leaves them open; None: as many as it has by itself."""
    hierarchical: bool = True
    """Whether a token crosses once to each node and is passed on there, instead of once to each rank."""
    fp8_payload: bool = True
    """Whether what is dispatched travels in FP8, where products are FP8."""
    mtp: int = 0
    """Multi-token-prediction modules behind the last layer: a projection, an MoE layer and a pass of the head."""
    imbalance: float = 1.0
    """Rows of the busiest expert-parallel rank over the mean: everybody waits for it."""
    context_length: int = 0
    """Tokens that attend to each other, where that is more than a sequence of a micro-batch; 0: it is not."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision} must be {' or '.join(PRECISIONS)}")
        if self.mtp not in (0, 1):
            raise ValueError(f"mtp={self.mtp} must be 0 or 1")
        if not 1 <= self.imbalance <= self.layout.expert:
            raise ValueError(f"imbalance={self.imbalance:g} must be from 1 to layout.expert ({self.layout.expert})")

    def recomputing(self, recompute: Recompute) -> "Workload":
        """The same under another ``model.recompute``."""
        return replace(self, model=replace(self.model, recompute=recompute))

    def makes_again(self, what: Recomputed) -> bool:
        """By itself: under ``full``, whole phases run again besides."""
        return what in self.model.recompute or (what == "swiglu" and self.precision == "fp8")

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def attended(self) -> int:
        return self.context_length or self.sequence_length

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.microbatches * self.layout.data

    @property
    def activation_width(self) -> int:
        """Bytes of a number of the residual stream."""
        return 4 if self.precision == "fp32" else 2

    def routes(self, ranks_per_node: int) -> "Routes":
        c, expert = self.model, self.layout.expert
        sizes = (c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group)
        return routes(*sizes, expert, min(ranks_per_node, expert))


class Routes(NamedTuple):
    """How far a token travels, on average, in an expert-parallel group of some nodes."""

    nodes: float  # distinct nodes that own one of its experts
    ranks: float  # distinct ranks that do
    remote_nodes: float  # those nodes that are not its own
    remote_ranks: float  # those ranks that are on other nodes


@cache
def routes(experts: int, top_k: int, groups: int, top_groups: int, ranks: int, ranks_per_node: int) -> Routes:
    """For independent uniform scores, which is what balanced experts look like from one token: the router's rule
    (best groups by the sum of their two best scores, then the best experts inside them) on 4096 drawn tokens."""
    tokens = 4096
    scores_TE = np.random.default_rng(0).random((tokens, experts))
    grouped_TGE = scores_TE.reshape(tokens, groups, -1)
    group_TG = np.sort(grouped_TGE, axis=2)[:, :, -2:].sum(axis=2)
    chosen_TG = np.argsort(group_TG, axis=1)[:, -top_groups:]
    allowed_TG = np.zeros((tokens, groups), dtype=bool)
    np.put_along_axis(allowed_TG, chosen_TG, True, axis=1)
    masked_TE = np.where(np.repeat(allowed_TG, experts // groups, axis=1), scores_TE, -1.0)
    indices_TK = np.argsort(masked_TE, axis=1)[:, -top_k:]
    rank_TK = indices_TK // (experts // ranks)
    nodes = -(-ranks // ranks_per_node)
    distinct_nodes, distinct_ranks = _distinct(rank_TK // ranks_per_node, nodes), _distinct(rank_TK, ranks)
    return Routes(
        distinct_nodes, distinct_ranks, *(each * (1 - 1 / nodes) for each in (distinct_nodes, distinct_ranks))
    )


def _distinct(place_TK: np.ndarray, places: int) -> float:
    """The mean number of different values in a row."""
    seen_TP = np.zeros((len(place_TK), places), dtype=bool)
    np.put_along_axis(seen_TP, place_TK, True, axis=1)
    return float(seen_TP.sum(axis=1).mean())
