"""The train command as a user meets it: real ranks, real files, real signals."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualpipe.lower import lower
from dualpipe.program import dump
from dualpipe.schedules import generate
from tests.launch.runs import (
    ONE_RANK,
    ROOT,
    Start,
    assert_gone,
    descendants,
    entries,
    losses,
    train,
    train_forked,
    wait_for,
    write_config,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        done = train_forked(write_config(folder))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_is_a_folder_and_two_of_them_are_the_same_bytes(config: Path, tmp_path: Path, whole: Path) -> None:
    runs = [whole, tmp_path / "run"]
    replicated = train(config, "--json", "recovery.max_restarts=1", "recovery.replicate_every=2")
    assert replicated.returncode == 0, replicated.stderr
    summary = json.loads(replicated.stdout)
    assert summary["steps"] == 8 and summary["loss_last"] < summary["loss_first"]
    assert 0 < summary["validation_bits_per_byte"] < 10
    first, second = (entries(run) for run in runs)
    assert [e["step"] for e in first] == list(range(1, 9))
    for key in ("loss", "grad_norm", "expert_load", "balance_loss"):
        assert [e[key] for e in first] == [e[key] for e in second]
    assert first[-1]["validation_bits_per_byte"] == second[-1]["validation_bits_per_byte"]
    # The snapshot after each second step is taken during the next one, which says what it cost.
    assert [e["step"] for e in second if e["replica"]["bytes"] > 0] == [3, 5, 7] and "replica" not in first[0]
    assert sorted(p.name for p in (runs[0] / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    events = [json.loads(line)["event"] for line in (runs[0] / "events.jsonl").read_text().splitlines()]
    assert events[0] == "start" and events[-1] == "end"


RAMP = [
    "phases.global_batch_size=[{start: 8, end: 16, shape: linear, until: 1500 tokens}]",
    "phases.batch_multiple=4",
    "train.global_batch_size=16",
    "phases.learning_rate=[{end: 1.0e-3, until: 3 steps, shape: linear}, {end: 0, until: 2048 tokens, shape: cosine}]",
    "optimizer.warmup_steps=0",
    "phases.bias_update_speed=[{end: 0.001, until: 10 steps}, {end: 0}]",
    "train.steps=12",
]
"""A run whose batch grows in the middle, and whose learning rate and router bias end with it."""


def test_killed_at_a_random_step_of_a_ramp_and_resumed_it_ends_with_the_same_bytes(
    config: Path, start: Start, tmp_path: Path
) -> None:
    assert train_forked(config, f"run.dir={tmp_path / 'whole'}", *RAMP).returncode == 0
    run, step = tmp_path / "killed", random.randrange(5, 11)  # the checkpoint of step 4 waited for that of step 2
    process = start(config, f"run.dir={run}", *RAMP)
    wait_for(lambda: len(entries(run)) >= step)
    ranks = descendants(process)
    victim = random.choice([p for p in ranks if p.num_threads() > 1])
    victim.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert "SIGKILL" in error and "Traceback" not in error
    assert_gone(ranks)
    resumed = train_forked(config, f"run.dir={run}", *RAMP)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    whole = entries(tmp_path / "whole")
    for key in ("loss", "lr", "sequences", "tokens_total", "bias_update_speed"):
        assert [entry[key] for entry in entries(run)] == [entry[key] for entry in whole]
    assert [entry["sequences"] for entry in whole] == [8] * 6 + [12] * 4 + [16] * 2
    assert [entry["tokens_total"] for entry in whole][-1] == 128 * 16
    assert [entry["lr"] for entry in whole][1:3] == pytest.approx([2e-3 / 3, 1e-3]) and whole[-1]["lr"] == 0
    assert [entry["bias_update_speed"] for entry in whole] == [0.001] * 10 + [0] * 2


@pytest.mark.parametrize("killed", ["launcher", "terminal"])
def test_an_ended_launcher_leaves_no_process(config: Path, start: Start, tmp_path: Path, killed: str) -> None:
    process = start(config, "train.steps=100000")
    wait_for(lambda: len(entries(tmp_path / "run")) >= 1)
    ranks = descendants(process)
    if killed == "launcher":
        process.kill()
        process.communicate(timeout=30)
    else:  # Ctrl-C: a checkpoint and a message
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert "stopping after this step" in error and "with a checkpoint of it" in out
        assert "Traceback" not in out + error
        last = entries(tmp_path / "run")[-1]["step"]
        assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / ".metadata").exists()
    assert_gone(ranks)


def test_resuming_changes_what_may_change_and_records_it(config: Path, tmp_path: Path) -> None:
    assert train_forked(config, "train.steps=4").returncode == 0
    grown = train_forked(config, "train.steps=6", *ONE_RANK, ranks=1)
    assert grown.returncode == 0, grown.stderr
    assert [e["step"] for e in entries(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    starts = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    changed = [event for event in starts if event["event"] == "start"][-1]["changed"]
    assert any(line.startswith("layout.pipeline") for line in changed)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for override in ("model.hidden_size=64", "train.seed=2", "precision.compute=fp32"):
        refused = train(config, "train.steps=6", override)
        assert refused.returncode == 2
        assert override.partition("=")[0] in refused.stderr and len(refused.stderr.splitlines()) == 1
    renamed = train_forked(
        config, "train.steps=6", f"data.source={(tmp_path / 'text.txt').rename(tmp_path / 'same.txt')}"
    )
    assert renamed.returncode == 0 and "changed since the last start: data.source" in renamed.stdout, renamed.stderr
    assert "nothing to train: the run has done 6 steps, and train.steps=6" in renamed.stdout
    (tmp_path / "text.txt").write_text("other text " * 2000)
    other = train(config, "train.steps=6")
    assert other.returncode == 2 and "data.source" in other.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_incomplete_checkpoint_is_skipped_and_alone_it_is_refused(config: Path, tmp_path: Path) -> None:
    assert train_forked(config, "train.steps=4").returncode == 0
    newest, older = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in (4, 2))
    next(newest.glob("*.distcp")).unlink()
    resumed = train_forked(config, "train.steps=5", "checkpoint.keep=5")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000004 is incomplete" in resumed.stdout and "after step 2" in resumed.stdout
    assert resumed.stdout.count("skipped:") == 1  # one rank speaks for all

    payload = next(max((tmp_path / "run" / "checkpoints").glob("step-????????")).glob("*.distcp"))
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    checked = subprocess.run(
        [sys.executable, "-m", "launch.cli", "checkpoint", "verify", tmp_path / "run", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    problems = {Path(entry["checkpoint"]).name: entry["problem"] for entry in json.loads(checked.stdout)}
    assert checked.returncode == 1 and problems["step-00000002"] is None
    assert problems["step-00000005"].startswith(f"is damaged: {payload.name} is not what was written")
    resumed = train_forked(config, "train.steps=5", "checkpoint.keep=5")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000005 is damaged" in resumed.stdout and "after step 4" in resumed.stdout
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / ".metadata").unlink()
    refused = train_forked(config, "train.steps=6")
    assert refused.returncode == 2
    assert "incomplete" in refused.stderr and "Traceback" not in refused.stderr
    assert older.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=64", ["model.hiden_size", "model.hidden_size"]),
        ("layout.pipeline=3", ["layout.pipeline=3", "even"]),
        ("train.global_batch_size=4", ["micro-batches", "= 2", "4"]),
        ("layout.expert=4", ["layout.expert=4", "layout.data"]),
        ("train.global_batch_size=9", ["train.global_batch_size=9", "divisible"]),
        ("data.source=nowhere/*.txt", ["data.source", "nowhere"]),
        ("train.steps=ten", ["train.steps='ten'", "integer"]),
        ("run.dir=/proc/none", ["run.dir=/proc/none"]),
        ("train.global_batch_size=2000000000", ["micro-batches", "= 1000000000", "at most 65536"]),
        (
            "layout.data=999 layout.expert=1 train.global_batch_size=3996",
            ["layout.data=999", "= 1998 ranks", "--nnodes"],
        ),
        ("--nothing", ["--nothing"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(config: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    result = train(config, *override.split())
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()


def torchrun(config: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [sys.executable, *launcher, "-m", "launch.train", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_torchrun_trains_the_same_bytes(config: Path, tmp_path: Path) -> None:
    two_ranks = ["layout.data=1", "layout.expert=1"]
    assert train(config, *two_ranks).returncode == 0
    launched = torchrun(config, 2, *two_ranks, f"run.dir={tmp_path / 'torchrun'}")
    assert launched.returncode == 0, launched.stderr
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "run") != []


def test_torchrun_with_another_number_of_ranks_is_refused(config: Path, tmp_path: Path) -> None:
    refused = torchrun(config, 1)
    assert refused.returncode != 0
    assert "1 were started" in refused.stderr and "exitcode  : 2" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_not_there_is_refused(config: Path) -> None:
    refused = train(config, "train.device=cuda")
    assert refused.returncode == 2
    assert "train.device=cuda" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_what_a_service_manager_sends_to_the_whole_group_leaves_a_checkpoint(
    config: Path, start: Start, tmp_path: Path
) -> None:
    process = start(config, "train.steps=100000", "checkpoint.every=0", start_new_session=True)
    wait_for(lambda: len(entries(tmp_path / "run")) >= 1)
    ranks = descendants(process)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "with a checkpoint of it" in out
    assert_gone(ranks)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_copy_of_a_checkpoint_that_the_user_made_stays(config: Path, tmp_path: Path) -> None:
    assert train_forked(config, "train.steps=2").returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000002.best")
    assert train_forked(config).returncode == 0
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000002.best", "step-00000006", "step-00000008"]


def test_a_run_goes_on_from_its_folder_under_another_schedule_from_a_file(
    config: Path, tmp_path: Path, whole: Path
) -> None:
    """Steps by the name of the schedule, then by the text of another one, with dispatch over pretended nodes."""
    run, file = tmp_path / "run", tmp_path / "step.txt"
    assert train_forked(config, "train.steps=2").returncode == 0
    file.write_text(dump(lower(generate("zb1p", 2, 4))))
    changed = [f"schedule.program={file}", "dispatch.kind=hierarchical", "layout.ranks_per_node=1"]
    second = train_forked(run, *changed, "train.steps=8")
    assert second.returncode == 0, second.stderr
    assert [entry["step"] for entry in entries(run)] == [*range(1, 9)]
    assert all(f"changed since the last start: {key.split('=')[0]}: run has" in second.stdout for key in changed)
    # Another order of the same sums.
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


def test_an_fp8_run_resumes_to_the_same_bytes(config: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = train_forked(config, "precision.compute=fp8", f"run.dir={whole}", "train.steps=4")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("FP8 products: emulated") == 1
    for steps in (2, 4):
        done = train_forked(config, "precision.compute=fp8", f"run.dir={resumed}", f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
    assert losses(resumed) == losses(whole)
    refused = train_forked(
        config, "precision.compute=fp8", "precision.backend=scaled_mm", f"run.dir={tmp_path / 'none'}"
    )
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1
    assert "scaled_mm needs a Hopper GPU" in refused.stderr and "emulated" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_nodes_that_no_expert_group_fills_are_refused_by_every_rank(config: Path) -> None:
    sized = ["layout.data=3", "layout.expert=3", "model.n_routed_experts=6", "model.n_group=1", "model.topk_group=1"]
    nodes = ["dispatch.kind=hierarchical", "layout.ranks_per_node=2"]
    result = train_forked(config, *sized, "train.global_batch_size=12", *nodes, ranks=6)
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert "layout.ranks_per_node=2 must divide layout.expert (3)" in result.stderr
