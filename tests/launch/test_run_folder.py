"""A folder that holds a run is gone on with only by the same run, and says by name what is wrong with it."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.config import Config, ConfigError, from_dict
from launch.config_file import apply
from launch.resume import open_run
from launch.run_folder import RunFolder
from parallel import checkpoint
from parallel.mesh import Layout
from parallel.phases import Phase, PhasesConfig

PRINT = "0123456789abcdef"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4}
    return from_dict({"train": train, "run": {"dir": str(tmp_path / "run")}})


@pytest.fixture
def folder(config: Config) -> RunFolder:
    """A folder in which the run took a step."""
    folder = RunFolder(config)
    folder.open(config, PRINT).close()
    folder.metrics_file.write_text('{"step": 1}\n')
    return folder


def refusal(folder: RunFolder, config: Config, fingerprint: str = PRINT) -> str:
    with pytest.raises(ConfigError) as refused:
        folder.changes(config, fingerprint)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("text", [b"a: [", b"a: 1", b"\xff", b"- 1", b"", b"train: {steps: 1}", b"[" * 5000])
def test_a_damaged_configuration_is_named_by_its_path(folder: RunFolder, config: Config, text: bytes) -> None:
    folder.config_file.write_bytes(text)
    assert str(folder.config_file) in refusal(folder, config)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '"fingerprint"', "{}", '{"fingerprint": 3}', '{"fingerprint": null}', "[" * 100_000, "\0"],
)
def test_a_damaged_fingerprint_is_not_taken_for_other_text(folder: RunFolder, config: Config, text: str) -> None:
    folder.data_file.write_text(text)
    message = refusal(folder, config)
    assert f"damaged {folder.data_file}" in message and "other text" not in message


def test_text_is_known_by_its_fingerprint_and_not_by_its_name(folder: RunFolder, config: Config) -> None:
    elsewhere = replace(config, data=replace(config.data, source="./elsewhere.txt"))
    assert folder.changes(elsewhere, PRINT) == ["data.source: run has 'stdlib', given './elsewhere.txt'"]
    assert "data.source='stdlib' holds other text" in refusal(folder, config, "f" * 16)


def test_a_start_that_took_no_step_binds_nobody(folder: RunFolder, config: Config) -> None:
    other = replace(config, train=replace(config.train, seed=7))
    assert "train.seed" in refusal(folder, other)
    folder.metrics_file.unlink()
    assert folder.changes(other, "f" * 16) == []
    (folder.checkpoints / "step-00000000").mkdir(parents=True)
    assert "train.seed" in refusal(folder, other), "an imported run has weights and no step"


def test_changes_are_written_as_one_types_them(folder: RunFolder, config: Config) -> None:
    rates = (Phase(2.2e-4, "5 steps", "linear"), Phase(2.2e-4))
    changed = replace(
        config,
        model=replace(config.model, recompute=("norm", "swiglu")),
        phases=PhasesConfig(learning_rate=rates),
        optimizer=replace(config.optimizer, warmup_steps=0),
    )
    values: dict[str, Any] = {"train": asdict(config.train), "run": asdict(config.run)}
    lines = folder.changes(changed, PRINT)
    assert "model.recompute: run has [], given [norm, swiglu]" in lines
    for line in lines:
        key, _, rest = line.partition(": run has ")
        apply(Config, values, f"{key}={rest.split(', given ')[1]}")
    assert from_dict(values) == changed


def test_a_start_that_asks_for_fewer_steps_than_are_done_records_nothing_of_itself(
    folder: RunFolder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "missing", lambda path: None if path.name == "step-00000008" else "all of it")
    for step in (8, 9):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    data = SimpleNamespace(fingerprint=PRINT, summary=lambda sequences: [f"{sequences} sequences"])
    said: list[str] = []
    for steps in (8, 5):
        given = replace(config, train=replace(config.train, steps=steps))
        open_run(folder, given, Layout(), data, None, said.append).close()  # type: ignore[arg-type]
        assert folder.stored_config().train.steps == 8
    assert said == ["changed since the last start: train.steps: run has 1, given 8", "32 sequences"]
    changes = [json.loads(line)["changed"] for line in folder.events.path.read_text().splitlines()]
    assert changes == [["train.steps: run has 1, given 8"], []]


def test_checkpoints_without_a_configuration_are_no_run(folder: RunFolder, config: Config) -> None:
    folder.config_file.unlink()
    assert folder.changes(config, PRINT) == []
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert "no config.yaml" in refusal(folder, config)


def test_a_second_process_is_refused_while_the_first_trains(folder: RunFolder, config: Config) -> None:
    with folder.open(config, PRINT), pytest.raises(ConfigError, match="in use"):
        folder.open(config, PRINT)
    folder.open(config, PRINT).close()


def test_a_lost_nodes_rank_that_still_has_the_lock_is_in_nobodys_way(folder: RunFolder, config: Config) -> None:
    with folder.open(config, PRINT, "start 1"):
        folder.open(config, PRINT, "start 1").close()
        for other in (None, "start 2"):
            with pytest.raises(ConfigError, match="in use"):
                folder.open(config, PRINT, other)
    with folder.open(config, PRINT), pytest.raises(ConfigError, match="in use"):
        folder.open(config, PRINT, "start 1")


@pytest.mark.parametrize(
    "state",
    [
        {"step": "2", "sequences": 8},
        {"step": 2.0, "sequences": 8},
        {"step": True, "sequences": 8},
        {"step": -1, "sequences": 8},
        {"step": 2, "sequences": None},
        {"step": 2},
        {"step": 2, "sequences": 8, "more": 1},
        [2, 8],
        None,
    ],
)
def test_a_checkpoint_whose_state_is_no_count_is_damaged(tmp_path: Path, state: object) -> None:
    for name in (".metadata", "manifest.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "state.json").write_text(json.dumps(state))
    what = checkpoint.missing(tmp_path)
    assert what is not None and re.match(r"state\.json is damaged", what)


def test_a_file_where_the_folder_should_be_is_refused(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run"):
        given = replace(config, run=replace(config.run, dir=str(path)))
        assert refusal(RunFolder(given), given) == f"run.dir={path} must be a folder, and {file} is a file"
