"""``dualpipe plan``: what it prints, and what it refuses in one line."""

import json
from pathlib import Path

import pytest

from launch.plan import main

ROOT = Path(__file__).parents[2]
V3 = str(ROOT / "configs" / "deepseek-v3.yaml")
AS_TRAINED = ["--what-if", "precision=fp8,recompute=selective,mtp=1"]
KEYS = (
    "step_seconds tokens_per_day gpu_hours_per_trillion_tokens gpu_hours_total dollars_total "
    "effective_training_fraction tflops_causal tflops_noncausal mfu_causal mfu_noncausal pair_seconds "
    "pair_hidden_fraction ranks"
).split()
OF_A_RANK = "forward_s backward_s weight_s overlapped_s bubble_s optimizer_s memory_bytes".split()


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([V3, *options]) == 0
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(answer(capsys, *AS_TRAINED, "--json"))
    assert [key for key in KEYS if key not in plan] == []
    assert len(plan["ranks"]) == 16
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
    assert "<script" in page.read_text(encoding="utf-8")


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
        (["--what-if", "nvlnk=900"], "what-if nvlnk is not a key of a cluster; the nearest is nvlink"),
        (["--what-if", "ib=fast"], "what-if ib_gb_per_s=fast must be a number, in the unit of its name"),
        (["--what-if", "ib=0"], "cluster h800: ib_gb_per_s=0 must be finite and above 0"),
        (["--what-if", "ib"], "--what-if 'ib' must have the form KEY=VALUE"),
        (["--what-if", "ib=1,ib_gb_per_s=2"], "--what-if ib_gb_per_s is given twice"),
        (
            ["--what-if", "cluster.gpu=h900"],
            "cluster h900 is not known: it must be one of a100, b200, h100",
        ),
        (["--cluster", "h100", "--what-if", "cluster.gpu=h200"], "exclude each other"),
        (["--what-if", "precision=fp4"], "precision=fp4 must be fp8 or bf16 or fp32"),
        (["--what-if", "mtp=half"], "--what-if mtp=half must be a whole number"),
        (
            ["--what-if", "precision=fp8,cluster.gpu=a100"],
            "cluster a100: fp8_tflops=0: the device has no",
        ),
        (["layout.expert=7"], "layout.expert=7 must divide"),
        (["--search", "--html", "x.html"], "--html x.html and --search exclude each other"),
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
        .endswith("must hold a mapping of keys to {value: NUMBER, source: TEXT}")
    )
