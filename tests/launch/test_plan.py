"""``dualpipe plan``: what it prints, and what it refuses in one line."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import _EPILOG, _inputs, _parser, main, read_cluster
from launch.plan_table import scaled
from parallel.estimate.fit import check
from parallel.estimate.plan import make_plan

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny-cpu.yaml"
V3 = str(ROOT / "configs" / "deepseek-v3.yaml")
AS_TRAINED = ["--what-if", "recompute=norm+mla_up+swiglu,mtp=1"]
KEYS = (
    "step_seconds tokens_per_day gpu_hours_per_trillion_tokens gpu_hours_total dollars_total "
    "effective_training_fraction tflops_causal tflops_noncausal mfu_causal mfu_noncausal pair_seconds "
    "pair_hidden_fraction ranks"
).split()
OF_A_RANK = "forward_s backward_s weight_s overlapped_s bubble_s optimizer_s memory_bytes".split()


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([V3, *options]) == 0
    return capsys.readouterr().out


def test_a_plan_does_without_torch() -> None:
    """Importing it, and the model beside it, would take longer than the plan."""
    code = f"import sys; sys.modules['torch'] = None; from launch.plan import main; sys.exit(main(['{TINY}']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(answer(capsys, *AS_TRAINED, "--json"))
    assert [key for key in KEYS if key not in plan] == []
    assert plan["steps"] == 241458 and len(plan["ranks"]) == 16
    whole = plan["steps"] * plan["step_seconds"] * plan["gpus"] / 3600
    at_full_batch = 235240 / 241458 * whole  # the same tokens
    assert at_full_batch < plan["gpu_hours_without_faults"] < 1.01 * at_full_batch
    for rank in plan["ranks"]:
        assert [key for key in OF_A_RANK if key not in rank] == []
        assert sum(rank[key] for key in OF_A_RANK[:-1]) == pytest.approx(plan["step_seconds"])
        assert sum(rank["memory"].values()) == pytest.approx(rank["memory_bytes"])
    assert plan["dollars_total"] == pytest.approx(2.0 * plan["gpu_hours_total"])
    assert plan["gpu_hours_total"] > plan["gpu_hours_without_faults"]
    assert plan["mfu_causal"] == pytest.approx(plan["tflops_causal"] / 989.4)


def test_table_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    lines = answer(capsys, *AS_TRAINED, "--html", str(page)).splitlines()
    assert lines[0].startswith("2048 x h800: dualpipe, pipeline 16 x data 128, expert 64, 120 micro-batches")
    assert len([line for line in lines if line.split()[:1] and line.split()[0].isdigit()]) == 17
    assert "run              241458 steps, 13673 of them of smaller batches: 2.741M GPU-hours of" in "\n".join(lines)
    text = page.read_text(encoding="utf-8")
    assert "<script" in text and text.count('class="memory"') == 16 * 6 and "GPU-hours per trillion" in text
    points = re.findall(r"<title>(\w+) \[4096, 7168\] x \[7168, 1536\]: ([\d.]+) TFLOPS", text)
    # q_a: 0.519 of FP8's peak on 112 of 132 multiprocessors, as the trace has it.
    assert points == [("fp8", f"{0.519 * 1978.9 * 112 / 132:.4g}")]


def test_every_example_of_the_help_parses_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line.split() for line in _EPILOG.partition("examples:")[2].strip().splitlines()]
    assert len(lines) >= 5
    for line in lines:
        assert line[:2] == ["dualpipe", "plan"]
        args = _parser().parse_intermixed_args(shlex.split(" ".join(line[2:])))
        if args.cluster == "here.yaml":  # the example before writes it
            args.cluster = None
        workload, cluster, run = _inputs(args)
        if not (args.search or args.phases or args.calibrate):
            # Memory is full once the pipeline is: 2 x pipeline micro-batches.
            check(make_plan(replace(workload, microbatches=2 * workload.layout.pipeline), cluster, run))
        assert args.phases is None or Path(args.phases).is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2_741_234, "2.741M"),
        (999_960, "1M"),
        (266.3e9, "266.3B"),
        (14.8e12, "14.8T"),
        (0, "0"),
        (0.03436, "0.03436"),
        (3.436e-8, "0.00000003436"),
        (41.95, "41.95"),
    ],
)
def test_numbers_are_printed_in_units_of_their_size(value: float, text: str) -> None:
    assert scaled(value) == text


def test_what_if_and_overrides_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "layout.pipeline=4",
        "layout.data=64",
        "train.global_batch_size=512",
        "phases.global_batch_size=[]",
        "--json",
    ]
    roomy = ["--what-if", "memory_gb=1000"]

    def step(*options: str) -> float:
        seconds: float = json.loads(answer(capsys, *small, *AS_TRAINED, *roomy, *options))["step_seconds"]
        return seconds

    plain = step()
    assert step("--what-if", "ib=10") > plain
    assert step("--what-if", "cluster.gpu=b200") < plain
    assert step("layout.expert=8") > plain  # eight times as many gradients of experts to sum, in so short a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--what-if", "nvlnk=900"],
            "what-if nvlnk is not a key of a cluster or of the workload; the nearest is nvlink",
        ),
        (
            ["--what-if", "percision=fp8"],
            "what-if percision is not a key of a cluster or of the workload; the nearest is p",
        ),
        (["--draws", "4", "--search"], "--draws 4 and --search exclude each other: drawn steps"),
        (["--draws", "1", *AS_TRAINED], "draws=1 must be at least 2"),
        (["--what-if", "ib=fast"], "what-if ib_gb_per_s=fast must be a number, in the unit of its name"),
        (["--what-if", "ib=0"], "cluster h800: ib_gb_per_s=0 must be finite and above 0"),
        (["--what-if", "ib"], "--what-if 'ib' must have the form KEY=VALUE"),
        (["--what-if", "=1"], "--what-if '=1' must have the form KEY=VALUE"),
        (["--what-if", "ib=1,ib_gb_per_s=2"], "--what-if ib_gb_per_s is given twice"),
        (
            ["--what-if", "cluster.gpu=h900"],
            "cluster h900 is not known: it must be one of a100, b200, h100",
        ),
        (["--cluster", "h100", "--what-if", "cluster.gpu=h200"], "exclude each other"),
        (["--what-if", "precision=fp4"], "precision=fp4 must be fp8 or bf16 or fp32"),
        (["--what-if", "recompute=norm+norm"], "recompute=norm+norm must name nothing twice"),
        (["--what-if", "mtp=half"], "--what-if mtp=half must be a whole number"),
        (
            ["--what-if", "precision=fp8,cluster.gpu=a100"],
            "cluster a100: fp8_tflops=0: the device has no",
        ),
        (["layout.expert=7"], "layout.expert=7 must divide"),
        (["--search", "--html", "x.html"], "--html x.html and --search exclude each other"),
        (["--phases", "x.yaml", "--search"], "--phases x.yaml and --search exclude each other"),
        (["--cluster", ""], "--cluster must not be empty"),
        (["--what-if", "recompute=half"], "--what-if recompute=half must be none, full, or some of"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V3, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


def test_a_layout_that_does_not_fit_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([V3, "layout.pipeline=4", "layout.data=64", "train.global_batch_size=512", "phases.global_batch_size=[]"])
        == 2
    )
    err = capsys.readouterr().err
    assert "more than the 77.3 GB that h800 has for tensors" in err and err.count("\n") == 1


def test_where_no_change_alone_suffices_a_pair_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Both of its changes are needed, and with both the layout fits."""
    small = ["layout.pipeline=4", "layout.data=64", "train.global_batch_size=512", "phases.global_batch_size=[]"]
    small += ["model.num_hidden_layers=8", "model.recompute=[]", "--what-if", "memory_gb=35"]
    assert main([V3, *small]) == 2
    error = capsys.readouterr().err
    found = re.search(r"tensors; with (\S.*) and (\S.*) it fits", error)
    assert found is not None and error.count("\n") == 1, error
    one, other = (words.split() for words in found.groups())
    assert [main([V3, *small, *changes]) for changes in (one, other, one + other)] == [2, 2, 0]


