"""The configuration of a run: one YAML file -> frozen dataclasses, then ``key.sub=value`` overrides.

Everything that can be known to be wrong before the first rank starts is refused here, in one line that names the key,
its value and the rule. A ``Config`` that exists is one that can run, up to the machine: ``check_world_size`` compares
it with the ranks there are, ``resume_rules.py`` with the run that a folder already holds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualpipe import schedules
from dualpipe.load import check_training
from dualpipe.load import load as load_program
from dualpipe.program import Program
from launch.config_file import ConfigError, apply, build, check, check_count, read, show
from launch.recovery_config import RecoveryConfig
from launch.yaml_strict import dump_yaml
from model.config import ModelConfig
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.phases import Level, PhasesConfig, RunValues

__all__ = [
    "Config",
    "ConfigError",
    "check_world_size",
    "dump",
    "from_dict",
    "load",
    "show",
    "to_dict",
]

MICROBATCHES_LIMIT = 2**16
"""Micro-batches of a step at most: a rank spells out what it does with each of them."""
WEEK_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "dualpipe"
    """Order of the pipeline's work; see dualpipe/schedules."""
    chunks: int | None = None
    """Stages of a rank, where the schedule leaves them open (interleaved); null takes the schedule's own number."""
    program: str | None = None
    """File with a program to run instead, as ``dualpipe simulate --text`` prints it; see dualpipe/program.py."""


@dataclass(frozen=True)
class DispatchConfig:
    kind: Literal["flat", "hierarchical", "deepep"] = "flat"
    """How a token reaches its experts: once to each of their ranks, or once to each of their nodes and on from it;
    deepep is the latter by DeepSeek's kernels, the package deep_ep on CUDA."""
    payload: Literal["auto", "plain", "fp8"] = "auto"
    """What is dispatched, forward and as a gradient: rows in the type of activations (plain), or in FP8 with a scale
    for every 128 numbers; auto is fp8 where precision.compute is. Combine sends sums, in the type of activations."""


@dataclass(frozen=True)
class PrecisionConfig:
    compute: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Type of activations and of the weights in matrix products; under fp8 the linear layers multiply in FP8 what is
    BF16 between them. Masters and gradients are FP32 in any case. A run keeps it from its beginning to its end."""
    backend: Literal["auto", "reference", "emulated", "scaled_mm", "triton"] = "auto"
    """What multiplies in FP8; auto is the fastest that the device has. See docs/fp8.md."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    sequence_length: int
    """Tokens of one sequence that are inputs; each has the next token as its target."""
    global_batch_size: int
    """Sequences a step, over all ranks, whatever the layout; the most, where phases.global_batch_size has several."""
    micro_batch_size: int = 1
    """Sequences that travel the pipeline together."""
    seed: int = 1
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes CUDA where there is a device."""
    threads: int = 0
    """CPU threads of one rank; 0 divides the machine's cores by the ranks on it."""
    timeout_seconds: float = 600.0
    """Seconds that a collective or a message may take before the run is declared hung."""
    validate_every: int = 0
    """Steps between two validations; 0 validates at the end only."""

    def __post_init__(self) -> None:
        for key in ("steps", "sequence_length", "global_batch_size", "micro_batch_size"):
            check_count(f"train.{key}", getattr(self, key), least=1)
        check_count("train.validate_every", self.validate_every)
        check_count("train.threads", self.threads, limit=1025)
        check_count("train.seed", self.seed, limit=2**63)
        within = 1 <= self.timeout_seconds <= WEEK_SECONDS
        check(within, "train.timeout_seconds", self.timeout_seconds, f"must be from 1 to {WEEK_SECONDS:g}, a week")


