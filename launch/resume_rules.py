"""What a run may change between two starts, and what would make it another run."""

from collections.abc import Iterator, Mapping
from typing import Any

from launch.config import Config, show, to_dict
from launch.yaml_strict import dump_yaml

_BATCH_SIZES = ("train.global_batch_size", "phases.global_batch_size", "phases.batch_multiple")
_FREE = ("model.recompute",)  # the same bits either way
_FIXED = ("train.seed", "train.sequence_length", "data.validation_fraction", "data.fill_in_middle")
_ANOTHER_RUN = "'dualpipe export' and 'dualpipe import' begin another run with its weights"


def resume_differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """What a resumed run would change: (refused, recorded), each line 'KEY: run has OLD, given NEW'.

    What decides the meaning of a checkpoint (the model, the seed, how the data are cut) must stay, and so must the
    precision in which its steps were taken; what of the model is recomputed, the layout, the length of the run, the
    optimizer's constants and the rest may change between two starts. So may the name under which the data are found:
    whether they are the same is for their fingerprint to say.

    Where phases count tokens, the sizes of batches must stay: how many tokens the steps so far took is computed from
    them. For the same reason phases cannot begin to count tokens in a run whose sizes could change until now.
    """
    refused: list[str] = []
    recorded: list[str] = []
    new_values = dict(_flatten(to_dict(new)))
    counted = bool(old.phases.in_tokens)
    begins = () if counted else [f"phases.{name}" for name in new.phases.in_tokens]
    for key, value in _flatten(to_dict(old)):
        if value != new_values[key]:
            fixed = key in _FIXED or (key.startswith("model.") and key not in _FREE)
            line = f"{key}: run has {_typed(value)}, given {_typed(new_values[key])}"
            if key in _BATCH_SIZES and counted:
                fixed, line = True, f"{line}, which must stay: phases count the tokens of past steps"
            elif key == "precision.compute":
                fixed, line = True, f"{line}, which must stay: {_ANOTHER_RUN}"
            elif key in begins:
                fixed, line = True, f"{line}, which must not count tokens: the run did not from its beginning"
            (refused if fixed else recorded).append(line)
    return refused, recorded


def _typed(value: Any) -> str:
    """A value as an override has it; lists of mappings too."""
    if not isinstance(value, (tuple, list)):
        return show(value)
    return dump_yaml(value, one_line=True).strip()


def _flatten(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for section, part in values.items():
        for leaf, value in part.items():
            yield f"{section}.{leaf}", value