def test_a_cluster_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "ours.yaml"
    own.write_text("like: h800\nib_gb_per_s: {value: 25, source: 'measured: our cards'}\n", encoding="utf-8")
    plan = json.loads(answer(capsys, *AS_TRAINED, "--cluster", str(own), "--json"))
    assert plan["cluster"] == "ours"
    own.write_text("like: ours.yaml\n", encoding="utf-8")
    assert main([V3, "--cluster", str(own)]) == 2
    own.write_text("- no\n", encoding="utf-8")
    assert main([V3, "--cluster", str(own)]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("must hold a mapping of keys to {value: NUMBER, source: TEXT}, not ['no']")
    )


def test_a_search_without_a_layout_that_fits_names_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["layout.pipeline=4", "layout.data=8", "layout.expert=8", "train.global_batch_size=64"]
    assert main([V3, *small, "phases.global_batch_size=[]", *AS_TRAINED, "--search"]) == 2
    error = capsys.readouterr().err
    assert "layouts of 32 GPUs fits on h800" in error and "needs least" in error and error.count("\n") == 1


def test_drawn_steps_give_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["layout.pipeline=4", "layout.data=64", "train.global_batch_size=512", "phases.global_batch_size=[]"]
    small += [*AS_TRAINED, "--what-if", "memory_gb=1000,imbalance=1.1", "model.num_hidden_layers=8"]
    found = json.loads(answer(capsys, *small, "--draws", "4", "--json"))
    spread = found["drawn_step_seconds"]
    assert spread["draws"] == 4 and spread["low"] <= spread["median"] <= spread["high"]
    assert spread["mean"] == pytest.approx(found["step_seconds"], rel=0.1)
    text = answer(capsys, *small, "--draws", "4")
    assert "4 drawn steps: mean" in text and "uniform from 1 to 1.2 of it" in text