@dataclass(frozen=True)
class SourceConfig:
    source: str
    """As ``data.source``."""
    weight: float = 1.0
    """Share of the training sequences, in any unit."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """``stdlib`` (the running Python's own library), a file, folder or glob of .txt, .jsonl and .parquet files, or
    Megatron's .bin and .idx, by what their names begin with. See docs/data.md."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources instead of one, with weights: ``[{source: code, weight: 3}, {source: web, weight: 7}]``."""
    text_field: str = "text"
    """The field of a .jsonl object, and the column of a .parquet file, that holds the text of a document."""
    tokenizer: str = "bytes"
    """``bytes``, or a Hugging Face folder with a tokenizer.json, and a config.json that has its eos_token_id."""
    validation_fraction: float = 0.05
    """Share of each source that is kept out of training."""
    validation_sequences: int = 64
    """Sequences of the validation split that are scored; 0 scores none."""
    skip_batches: tuple[int, ...] = ()
    """Positions in the data, in sequences, of batches to leave out: ``first_sequence`` in metrics and events."""
    document_boundaries: Literal["ignore", "attention"] = "ignore"
    """Sequences are packed from whatever documents come next. ``ignore`` lets attention cross from one to the next, as
    DeepSeek-V3 was trained; ``attention`` keeps it within documents, and positions begin again at each."""
    fill_in_middle: float = 0.0
    """Share of the documents that are shown as prefix, suffix, middle; DeepSeek-V3 has 0.1."""

    def named(self) -> list[tuple[str, SourceConfig]]:
        """Every source, however many there are, and the key that names it."""
        if not self.sources:
            return [("data.source", SourceConfig(self.source))]
        return [(f"data.sources[{at}].source", part) for at, part in enumerate(self.sources)]

    def __post_init__(self) -> None:
        check(self.source.strip() != "", "data.source", self.source, "must be 'stdlib', a path or a glob")
        check(self.tokenizer.strip() != "", "data.tokenizer", self.tokenizer, "must be 'bytes' or a folder")
        inside = 0 < self.validation_fraction < 1
        check(inside, "data.validation_fraction", self.validation_fraction, "must be above 0 and below 1")
        check_count("data.validation_sequences", self.validation_sequences)
        check(self.text_field != "", "data.text_field", self.text_field, "must be the name of a field")
        share = 0 <= self.fill_in_middle <= 1
        check(share, "data.fill_in_middle", self.fill_in_middle, "must be from 0 to 1, a share of the documents")
        for at, position in enumerate(self.skip_batches):
            check_count(f"data.skip_batches[{at}]", position, limit=2**62)
        self._check_sources()

    def _check_sources(self) -> None:
        if self.sources and self.source != "stdlib":
            raise ConfigError(f"data.source={show(self.source)} and data.sources must not both be given")
        total = sum(part.weight for part in self.sources)
        names = [part.source for part in self.sources]
        for at, part in enumerate(self.sources):
            key = f"data.sources[{at}]"
            check(part.source.strip() != "", f"{key}.source", part.source, "must be 'stdlib', a path or a glob")
            check(part.source not in names[:at], f"{key}.source", part.source, "must appear once")
            large = part.weight > 0 and part.weight >= 1e-9 * total
            check(large, f"{key}.weight", part.weight, "must be positive, and a billionth of all weights at least")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Newest complete checkpoints that are kept."""
    asynchronous: bool = True
    """Write while training goes on, from a copy of the rank's shard in host memory; the last one is waited for at the
    end, and one that is under way when the next is due. False saves that memory, and training waits for the disk."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run: end it, or be reported, the one at the end excepted."""

    def __post_init__(self) -> None:
        check_count("checkpoint.every", self.every)
        check_count("checkpoint.keep", self.keep, least=1)


@dataclass(frozen=True)
class RunConfig:
    dir: str
    """The run's folder; training goes on from its newest complete checkpoint when it already holds a run."""
    trace: bool = False
    """Record what every rank executes and when; the last steps before each checkpoint are in trace.json."""

    def __post_init__(self) -> None:
        whole = self.dir.strip() != "" and not re.search(r"[\x00-\x1f\x7f-\x9f]", self.dir)
        check(whole, "run.dir", self.dir, "must be a path, without control characters")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Raises ConfigError when the parts do not fit together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: Layout = field(default_factory=Layout)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        _cross_check(self)

    @property
    def fp8_payload(self) -> bool:
        """Whether dispatch sends FP8."""
        wanted = {"auto": self.precision.compute == "fp8", "plain": False, "fp8": True}
        return wanted[self.dispatch.payload]

    def program(self) -> Program | None:
        """The program of ``schedule.program``, lowered and proven. Raises ProgramError."""
        return None if self.schedule.program is None else load_program(self.schedule.program)

    def values(self) -> RunValues:
        """Batch size, learning rate and what else may change, of every step. Raises ValueError."""
        return RunValues(
            self.phases,
            self.train.steps,
            self.train.sequence_length,
            self.train.global_batch_size,
            self.optimizer,
            self.model.bias_update_speed,
            self.model.mtp_loss_weight,
        )

    @property
    def microbatches(self) -> int:
        """Micro-batches of one replica in the largest step, all directions of the pipeline together."""
        return self.train.global_batch_size // (self.layout.data * self.train.micro_batch_size)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with ``key.sub=value`` overrides applied in order."""
    values = read(Path(path))
    for override in overrides:
        apply(Config, values, override)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from nested mappings, as a YAML file gives them."""
    try:
        return build(Config, values)
    except ConfigError:
        raise
    except ValueError as error:  # the rooms below name their own keys
        raise ConfigError(str(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Every value, defaults included, as nested mappings; ``from_dict`` reads it back."""
    return asdict(config)


def dump(config: Config) -> str:
    """YAML text of every value, defaults included; loading it gives an equal configuration."""
    return dump_yaml(to_dict(config))


def check_world_size(config: Config, world_size: int) -> None:
    """Refuse a number of started ranks that the layout does not use exactly."""
    layout = config.layout
    if world_size != layout.world_size:
        raise ConfigError(
            f"layout.pipeline={layout.pipeline} x layout.data={layout.data} must equal the world size: it needs "
            f"{layout.world_size} ranks, and {world_size} were started"
        )


def _cross_check(config: Config) -> None:
    """The rules that span sections."""
    train, layout, model = config.train, config.layout, config.model
    replica_batch = layout.data * train.micro_batch_size
    if train.global_batch_size % replica_batch:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} must be divisible by layout.data x "
            f"train.micro_batch_size ({layout.data} x {train.micro_batch_size} = {replica_batch})"
        )
    if model.n_routed_experts % layout.expert:
        raise ConfigError(
            f"layout.expert={layout.expert} must divide model.n_routed_experts ({model.n_routed_experts})"
        )
    if config.phases.mtp_loss_weight and not model.num_nextn_predict_layers:
        raise ConfigError(
            f"phases.mtp_loss_weight={show(config.phases.mtp_loss_weight)} must be left out where "
            f"model.num_nextn_predict_layers=0: there is no such loss"
        )
    if config.fp8_payload and config.precision.compute != "fp8":
        raise ConfigError(
            f"dispatch.payload=fp8 needs precision.compute=fp8, whose experts take it; it is {config.precision.compute}"
        )
    try:
        program = config.program()
        for level in config.values().batches.levels[:-1]:
            _check_level(config, level, program)
        _check_microbatches(config, config.microbatches, program)
        stages = _stages(config, program)
        if config.dispatch.kind == "hierarchical" and layout.ranks_per_node:
            layout.check_nodes()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.microbatches > MICROBATCHES_LIMIT:
        raise ConfigError(
            f"the number of micro-batches (train.global_batch_size / (layout.data x train.micro_batch_size)) = "
            f"{config.microbatches} must be at most {MICROBATCHES_LIMIT}"
        )
    if model.num_hidden_layers < stages:
        raise ConfigError(
            f"model.num_hidden_layers={model.num_hidden_layers} must be at least the number of stages ({stages}), "
            f"so that each of them has a layer"
        )


def _check_level(config: Config, level: Level, program: Program | None) -> None:
    """Refuse a batch size that the layout or the schedule does not run. Raises ValueError."""
    replica_batch = config.layout.data * config.train.micro_batch_size
    microbatches, rest = divmod(level.size, replica_batch)
    where = f"phases.global_batch_size gives step {level.step + 1} {level.size} sequences"
    if rest:
        raise ValueError(
            f"{where}, which must be divisible by layout.data x train.micro_batch_size ({replica_batch}): "
            f"see phases.batch_multiple={config.phases.batch_multiple}"
        )
    try:
        _check_microbatches(config, microbatches, program)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_microbatches(config: Config, microbatches: int, program: Program | None) -> None:
    if program is not None:
        check_training(program, config.layout.pipeline, microbatches)
    else:
        schedules.check(config.schedule.name, config.layout.pipeline, microbatches, config.schedule.chunks)


def _stages(config: Config, program: Program | None) -> int:
    """The stages that the schedule cuts the model into."""
    if program is not None:
        return program.stages
    return schedules.stages(config.schedule.name, config.layout.pipeline, config.schedule.chunks)
