"""What the FP8 loss experiment makes of its runs, without running any."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fp8_loss
from benchmarks.fp8_loss import Interval, ResultsError, interval, main, read_results, summary, t_quantile, verdict
from benchmarks.fp8_loss_ranks import BY, MOVED, VARIANTS, Run, configuration, move_weight
from benchmarks.loss_curves import svg
from parallel.mesh import Layout
from parallel.worker import Job, Worker

MARK = {"settings": "s", "text": "t"}


def entry(**changes: Any) -> str:
    return json.dumps({**MARK, "steps": 60, "seed": 1, "variant": "fp8", "loss": [2.0] * 60, **changes}) + "\n"


@pytest.mark.parametrize("degrees,t", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (11, 2.2010), (30, 2.0423)])
def test_quantiles_are_the_tabulated_ones(degrees: int, t: float) -> None:
    assert t_quantile(degrees) == pytest.approx(t, abs=1e-4)


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [interval(torch.randn(5, generator=generator).tolist()) for _ in range(2000)]
    assert sum(i.low <= 0 <= i.high for i in drawn) / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_verdict_needs_the_whole_interval() -> None:
    assert verdict(Interval(0.001, -0.001, 0.0024)).startswith("FP8 follows")
    assert verdict(Interval(0.001, -0.001, 0.0026)).startswith("inconclusive")
    assert verdict(Interval(0.004, 0.0026, 0.006)).startswith("FP8 does not")


def test_excess_is_that_of_the_last_losses_over_the_same_seeds_bf16() -> None:
    losses = {Run(seed, variant): [9.0] * 30 + [2.0 + seed] * 50 for seed in (1, 2) for variant in VARIANTS}
    losses[Run(1, "fp8")] = [1.0] * 30 + [3.0 * 1.01] * 50
    losses[Run(3, "bf16")] = losses[Run(3, "fp8")] = [1.0] * 80  # its control is not done yet
    result = summary(losses)
    assert result["seeds"] == [1, 2]
    assert result["fp8"]["excess"] == pytest.approx([0.01, 0.0]) and result["control"]["excess"] == [0.0, 0.0]
    assert result["fp8"]["mean"] == pytest.approx(0.005) and result["verdict"].startswith("inconclusive")


def test_results_go_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read_results(file, MARK, 60) == {}
    file.write_text(entry() + entry(steps=70, seed=2) + entry(seed=3)[:40])
    assert list(read_results(file, MARK, 60)) == [Run(1, "fp8")]
    assert file.read_text() == entry() + entry(steps=70, seed=2)
    assert list(read_results(file, None, 60)) == [Run(1, "fp8")]
    file.write_text(entry() + entry(text="other"))
    with pytest.raises(ResultsError, match="another text"):
        read_results(file, None, 60)
    for bad, message in ((entry(text="other"), "another text"), ("{}\n", "line 1 is not a run")):
        file.write_text(bad)
        with pytest.raises(ResultsError, match=message):
            read_results(file, MARK, 60)


def test_the_figures_of_the_document_are_those_of_its_losses(capsys: pytest.CaptureFixture[str]) -> None:
    document = Path(__file__).parents[2] / "docs" / "fp8.md"
    assert main(["--report", "--results", str(document.with_name("fp8_loss.jsonl"))]) == 0
    found = re.findall(r": ([+-][0-9.]+) %, 95 % interval (-[0-9.]+) to ([+][0-9.]+) %", capsys.readouterr().out)
    text = " ".join(document.read_text().split())
    for mean, low, high in found:
        assert f"{mean[1:]} % above" in text and f"{low} to {high} %" in text
    assert len(found) == 2


def test_a_report_of_nothing_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--results", str(tmp_path / "none")]) == 2
    assert f"--results={tmp_path / 'none'} is not there" in capsys.readouterr().err


def test_a_picture_that_has_no_place_is_refused_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "none" / "curves.svg"
    assert main(["--results", str(tmp_path / "results.jsonl"), "--svg", str(picture)]) == 2
    assert capsys.readouterr().err == f"error: --svg={picture} must lie in a folder that is there\n"


def test_whoever_watches_sees_every_step_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ranks:
        """Two runs of two steps, of which the last is told when the ranks have ended."""

        def __init__(self, work: Any, arguments: tuple[Any, ...], **options: Any) -> None:
            self.told, self.parts = arguments[-1], [["", "", "run 1"], ["", "", "run 2"]]

        def join(self, timeout: float) -> bool:
            for word in self.parts.pop(0):
                self.told.put(word)
            return not self.parts

    @contextmanager
    def bar(title: str, total: int, unit: str) -> Iterator[Any]:
        seen = []
        yield lambda: seen.append(unit)
        assert len(seen) == total == 4 and unit == "steps"

    monkeypatch.setattr(fp8_loss, "spawn", Ranks)
    monkeypatch.setattr(fp8_loss, "progress_bar", bar)
    fp8_loss.run_all([Run(1, "bf16"), Run(1, "fp8")], 2, tmp_path / "results.jsonl", MARK)
    assert capsys.readouterr().err == "run 1\nrun 2\n"


def test_a_stop_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fp8_loss, "stamp", lambda steps: MARK)
    monkeypatch.setattr(fp8_loss, "run_all", stopped)
    assert main(["--results", str(tmp_path / "results.jsonl")]) == 130
    assert capsys.readouterr().err.startswith("stopped; the same command goes on")


def test_the_picture_has_a_curve_for_every_seed_and_their_means() -> None:
    runs = [[3.0 - 0.01 * step + 0.001 * seed for step in range(80)] for seed in range(3)]
    worse = [[1.01 * loss for loss in run] for run in runs]
    root = ElementTree.fromstring(svg({"bf16": runs, "control": runs, "fp8": worse}, 50))
    assert len(root.findall(".//{*}polyline")) == 3 + 2 * (3 + 1)
    assert "+1" in [text.text for text in root.findall(".//{*}text")]


def test_the_control_differs_in_one_number() -> None:
    config = configuration(Run(1, "control"), 60)
    job = Job(config.model, Layout(), "dualpipe", torch.float32, torch.device("cpu"), 1, 8, 2, 1, config.optimizer)
    worker = Worker(job, 0)

    def values() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for h in worker.held.values() for n, p in h.stage.model.named_parameters()}

    before = values()
    move_weight(worker)
    changes = {name: value - before[name] for name, value in values().items()}
    assert [name for name, change in changes.items() if change.any()] == [MOVED]
    assert changes[MOVED].count_nonzero() == 1 and changes[MOVED].sum().item() == pytest.approx(BY, rel=1e-3)
