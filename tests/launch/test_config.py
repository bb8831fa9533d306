"""A configuration either loads whole or is refused in one line that names the key, the value and the rule."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.program import dump as dump_program
from dualpipe.schedules import generate
from launch.config import Config, ConfigError, check_world_size, dump, from_dict, load, to_dict
from parallel.optimizer_config import OptimizerConfig
from parallel.phases import Batches, Course, PhasesConfig, warm_up_and_decay

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = """\
train:
  steps: 10
  sequence_length: 8
  global_batch_size: 4
run:
  dir: somewhere
"""


def loads(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        loads(tmp_path, text, *overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert config.microbatches * config.layout.data * config.train.micro_batch_size == config.train.global_batch_size


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_what_is_dumped_loads_as_the_same_configuration(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert loads(tmp_path, dump(config)) == config
    assert from_dict(to_dict(config)) == config


# Text that YAML keeps as it is; of the control characters a path may hold, none matters here.
names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text.strip() != "")
tricky = st.sampled_from(
    ["1e-4", "null", "no", "2024-01-01", "010", "1:30", "*", "<<", "-", "#c", "~", "=", ".", "0", ".inf", "{}", "a:"]
)
positive = st.floats(min_value=1e-300, max_value=1e37)


seconds = st.floats(min_value=1, max_value=604800)


@given(source=names | tricky, folder=names | tricky, rate=positive, seconds=seconds, seed=st.integers(0, 2**63 - 1))
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, source: str, folder: str, rate: float, seconds: float, seed: int
) -> None:
    config = from_dict(
        {
            "train": {
                "steps": 1,
                "sequence_length": 1,
                "global_batch_size": 1,
                "seed": seed,
                "timeout_seconds": seconds,
            },
            "optimizer": {"learning_rate": rate},
            "model": {"q_lora_rank": None},
            "data": {"source": source},
            "run": {"dir": folder},
        }
    )
    assert loads(tmp_path_factory.getbasetemp(), dump(config)) == config


def test_overrides_apply_in_order_and_after_the_file(tmp_path: Path) -> None:
    config = loads(tmp_path, MINIMAL, "train.steps=20", "train.steps=30", "layout.data=2", "run.dir=runs/1e3")
    assert (config.train.steps, config.layout.data, config.run.dir) == (30, 2, "runs/1e3")
    assert config.microbatches == 2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.0e-4"])
def test_a_small_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert loads(tmp_path, MINIMAL + f"optimizer:\n  learning_rate: {text}\n").optimizer.learning_rate == 1e-4
    assert loads(tmp_path, MINIMAL, f"optimizer.learning_rate={text}").optimizer.learning_rate == 1e-4


def test_an_optional_value_takes_null_and_others_do_not(tmp_path: Path) -> None:
    assert loads(tmp_path, MINIMAL, "model.q_lora_rank=null").model.q_lora_rank is None
    assert refusal(tmp_path, MINIMAL, "train.steps=null") == "train.steps=null must be an integer"


def test_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    assert loads(tmp_path, MINIMAL, "data.source=corpus/**/*.txt").data.source == "corpus/**/*.txt"
    assert loads(tmp_path, MINIMAL, "data.source=*.txt").data.source == "*.txt"
    assert loads(tmp_path, MINIMAL, "run.dir=a=b").run.dir == "a=b"
    assert loads(tmp_path, MINIMAL, "run.dir=2024").run.dir == "2024"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=ten", ["train.steps='ten'", "integer"]),
        ("train.steps=true", ["train.steps=true", "integer"]),
        ("train.steps=1.5", ["train.steps=1.5", "integer"]),
        ("train.steps=", ["train.steps=null", "integer"]),
        ("train.steps=010", ["train.steps='010'", "integer"]),
        ("train.steps={a: 1, a: 2}", ["train.steps=", "integer"]),
        ("train.steps=[", ["train.steps='['", "integer"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.seed=-1", ["train.seed=-1", "negative"]),
        ("train.device=tpu", ["train.device='tpu'", "auto or cpu or cuda"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate=nan", "finite"]),
        ("optimizer.learning_rate=0", ["optimizer.learning_rate=0.0", "above 0"]),
        ("optimizer.learning_rate=1e38", ["optimizer.learning_rate=1e+38", "optimizer.beta1", "3.403e+38"]),
        ("optimizer.weight_decay=1e43", ["optimizer.weight_decay = 2.2e+39", "3.403e+38"]),
        ("optimizer.epsilon=1e-50", ["optimizer.epsilon=1e-50", "1.175e-38"]),
        ("optimizer.clip_norm=1e39", ["optimizer.clip_norm=1e+39", "3.403e+38"]),
        ("model.vocab_size=99999999999999999999", ["model.vocab_size=99999999999999999999", "at most 1048576"]),
        ("model.routed_scaling_factor=1e39", ["model.routed_scaling_factor=1e+39", "at most 1.153e+18"]),
        ("optimizer.beta2=1", ["optimizer.beta2=1.0", "below 1"]),
        ("optimizer.moments=fp16", ["optimizer.moments='fp16'", "fp32 or bf16"]),
        ("precision.compute=fp16", ["precision.compute='fp16'", "fp32 or bf16 or fp8"]),
        ("model.norm_topk_prob=1", ["model.norm_topk_prob=1", "true or false"]),
        ("model.hidden_size=0", ["model.hidden_size=0", "at least 1"]),
        ("data.source= ", ["data.source=' '", "path"]),
        ("data.validation_fraction=1", ["data.validation_fraction=1.0", "below 1"]),
        ("recovery.replicate_every=2", ["recovery.replicate_every=2", "needs recovery.max_restarts of at least 1"]),
        ("checkpoint.keep=0", ["checkpoint.keep=0", "at least 1"]),
        ("run.dir=", ["run.dir=''", "path"]),
        ("schedule.name=dualpip", ["schedule.name=dualpip", "dualpipe"]),
        ("dispatch.payload=fp8", ["dispatch.payload=fp8", "precision.compute=fp8"]),
        ("train.steps", ["'train.steps'", "key.sub=value"]),
        ("=3", ["override '=3'", "key.sub=value"]),
        ("train=3", ["train is a section", "train.steps"]),
        ("steps=3", ["steps is not a key", "train.steps"]),
        ("train.stepz=3", ["train.stepz is not a key", "the nearest is train.steps"]),
        ("modl.hidden_size=3", ["modl.hidden_size is not a key", "the nearest is model.hidden_size"]),
        ("modle.hiden_size=3", ["modle.hiden_size is not a key", "the nearest is model.hidden_size"]),
        (
            "train.learning_rate=3",
            ["train.learning_rate is not a key", "the nearest is optimizer.learning_rate or phases."],
        ),
        ("checkpoint.zzz=3", ["checkpoint.zzz is not a key", "checkpoint has every, keep, asynchronous, on_error"]),
        ("zzz.steps.x=3", ["zzz.steps.x is not a key", "the sections are model, layout"]),
        ("train.steps=2147483648", ["train.steps=2147483648", "below 2147483648"]),
        ("checkpoint.every=1e99", ["checkpoint.every=1e+99", "integer"]),
        (f"checkpoint.keep={10**30}", [f"checkpoint.keep={10**30}", "below 2147483648"]),
        (f"data.validation_sequences={2**31}", ["data.validation_sequences=2147483648", "below"]),
        ("train.threads=1025", ["train.threads=1025", "below 1025"]),
        (f"train.seed={2**63}", [f"train.seed={2**63}", f"below {2**63}"]),
        ("train.timeout_seconds=1e-9", ["train.timeout_seconds=1e-09", "from 1 to 604800"]),
        ("train.timeout_seconds=1e12", ["train.timeout_seconds=1000000000000.0", "from 1 to 604800"]),
        ("run.dir=a\nb", [r"run.dir='a\nb'", "control characters"]),
        ("data.source=\udcff", ["data.source=", "UTF-8"]),
        ("train.steps=" + "[" * 5000, ["train.steps='[[[", "...", "integer"]),
        ("train.steps=" + "x" * 5000, ["train.steps='xxx", "...", "integer"]),
        ("x" * 5000 + "=1", ["xxx...xxx", "is not a key"]),
        ("y" * 5000, ["yyy...yyy", "key.sub=value"]),
    ],
)
def test_a_bad_override_is_refused_by_name(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, MINIMAL, override)
    assert all(word in message for word in words), message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["layout.pipeline=3"], ["layout.pipeline=3", "even"]),
        (["layout.pipeline=4"], ["micro-batches", "= 4", "at least 2 x layout.pipeline (8)"]),
        (["layout.pipeline=2", "train.global_batch_size=5"], ["micro-batches", "= 5", "even"]),
        (["layout.pipeline=1000000000"], ["micro-batches", "(2000000000)"]),
        (["layout.pipeline=62", "train.global_batch_size=124"], ["num_hidden_layers=61", "stages (62)"]),
        (["train.global_batch_size=2000000000"], ["micro-batches", "= 2000000000", "at most 65536"]),
        (["layout.data=3"], ["train.global_batch_size=4", "divisible by layout.data"]),
        (["train.micro_batch_size=3"], ["train.global_batch_size=4", "train.micro_batch_size"]),
        (["layout.data=4", "layout.expert=3"], ["layout.expert=3", "layout.data (4)"]),
        (
            ["layout.data=3", "layout.expert=3", "train.global_batch_size=3"],
            ["layout.expert=3", "model.n_routed_experts (256)"],
        ),
        (
            ["layout.pipeline=2", "model.num_hidden_layers=1", "model.first_k_dense_replace=0"],
            ["model.num_hidden_layers=1", "stages (2)"],
        ),
    ],
)
def test_an_impossible_layout_is_refused_before_any_rank_starts(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    message = refusal(tmp_path, MINIMAL, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["train.steps is missing", "integer"]),
        ("- train\n", ["must hold a mapping"]),
        ("train: 3\n", ["train=3", "mapping"]),
        (MINIMAL + "modle:\n  hidden_size: 3\n", ["modle is not a key", "model"]),
        (MINIMAL + "model:\n  hiden_size: 3\n", ["model.hiden_size is not a key", "model.hidden_size"]),
        (MINIMAL + "1: 2\n", ["1 is not a key"]),
        (MINIMAL + "run:\n  dir: elsewhere\n", ["config.yaml:7", "run", "line 5"]),
        (MINIMAL.replace("steps: 10", "steps: 10\n  steps: 11"), ["config.yaml:3", "steps", "line 2"]),
        ("train:\n  steps: [1\nrun: {}\n", ["config.yaml:3", "YAML"]),
        ("train:\n\tsteps: 1\n", ["config.yaml:2", "YAML"]),
        ("train: *nowhere\n", ["config.yaml:1", "YAML"]),
        ("train: \0\n", ["config.yaml", "YAML"]),
        ("train: " + "[" * 5000, ["config.yaml", "nested too deeply"]),
        (
            "train:\n  steps:\n  - &a0 [x]\n" + "".join(f"  - &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60)),
            ["train.steps=["],
        ),
        (MINIMAL + '"two\\nlines": 1\n', [r"two\nlines is not a key"]),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "absent.yaml", tmp_path, binary, tmp_path / "pipe.yaml"):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load(path)


def test_words_that_older_yaml_converts_stay_text(tmp_path: Path) -> None:
    assert loads(tmp_path, MINIMAL.replace("somewhere", "2024-01-01")).run.dir == "2024-01-01"
    assert loads(tmp_path, MINIMAL.replace("somewhere", "no")).run.dir == "no"


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path) -> None:
    assert loads(tmp_path, MINIMAL + "optimizer:\n").optimizer == OptimizerConfig()
    assert loads(tmp_path, MINIMAL + "layout:\n", "layout.data=2").layout.data == 2


def test_a_world_of_another_size_is_refused(tmp_path: Path) -> None:
    config = loads(tmp_path, MINIMAL, "layout.pipeline=2", "layout.data=1")
    check_world_size(config, 2)
    with pytest.raises(ConfigError, match=r"layout\.pipeline=2 x layout\.data=1 .* 2 ranks, and 6 were started"):
        check_world_size(config, 6)


def test_a_course_of_the_weight_of_no_loss_is_refused(tmp_path: Path) -> None:
    course = "phases.mtp_loss_weight=[{until: 2 steps, end: 0.3}, {end: 0.1}]"
    assert re.match(
        r"phases\.mtp_loss_weight=.* where model\.num_nextn_predict_layers=0", refusal(tmp_path, MINIMAL, course)
    )
    loads(tmp_path, MINIMAL, course, "model.num_nextn_predict_layers=1")


@given(
    warmup=st.integers(0, 50),
    decay=st.integers(0, 50),
    steps=st.integers(1, 120),
    final=st.floats(min_value=0, max_value=1),
)
def test_the_learning_rate_rises_stays_and_falls(warmup: int, decay: int, steps: int, final: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=final, warmup_steps=warmup, decay_steps=decay)
    course = Course("learning_rate", warm_up_and_decay(config, steps), Batches(PhasesConfig(), 1, 1))
    rates = [course.at(step) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(rate > 0 for rate in rates[:warmup])
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps >= warmup + decay:
        assert all(rate == 1 for rate in rates[max(warmup - 1, 0) : steps - decay])
    if decay and steps > warmup:
        assert rates[-1] == pytest.approx(final, abs=1e-15)


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = loads(tmp_path, MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def program_file(folder: Path, name: str, ranks: int, microbatches: int) -> str:
    file = folder / "step.txt"
    file.write_text(dump_program(generate(name, ranks, microbatches)))
    return f"schedule.program={file}"


def test_a_program_in_a_file_takes_the_place_of_the_named_schedule(tmp_path: Path) -> None:
    config = loads(tmp_path, MINIMAL, program_file(tmp_path, "zbv", 2, 4), "layout.pipeline=2")
    program = config.program()
    assert program is not None and program.schedule == "zbv"
    assert loads(tmp_path, MINIMAL).program() is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["layout.pipeline=4"], ["layout.pipeline=4", "must be 2", "zbv"]),
        (["train.global_batch_size=6"], ["micro-batches", "= 6", "must be 4"]),
        (["model.num_hidden_layers=3"], ["model.num_hidden_layers=3", "stages (4)"]),
        (["schedule.program=nowhere.txt"], ["nowhere.txt", "No such file"]),
    ],
)
def test_a_program_that_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    given = [program_file(tmp_path, "zbv", 2, 4), "layout.pipeline=2", *overrides]
    message = refusal(tmp_path, MINIMAL, *given)
    assert all(word in message for word in words), message


def test_chunks_reach_the_schedule(tmp_path: Path) -> None:
    sized = ["layout.pipeline=2", "schedule.name=interleaved"]
    assert "stages (32)" in refusal(tmp_path, MINIMAL, *sized, "schedule.chunks=16", "model.num_hidden_layers=31")
    assert loads(tmp_path, MINIMAL, *sized, "schedule.chunks=16", "model.num_hidden_layers=32").schedule.chunks == 16
    assert "chunks" in refusal(tmp_path, MINIMAL, "schedule.chunks=2")


def test_hierarchical_dispatch_needs_whole_nodes(tmp_path: Path) -> None:
    sized = ["layout.data=4", "layout.expert=4", "dispatch.kind=hierarchical"]
    assert "layout.ranks_per_node=3 must divide layout.expert (4)" in refusal(
        tmp_path, MINIMAL, *sized, "layout.ranks_per_node=3"
    )
    for ranks in (0, 1, 2, 4, 8):  # 0 is for the launcher to say
        assert loads(tmp_path, MINIMAL, *sized, f"layout.ranks_per_node={ranks}").layout.ranks_per_node == ranks


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[norm, swigl]", "model.recompute[1]='swigl' must be norm or mla_up or swiglu"),
        ("[norm, norm]", "model.recompute=['norm', 'norm'] must name nothing twice"),
        ("norm", "model.recompute='norm' must be full, or a list out of norm, mla_up, swiglu"),
    ],
)
def test_recompute_is_a_list_of_known_names_or_full(tmp_path: Path, value: str, message: str) -> None:
    assert refusal(tmp_path, MINIMAL, f"model.recompute={value}") == message


def test_recompute_survives_a_dump(tmp_path: Path) -> None:
    some, full = (loads(tmp_path, MINIMAL, f"model.recompute={value}") for value in ("[norm, mla_up]", "full"))
    assert some.model.recompute == ("norm", "mla_up") and full.model.recompute == "full"
    for config in (some, full):
        assert loads(tmp_path, dump(config)) == config
