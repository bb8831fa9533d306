"""The configuration of a run: one YAML file -> frozen dataclasses, then ``key.sub=value`` overrides.

Everything that can be known to be wrong before the first rank starts is refused here, in one line that names the key,
its value and the rule. A ``Config`` that exists is one that can run, up to the machine: ``check_world_size`` compares
it with the ranks there are, and ``resume_differences`` with the run that a folder already holds.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dualpipe import schedules
from launch.yaml_strict import DuplicateKeyError, dump_yaml, load_yaml
from model.config import ModelConfig
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig


class ConfigError(ValueError):
    """The configuration breaks a rule; the message is one line with the key, the value and the rule."""


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "dualpipe"
    """Order of the pipeline's work; see dualpipe/schedules."""


@dataclass(frozen=True)
class PrecisionConfig:
    compute: Literal["fp32", "bf16"] = "bf16"
    """Type of activations and of the weights in matrix products. Masters and gradients are FP32 either way."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    sequence_length: int
    """Tokens of one sequence that are inputs; each has the next token as its target."""
    global_batch_size: int
    """Sequences a step, over all ranks, whatever the layout."""
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
            _check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "must be at least 1")
        for key in ("seed", "threads", "validate_every"):
            _check(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "must not be negative")
        _check(self.seed < 2**63, "train.seed", self.seed, "must be below 2**63")
        _check(self.timeout_seconds > 0, "train.timeout_seconds", self.timeout_seconds, "must be above 0")


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """``stdlib`` (the running Python's own library), or a file, folder or glob of .txt and .jsonl files."""
    validation_fraction: float = 0.05
    """Share of the documents that is kept out of training."""
    validation_sequences: int = 64
    """Sequences of the validation split that are scored; 0 scores none."""

    def __post_init__(self) -> None:
        _check(self.source.strip() != "", "data.source", self.source, "must be 'stdlib', a path or a glob")
        inside = 0 < self.validation_fraction < 1
        _check(inside, "data.validation_fraction", self.validation_fraction, "must be above 0 and below 1")
        count = self.validation_sequences
        _check(count >= 0, "data.validation_sequences", count, "must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Newest complete checkpoints that are kept."""

    def __post_init__(self) -> None:
        _check(self.every >= 0, "checkpoint.every", self.every, "must not be negative")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    dir: str
    """The run's folder; training goes on from its newest complete checkpoint when it already holds a run."""

    def __post_init__(self) -> None:
        _check(self.dir.strip() != "" and "\0" not in self.dir, "run.dir", self.dir, "must be a path")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Raises ConfigError when the parts do not fit together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: Layout = field(default_factory=Layout)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        _cross_check(self)

    @property
    def microbatches(self) -> int:
        """Micro-batches of one replica in one step, all directions of the pipeline together."""
        return self.train.global_batch_size // (self.layout.data * self.train.micro_batch_size)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with ``key.sub=value`` overrides applied in order."""
    values = _read(Path(path))
    for override in overrides:
        _apply(values, override)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from nested mappings, as a YAML file gives them."""
    try:
        return _build(Config, values, "")
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


def resume_differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """What a resumed run would change: (refused, recorded), each line 'KEY: run has OLD, given NEW'.

    What decides the meaning of a checkpoint (the model, the seed, the data and how they are cut) must stay; the
    layout, the length of the run, the optimizer's constants and the rest may change between two starts.
    """
    refused: list[str] = []
    recorded: list[str] = []
    new_values = dict(_flatten(to_dict(new)))
    for key, value in _flatten(to_dict(old)):
        if value != new_values[key]:
            measures = key == "data.validation_sequences"
            fixed = key.startswith(("model.", "data.")) or key in ("train.seed", "train.sequence_length")
            line = f"{key}: run has {_show(value)}, given {_show(new_values[key])}"
            (refused if fixed and not measures else recorded).append(line)
    return refused, recorded


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
    stages = _stages(config)
    if model.num_hidden_layers < stages:
        raise ConfigError(
            f"model.num_hidden_layers={model.num_hidden_layers} must be at least the number of stages ({stages}), "
            f"so that each of them has a layer"
        )


def _stages(config: Config) -> int:
    """Stages that the schedule cuts the model into; the schedule itself says whether it is possible."""
    try:
        return schedules.generate(config.schedule.name, config.layout.pipeline, config.microbatches).stages
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={_show(value)} {rule}")


def _show(value: object) -> str:
    """A value as YAML would have it, on one line and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {path} must be a readable YAML file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}:{error.line}: {error.key} must appear once; line {error.first} has it too") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections (model:, train:, ...), not {_show(values)}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one key in the file's mapping, creating its section."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"override {override!r} must have the form key.sub=value")
    leaves = _leaf_types()
    if key not in leaves:
        raise _unknown(key)
    section, _, leaf = key.partition(".")
    part = values.get(section)
    if part is None:
        part = values[section] = {}
    if not isinstance(part, dict):
        raise ConfigError(f"{section}={_show(part)} must be a mapping")
    part[leaf] = _parse_override(key, text, leaves[key])


