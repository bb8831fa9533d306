"""The training loop of one rank: resume, step, measure, validate, checkpoint, and say how it went."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bad_steps import SkippedBatches, SpikeRule, read_found, usual_losses, write_found
from launch.config import Config, ConfigError
from launch.data import DataError, bits_per_byte, open_dataset
from launch.drills.fault import PLAN, Plan
from launch.drills.fault import read as read_plan
from launch.hang import BEAT_SECONDS, BoardRecord
from launch.job import job_of
from launch.launcher import Launcher
from launch.metrics import LiveView, MetricsLog, print_summary
from launch.rank import Place, store_of_the_job, together
from launch.resume import Recoveries, Resume, open_memory, open_run
from launch.run_folder import RunFolder
from launch.slow import SlowRanks
from launch.step_entry import step_entry, summary
from launch.stop import StopRequest
from launch.trace import Recorder
from launch.train import DIVERGED, REGROUPED
from parallel.checkpoint import CheckpointError, Progress
from parallel.saver import Saver
from parallel.stage import PADDING
from parallel.step_end import Refusal
from parallel.worker import StepResult, Worker, alike

ROLLBACKS = 3
"""Times that a run goes back without getting further, at most."""


class Diverged(ArithmeticError):
    """Steps are bad, and the run cannot or must not go on by itself. Every rank sees the same, and none takes them."""


class UnusableSequence(Exception):
    """Data that looked well at the start hold something else further on."""


class Trainer:
    """Rank 0 is the one that writes the run folder and talks to whoever watches."""

    def __init__(
        self,
        config: Config,
        here: Place,
        device: torch.device,
        folder: RunFolder,
        arguments: argparse.Namespace,
        launcher: Launcher | None,
        stop: StopRequest,
    ) -> None:
        self.config, self.here, self.rank, self.device, self.folder = config, here, here.rank, device, folder
        self.arguments, self.launcher, self.stop = arguments, launcher, stop
        self.recoveries = Recoveries(folder, None if launcher is None else launcher.recovering)
        self.given = config if launcher is None else launcher.given(config)
        self.regroup = None if launcher is None else launcher.regroup
        self.leads = self.rank == 0
        self.progress = Progress(step=0, sequences=0)
        self.values = config.values()
        self.skipped, self.spikes = SkippedBatches(config.data.skip_batches), SpikeRule(0.0)
        self.bad_steps, self.rollbacks, self.farthest = 0, 0, 0

    def run(self) -> int:
        """Train to ``train.steps``. Exit status 0, 128 + N when signal N asked to stop, REGROUPED where the launcher
        did, to go on on more nodes, or, on all ranks alike, DIVERGED when steps are bad and the run cannot go on by
        itself (bad_steps.py)."""
        config = self.config
        drill = read_plan(Path(os.environ[PLAN]), self.folder.path) if PLAN in os.environ else None
        torch.manual_seed(config.train.seed + self.rank)
        self.data = together(lambda: open_dataset(config), (DataError,))
        lock = together(self._open_folder, (ConfigError,))
        try:
            job = job_of(config, self.device, self.here.local_world_size, self.data.document_end)
            self.worker = Worker(job, self.rank, store_of_the_job())
            self.worker.activity.ending = self.stop.terminated
            if self.launcher is not None and self.launcher.board is not None:
                record = BoardRecord(self.launcher.board, self.here.local_rank)
                self.worker.activity.publish(record.write, BEAT_SECONDS)
            if self.leads and self.worker.products is not None:
                self._say(str(self.worker.products))
            self.recorder = Recorder(self.worker.program, config.layout, self.rank) if config.run.trace else None
            memory = None if self.launcher is None else self.launcher.memory
            self.replica = open_memory(self.worker, config.recovery.replicate_every, memory, self.here, self.folder)
            self.resume = Resume(self.worker, self.replica, self.folder, self._say)
            if drill is not None:
                self._expect_faults(drill)
            if not self._go_on() and self.leads and (self.recoveries.after_a_failure or self.folder.has_steps()):
                self._say("there is nothing to go on from: the run begins anew")
            self.recoveries.loaded()
            self._know_history()
            self.slow = SlowRanks(config.recovery.slow_factor, alike(config.layout, self.worker.program))
            keep, asynchronous = config.checkpoint.keep, config.checkpoint.asynchronous
            self.saver = Saver(self.folder.checkpoints, self.worker, keep, asynchronous)
            self.worker.end.readers.append(self.saver.copied)
            with self.worker.activity.blaming():
                stopped = self._train()
        except Diverged as error:
            if self.leads:
                self.folder.events.write("diverged", step=self.progress.step + 1, error=str(error))
                print(f"error: {error}", file=sys.stderr, flush=True)
            self._settle(wait=True)
            return DIVERGED
        finally:
            if lock is not None:
                lock.close()
        return stopped

    def _open_folder(self) -> TextIO | None:
        """Check and open the run folder on rank 0; the others trust it."""
        if not self.leads:
            return None
        start = None if self.launcher is None else self.launcher.start
        return open_run(self.folder, self.given, self.config.layout, self.data, start, self._say)

    def _expect_faults(self, plan: Plan) -> None:
        """Let a drill break this rank. Raises ConfigError for a fault that would never happen."""
        from launch.drills.inject import arm

        step, regroups = lambda: self.progress.step + 1, self._is_regrouping
        arm(plan, self.given, self.rank, self.worker, self.replica, step, regroups)
        if self.leads:
            self._say(f"a drill: the faults of {plan.file} happen to this run")

    def _know_history(self) -> None:
        """What decides about the next steps, of those before: rank 0 reads it, and tells the others."""
        found = together(lambda: read_found(self.folder.skipped_file) if self.leads else [], (ConfigError,))
        box: list[Any] = [found, usual_losses(self.folder.metrics_file, self.progress.step) if self.leads else []]
        dist.broadcast_object_list(box)
        self.skipped = SkippedBatches(self.config.data.skip_batches, box[0])
        self.spikes = SpikeRule(self.config.recovery.spike_factor, box[1])

    def _go_on(self, from_memory: bool = True) -> bool:
        """Go on from where the run stands -> whether there was anything to go on from."""
        progress = self.resume.go_on(from_memory)
        if progress is not None:
            self.progress = progress
            if progress.step >= self.config.train.steps and self.leads:
                steps = self.config.train.steps
                self._say(f"nothing to train: the run has done {progress.step} steps, and train.steps={steps}")
        return progress is not None

    def _train(self) -> int:
        """The loop; returns 0, or the exit status of what ended it early."""
        train, every, saved = self.config.train, self.config.checkpoint.every, self.resume.saved
        log = MetricsLog(self.folder.metrics_file, self.progress.step) if self.leads else None
        validation, stopped = None, False
        self.stop.graceful = True
        if every and self.progress.step % every == 0 and self.progress.step > saved:
            saved = self._save()  # it was due when memory had the step already
        with LiveView(train.steps, self.progress.step, quiet=not self.leads or self.arguments.json) as view:
            while self.progress.step < train.steps and not stopped:
                before = self.progress.step
                entry, stopped = self._step()
                step = self.progress.step
                if entry is None:
                    saved = min(saved, step)
                    if log is not None and step < before:  # the run went back
                        log.close()
                        log = MetricsLog(self.folder.metrics_file, step)
                    continue
                validation = None
                if step == train.steps or (train.validate_every and step % train.validate_every == 0):
                    validation = entry["validation_bits_per_byte"] = self._validate()
                if log is not None:
                    log.append(entry)
                    self.recoveries.note(step)
                    view.update(
                        step,
                        loss=entry["loss"],
                        grad_norm=entry["grad_norm"],
                        tokens_per_second=entry["tokens_per_second"],
                        expert_load=max(entry["expert_load"].values(), default=None),
                        hidden=_hidden(entry["dispatch"]),
                    )
                if self.replica is not None and step < train.steps and not stopped:
                    self.replica.begin(self.progress)  # not before the step is in the metrics
                if every and step % every == 0:
                    saved = self._save()
                self._settle(last=stopped or step == train.steps)
            if self.replica is not None:
                self.replica.finish()
            if self.progress.step > saved:
                self._save()
        stopped = stopped and self.progress.step < train.steps
        if validation is None and not stopped:
            validation = self._validate()
        self._settle(wait=True, last=True)
        self.worker.settle()
        regrouped = stopped and self.stop.signal is None and self._is_regrouping()
        if log is not None and not regrouped:
            self._finish(log, validation, stopped)
        if regrouped:
            return REGROUPED
        return 128 + (self.stop.signal or signal.SIGINT) if stopped else 0

    def _step(self) -> tuple[dict[str, Any] | None, bool]:
        """One optimizer step: what ``metrics.jsonl`` says about it, None if it was not taken, and whether any rank was
        asked to stop."""
        worker, values = self.worker, self.values.at(self.progress.step)
        sequences = values.global_batch_size
        position = self.skipped.next_batch(self.progress.sequences, sequences)
        began = time.perf_counter()
        tokens = None
        if worker.needs_data:
            first, count = worker.rows(sequences)
            tokens = self._read(position + first, count)
        record = self.recorder is not None
        with worker.activity.in_step(self.progress.step + 1):
            result = worker.train_step(
                tokens,
                values.learning_rate,
                lambda: self.stop.signal is not None or self._is_regrouping(),
                record,
                sequences=sequences,
                bias_update_speed=values.bias_update_speed,
                mtp_loss_weight=values.mtp_loss_weight,
                loss_limit=self.spikes.limit,
                compare=self._is_compared(self.progress.step + 1),
            )
        seconds = time.perf_counter() - began
        if result.refusal is not None:
            self._refuse(result.refusal, result, position)
            return None, result.stop
        self.bad_steps = 0
        self._report_slow(result.compute_seconds)
        self.spikes.add(result.cross_entropy)
        self.progress = Progress(self.progress.step + 1, position + sequences)
        if self.recorder is not None:
            self.recorder.add(self.progress.step, result.spans, worker.program_of(sequences))
        entry = step_entry(self.progress, result, values, position, self.config.train.sequence_length, seconds)
        if self.replica is not None:
            entry["replica"] = asdict(self.replica.cost)
        if len(self.data.corpora) > 1:
            entry["source_tokens"] = self.data.source_tokens(self.progress.sequences)
        return entry, result.stop

    def _is_regrouping(self) -> bool:
        return self.regroup is not None and self.regroup.is_set()

    def _report_slow(self, seconds: Sequence[float]) -> None:
        """``seconds``: how long each rank computed in this step."""
        for change in self.slow.add(seconds) if self.leads else ():
            name = "slow rank" if change.slow else "rank no longer slow"
            step, own = self.progress.step + 1, round(change.seconds, 6)
            self.folder.events.write(name, rank=change.rank, step=step, times=round(change.times, 2), seconds=own)
            print(f"step {step}: {change}", file=sys.stderr, flush=True)

    def _read(self, first: int, count: int) -> Tensor:
        """Sequences of the stream. Other ranks read others, and do not know when these are unusable: so this rank fails
        by itself, which says why, and does not refuse as all do alike."""
        try:
            return torch.from_numpy(self.data.visits(first, count))
        except DataError as error:
            raise UnusableSequence(str(error)) from None

    def _is_compared(self, step: int) -> bool:
        """Whether the copies of parameters are compared in a step: a checkpoint after it must be a good one."""
        every, saves = self.config.recovery.hash_every, self.config.checkpoint.every
        last = step == self.config.train.steps
        return every > 0 and (step % every == 0 or last or (saves > 0 and step % saves == 0))

    def _refuse(self, refusal: Refusal, result: StepResult, position: int) -> None:
        """Go on after a step that was not taken: without its batch, or from the newest checkpoint. Raises Diverged."""
        most, step = self.config.recovery.max_bad_steps, self.progress.step + 1
        self.bad_steps += 1
        numbers = f"loss {result.loss:.4f}, gradient norm {result.grad_norm:.4f}"
        if self.leads:
            self.folder.events.write(
                "bad step",
                step=step,
                why=refusal.why,
                ranks=[flip.rank for flip in refusal.flips],
                first_sequence=position,
                loss=result.loss,
                grad_norm=result.grad_norm,
            )
        if not most:
            kept = "go on from the last checkpoint" if self.folder.newest_checkpoint() else "begin anew"
            raise Diverged(
                f"step {step} was not taken: {refusal.why} ({numbers}); {kept}"
                + ("" if refusal.flips else " with another optimizer.learning_rate, or set recovery.max_bad_steps")
            )
        if self.leads:
            print(f"step {step} was not taken: {refusal.why} ({numbers})", file=sys.stderr, flush=True)
        if not refusal.flips:  # the data are not to blame for those
            self.skipped.add(position)
            if self.leads:
                write_found(self.folder.skipped_file, self.skipped)
        if refusal.flips or self.bad_steps >= most:
            self._roll_back(refusal)

    def _roll_back(self, refusal: Refusal) -> None:
        """Go on from the newest checkpoint that is whole; memory may have what is bad. Raises Diverged when there is
        none, or when going back does not help."""
        self.recoveries.begin(refusal.why)
        self._settle(wait=True)
        left, self.bad_steps = self.progress.step, 0
        self.rollbacks = self.rollbacks + 1 if left <= self.farthest else 1
        self.farthest = max(self.farthest, left)
        if self.rollbacks > ROLLBACKS:
            raise Diverged(f"step {left + 1} was not taken: {refusal.why}, after {ROLLBACKS} returns to a checkpoint")
        if not self._go_on(from_memory=False):
            raise Diverged(f"step {left + 1} was not taken: {refusal.why}, and there is no checkpoint to return to")
        self._know_history()
        if self.leads:
            self.folder.events.write("rollback", step=left, to=self.progress.step, why=refusal.why)

    def _validate(self) -> float | None:
        """Bits per byte over the validation sequences; None when there are none to score."""
        worker, length = self.worker, self.config.train.sequence_length
        wanted = self.config.data.validation_sequences
        rows = torch.from_numpy(self.data.validation_sequences(wanted))
        if not len(rows):
            return None
        padded = torch.full((worker.evaluation_batch(len(rows)), length + 1), PADDING)
        padded[: len(rows)] = rows
        first, count = worker.rows(len(padded))
        total = worker.evaluate(padded[first : first + count] if worker.needs_data else None, len(rows))
        return bits_per_byte(total, len(rows) * length, self.data.validation_bytes_per_token(wanted))

    def _save(self) -> int:
        """Begin a checkpoint. Every one that is due is written: the one before is waited for if it is under way."""
        self.worker.activity.computes("checkpoint")
        self._settle(wait=True)
        self.saver.begin(self.progress, self.resume.spoiled)
        if self.recorder is not None:
            self.recorder.write(self.folder.path)
        return self.progress.step

    def _settle(self, wait: bool = False, last: bool = False) -> None:
        """Record the end of a save that is over on all ranks, or wait for it. Collective. Raises CheckpointError; after
        the ``last`` step whatever the user said, because nothing goes on."""
        saving = self.saver.underway
        if saving is None or not (wait or self.saver.is_over()):
            return
        try:
            path = self.saver.finish()
        except CheckpointError as error:
            if self.leads:
                with contextlib.suppress(OSError):  # a disk that is full may not take this line either
                    self.folder.events.write("checkpoint failed", step=saving.step, error=str(error))
            if (last and saving == self.progress) or self.config.checkpoint.on_error == "stop":
                raise
            if self.leads:
                print(f"{error}; training goes on", file=sys.stderr, flush=True)
            return
        if self.leads:
            self.folder.events.write("checkpoint", step=saving.step, path=str(path))

    def _finish(self, log: MetricsLog, validation: float | None, stopped: bool) -> None:
        entries = log.entries()
        log.close()
        self.folder.events.write("stop" if stopped else "end", step=self.progress.step)
        if self.arguments.json:
            print(json.dumps(summary(entries, validation, self.folder.path, stopped)), flush=True)
        elif stopped:
            self._say(
                f"stopped after step {self.progress.step}, with a checkpoint of it; to go on, give the same command"
            )
        else:
            print_summary(
                entries,
                validation_bits_per_byte=validation,
                run_dir=str(self.folder.path),
                config_path=self.arguments.config,
                overrides=self.arguments.overrides,
                invocation=self.arguments.invocation,
            )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr if self.arguments.json else sys.stdout, flush=True)


def _hidden(dispatch: Mapping[str, float]) -> float | None:
    """The share of communication that computation hid; None when there was none."""
    total = dispatch["hidden_seconds"] + dispatch["exposed_seconds"]
    return dispatch["hidden_seconds"] / total if total else None