def test_phases_are_priced_and_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(
        "phases:\n"
        "  - {name: ramp, tokens: 1.0e+12, sequence_length: 4096, global_batch_size: [256, 1024]}\n"
        "  - {name: after, gpu_hours: 5000}\n"
        "published:\n  - {phases: [ramp, after], gpu_hours: 400000}\n"
    )
    small = ["layout.pipeline=4", "layout.data=64", "train.global_batch_size=512", "phases.global_batch_size=[]"]
    small += ["--what-if", "memory_gb=1000"]
    found = json.loads(answer(capsys, *small, *AS_TRAINED, "--phases", str(file), "--json"))
    assert found["gpu_hours"] == pytest.approx(sum(each["gpu_hours"] for each in found["phases"]))
    assert found["phases"][1] == {"name": "after", "gpu_hours": 5000, "tokens": 0, "stated": True, "parts": []}
    assert found["published"][0]["gpu_hours"] == pytest.approx(found["gpu_hours"])
    text = answer(capsys, *small, *AS_TRAINED, "--phases", str(file))
    assert "ramp: 4 to 8 micro-batches for each replica are too few for dualpipe on 4 ranks" in text
    assert "published in all: 400K" in text
    small[-1] = "memory_gb=20"
    assert main([V3, *small, *AS_TRAINED, "--phases", str(file)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"phase ramp: pipeline rank \d+ needs \S+ GB, \S+ GB more than the 18.0 GB", error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases: []", "must hold a list `phases`"),
        (
            "phases: [{name: a}]",
            "phase a must have gpu_hours, or sequence_length, global_batch_size and tokens or steps",
        ),
        ("phases: [{name: a, gpu_hours: x}]", "phase a: gpu_hours='x' must be a number above 0 and below 1e18"),
        ("phases: [{name: a, gpu_hours: 1}, {name: a, gpu_hours: 1}]", "two phases have the same name"),
        ("phases: [{name: a, gpu_hours: 1}]\npublished: [{phases: [b], gpu_hours: 1}]", "b is not a phase"),
        ("phases: [{name: a, gpu_hours: 1}]\npublished: [{phases: [], gpu_hours: 1}]", "name one phase or more"),
        ("phases: [{name: a, gpu_hours: 1}]\npublished: [{phases: [a, a], gpu_hours: 1}]", "each once"),
        ("phases: 3", "must hold a list `phases`"),
        (
            "phases: [{name: a, steps: 9, sequence_length: 4096, global_batch_size: [5, 4]}]",
            "global_batch_size=[5, 4] must not fall",
        ),
        (
            "phases: [{name: a, tokens: 9, sequence_length: 4096, global_batch_size: [100, 15360]}]",
            "phases.yaml: phase a: global_batch_size=100 must be at least layout.data x train.micro_batch_size (128),",
        ),
        (
            "phases: [{name: a, tokens: 9, sequence_length: 8192, global_batch_size: 60}]",
            "must be at least layout.data x train.micro_batch_size x train.sequence_length / 8192 (64)",
        ),
        (
            "phases: [{name: a, steps: 9, sequence_length: 2048, global_batch_size: 512}]",
            "phase a: sequence_length=2048 must be at least train.sequence_length (4096)",
        ),
    ],
)
def test_phases_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(text)
    assert main([V3, *AS_TRAINED, "--phases", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_this_machine_is_measured_by_its_ranks_and_planned_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny, here = str(ROOT / "configs" / "tiny-cpu.yaml"), str(tmp_path / "here.yaml")
    small = ["layout.pipeline=1", "schedule.name=1f1b", "train.sequence_length=32"]
    assert main([tiny, *small, "--calibrate", here]) == 0
    assert f"wrote {here}" in capsys.readouterr().out
    assert main([tiny, *small, "--cluster", here, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cluster"] == "here" and 0.01 < plan["step_seconds"] < 60
    cluster = read_cluster(here)
    assert cluster.shares_cores and cluster.ranks_per_node == 2 and cluster.latency_us > 0
    measured = [key for key, source in cluster.sources.items() if source.startswith("measured: dualpipe plan --calib")]
    assert {"nvlink_gb_per_s", "reduce_link", "dispatch_forward_skew_us", "mlp_weight_us", "gemm"} <= set(measured)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--calibrate", "x.yaml", "--what-if", "precision=bf16"],
            "--calibrate starts every rank of the layout here, and 2048 are more than 64",
        ),
        (
            [
                *("layout.pipeline=2", "layout.data=2", "layout.expert=2"),
                *("--calibrate", "x.yaml", "--what-if", "precision=bf16"),
            ],
            "are too many for a CPU",
        ),
        (
            ["--calibrate", "x.yaml"],
            "precision=fp8 must be one of bf16, fp32 with --calibrate, which measures no FP8 products",
        ),
        (["--calibrate", "x.yaml", "--search"], "--calibrate x.yaml and --search exclude each other"),
        (["--calibrate", "x.yaml", "--phases", "p.yaml"], "--calibrate x.yaml and --phases p.yaml exclude each other"),
        (["--trace", "x.json"], "--trace x.json needs --calibrate FILE"),
        (["--calibrate", "x.yaml", "--trace", "none.json"], "trace none.json must be a readable file"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([V3, "train.device=cpu", "phases.global_batch_size=[]", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("place", ["none/here.yaml", "."])
def test_nothing_is_measured_for_a_file_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setattr("launch.calibrate.measure_here", lambda *_: pytest.fail("it was measured"))
    path = tmp_path / place
    assert main([str(ROOT / "configs" / "tiny-cpu.yaml"), "layout.pipeline=1", "--calibrate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"--calibrate {path} cannot be written: " in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