def _parse_override(key: str, text: str, hint: Any) -> Any:
    """The value of an override. Where text is wanted it is taken as it stands: a glob's ``*`` is an alias in YAML."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    try:
        return load_yaml(text)
    except (yaml.YAMLError, DuplicateKeyError):
        raise ConfigError(f"{key}={text!r} must be {_wanted(hint)}") from None


def _leaf_types() -> dict[str, Any]:
    """Every dotted key and the type that it must have."""
    return {
        f"{section}.{leaf}": hint
        for section, part in typing.get_type_hints(Config).items()
        for leaf, hint in typing.get_type_hints(part).items()
    }


def _build(kind: Any, values: object, prefix: str) -> Any:
    """An instance of a dataclass from a mapping; ``prefix`` is the dotted path to it, for messages."""
    if values is None:
        values = {}  # a section whose keys are all commented out
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix or 'configuration'}={_show(values)} must be a mapping")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise _unknown(_join(prefix, str(name)))
    given: dict[str, Any] = {}
    for leaf in fields(kind):
        key, hint = _join(prefix, leaf.name), hints[leaf.name]
        if is_dataclass(hint):
            given[leaf.name] = _build(hint, values.get(leaf.name), key)
        elif leaf.name in values:
            given[leaf.name] = _convert(key, values[leaf.name], hint)
        elif leaf.default is MISSING and leaf.default_factory is MISSING:
            raise ConfigError(f"{key} is missing and must be {_wanted(hint)}")
    return kind(**given)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """The value as the wanted type, or ConfigError. A bool is no number, and a whole number is a float too."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is types.NoneType and value is None:
            return None
        if typing.get_origin(kind) is Literal and isinstance(value, str) and value in typing.get_args(kind):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number):
                return number
        if kind in (int, bool, str) and type(value) is kind:
            return value
    raise ConfigError(f"{key}={_show(value)} must be {_wanted(hint)}")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wanted(hint: Any) -> str:
    """A type in words, as the end of 'must be ...'."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_wanted(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    return words.get(hint, "null")


def _unknown(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    leaves = list(_leaf_types())
    if "." in key:
        choices: Iterable[str] = leaves
    else:
        choices = [section.name for section in fields(Config)]
        if key in choices:
            inside = next(leaf for leaf in leaves if leaf.startswith(f"{key}."))
            return ConfigError(f"{key} is a section; an override sets one of its keys, such as {inside}")
        leaves = [leaf for leaf in leaves if leaf.split(".")[1] == key]
        if leaves:
            return ConfigError(f"{key} is not a key of the configuration; did you mean {' or '.join(leaves)}?")
    nearest = difflib.get_close_matches(key, choices, n=1, cutoff=0.0)
    return ConfigError(f"{key} is not a key of the configuration; the nearest is {nearest[0]}")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _flatten(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for section, part in values.items():
        for leaf, value in part.items():
            yield f"{section}.{leaf}", value
