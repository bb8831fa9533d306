"""From YAML and ``key.sub=value`` overrides to a frozen dataclass of sections, strictly.

A section is a dataclass too, and a key is one of its fields: ``section.leaf``. A field of type ``tuple[X, ...]`` is a
YAML list, where X is a plain type or a dataclass, whose items are mappings then. What has no such field or not its type
is refused in one line that names the key, the value and the rule.
"""

import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.yaml_strict import DuplicateKeyError, load_yaml


class ConfigError(ValueError):
    """The configuration breaks a rule; the message is one line with the key, the value and the rule."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


COUNT_LIMIT = 2**31
"""What a count must be below; the product of two of them is still an index of 64 bits."""
_SHORT = reprlib.Repr()  # also of a value that an alias in the YAML makes endless
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def show(value: object) -> str:
    """A value as YAML would have it, on one line and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _SHORT.repr(value)


def brief(text: str) -> str:
    """A message on one line, without the middle of words that are too long to read."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:48]}...{word[0][-48:]}", line)


def check(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises ConfigError unless the rule ``holds``."""
    if not holds:
        raise ConfigError(f"{key}={show(value)} {rule}")


def check_count(key: str, value: int, least: int = 0, limit: int = COUNT_LIMIT) -> None:
    """Raises ConfigError unless ``value`` is from ``least`` to below ``limit``."""
    check(value >= least, key, value, f"must be at least {least}" if least else "must not be negative")
    check(value < limit, key, value, f"must be below {limit}")


def read(path: Path, what: str = "configuration", holds: str = "sections (model:, train:, ...)") -> dict[str, Any]:
    """The mapping in a YAML file; ``what`` it describes and what it ``holds``, for messages."""
    try:
        if path.exists() and not path.is_file():  # every rank reads it: a pipe would serve one of them
            raise ConfigError(f"{what} {path} must be a regular file")
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{what} {path} must be a readable YAML file: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} must be UTF-8 text: {error.reason} at byte {error.start}") from None
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
        raise ConfigError(f"{path} must hold a mapping of {holds}, not {show(values)}")
    return values


def apply(kind: Any, values: dict[str, Any], override: str) -> None:
    """Set one key in the file's mapping, creating its section."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not (equals and key):
        raise ConfigError(f"override {show(override)} must have the form key.sub=value")
    leaves = _leaf_types(kind)
    if key not in leaves:
        raise _unknown(kind, key)
    section, _, leaf = key.partition(".")
    part = values.get(section)
    if part is None:
        part = values[section] = {}
    if not isinstance(part, dict):
        raise ConfigError(f"{section}={show(part)} must be a mapping")
    part[leaf] = _parse_override(key, text, leaves[key])


def _parse_override(key: str, text: str, hint: Any) -> Any:
    """The value of an override. Where text is wanted it is taken as it stands: a glob's ``*`` is an alias in YAML."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    try:
        return load_yaml(text)
    except (yaml.YAMLError, DuplicateKeyError, RecursionError):
        raise ConfigError(f"{key}={show(text)} must be {_wanted(hint)}") from None


def build(kind: Any, values: object) -> Any:
    """An instance of ``kind`` from nested mappings, as YAML gives them."""
    return _build(kind, kind, values, "")


def _build(root: Any, kind: Any, values: object, prefix: str) -> Any:
    """An instance of a dataclass from a mapping; ``prefix`` is the dotted path from ``root`` to it, for messages."""
    if values is None:
        values = {}  # a section whose keys are all commented out
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix or 'configuration'}={show(values)} must be a mapping")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise _unknown(root, _join(prefix, str(name)))
    given: dict[str, Any] = {}
    for leaf in fields(kind):
        key, hint = _join(prefix, leaf.name), hints[leaf.name]
        if is_dataclass(hint):
            given[leaf.name] = _build(root, hint, values.get(leaf.name), key)
        elif leaf.name in values:
            given[leaf.name] = _convert(key, values[leaf.name], hint)
        elif leaf.default is MISSING and leaf.default_factory is MISSING:
            raise ConfigError(f"{key} is missing and must be {_wanted(hint)}")
    return kind(**given)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """The value as the wanted type, or ConfigError. A bool is no number, and a whole number is a float too."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    for kind in kinds:
        if kind is types.NoneType and value is None:
            return None
        if typing.get_origin(kind) is Literal and isinstance(value, str) and value in typing.get_args(kind):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number):
                return number
        if kind is str and isinstance(value, str) and not _is_unicode(value):
            raise ConfigError(f"{key}={show(value)} must be text in UTF-8")
        if kind in (int, bool, str) and type(value) is kind:
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(kind)[0]
            return tuple(_convert_item(f"{key}[{at}]", part, item) for at, part in enumerate(value))
    raise ConfigError(f"{key}={show(value)} must be {_wanted(hint)}")


def _convert_item(key: str, value: Any, hint: Any) -> Any:
    """An item of a list; a dataclass is made from a mapping, and its own ValueErrors get the key in front."""
    if not is_dataclass(hint):
        return _convert(key, value, hint)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={show(value)} must be {_wanted(hint)}")
    names = [leaf.name for leaf in fields(hint)]
    for name in value:
        if name not in names:
            raise ConfigError(f"{key}.{name} is not a key of it; there are {', '.join(names)}")
    try:
        return _build(hint, hint, value, key)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        return False
    return True


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wanted(hint: Any) -> str:
    """A type in words, as the end of 'must be ...'."""
    if _is_union(hint):
        lists_last = sorted(typing.get_args(hint), key=_is_list)
        between = ", or " if _is_list(lists_last[-1]) else " or "
        return between.join(_wanted(kind) for kind in lists_last)
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if typing.get_origin(item) is Literal:
            return f"a list out of {', '.join(typing.get_args(item))}"
        return f"a list, each item {_wanted(item)}"
    if is_dataclass(hint):
        return f"a mapping of {', '.join(leaf.name for leaf in fields(hint))}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    return words.get(hint, "null")


def _unknown(kind: Any, key: str) -> ConfigError:
    """The error for a key that does not exist, with what was probably meant, or else what there is."""
    sections = {section: list(typing.get_type_hints(part)) for section, part in typing.get_type_hints(kind).items()}
    if key in sections:
        return ConfigError(f"{key} is a section; an override sets one of its keys, such as {key}.{sections[key][0]}")
    section, _, leaf = key.rpartition(".")
    same = [f"{other}.{leaf}" for other, leaves in sections.items() if leaf in leaves]
    if section in sections:
        near = {name: f"{section}.{name}" for name in sections[section]}
    else:
        near = {name: name for name in (_leaf_types(kind) if section else sections)}
    closest = difflib.get_close_matches(leaf if section in sections else key, near, n=1)
    if same:
        hint = f"the nearest is {' or '.join(same)}"
    elif closest:
        hint = f"the nearest is {near[closest[0]]}"
    elif section in sections:
        hint = f"{section} has {', '.join(sections[section])}"
    else:
        hint = f"the sections are {', '.join(sections)}"
    return ConfigError(f"{key} is not a key of the configuration; {hint}")


def _leaf_types(kind: Any) -> dict[str, Any]:
    """Every dotted key and the type that it must have."""
    return {
        f"{section}.{leaf}": hint
        for section, part in typing.get_type_hints(kind).items()
        for leaf, hint in typing.get_type_hints(part).items()
    }


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
