"""A run is a folder: what was asked for, what happened, and the state to go on from.

config.yaml       the configuration as resolved at the last start that had something to train
data.json         the fingerprint of the text that the run trains on
skipped.json      where the batches begin that bad steps were blamed on
metrics.jsonl     one object a step            events.jsonl      starts, ends, failures
checkpoints/      what a restart goes on from  failures/         a traceback for every rank that failed
lock              held while a run is training   nodes             who takes part, where several nodes train it
hugging_face/     what came with an imported model whose tokens are not bytes: ``data.tokenizer``
"""

import errno
import fcntl
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from launch.config import Config, ConfigError, dump, load, show
from launch.metrics import EventLog, read_jsonl
from launch.resume_rules import resume_differences
from launch.whole_file import write_whole

ORIGIN = "hugging_face"
"""In a run folder, what came with an imported model whose tokens are not bytes."""


def tokenizer_of(path: Path, config: Config) -> str:
    """``data.tokenizer`` of the run that lies at ``path`` and has this stored configuration: if that is a run's own
    copy, the one here, wherever the run was moved to and whatever the working directory."""
    own = path / ORIGIN
    return str(own) if own.is_dir() and Path(config.data.tokenizer).name == ORIGIN else config.data.tokenizer


class RunFolder:
    """The paths of a run and the rules for using an existing one. Nothing is made until ``open``."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.dir)
        self.config_file = self.path / "config.yaml"
        self.data_file = self.path / "data.json"
        self.skipped_file = self.path / "skipped.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.failures = self.path / "failures"
        self.nodes_file = self.path / "nodes"
        self.events = EventLog(self.path / "events.jsonl")

    def changes(self, config: Config, fingerprint: str) -> list[str]:
        """What differs, allowed, from the run that the folder holds; none for a new run.

        Raises ConfigError when something differs that would make it another run, and when no folder can be there.
        """
        try:
            return self._changes(config, fingerprint)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} must be a folder that can be read: {error.strerror}") from None

    def _changes(self, config: Config, fingerprint: str) -> list[str]:
        for place in (self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                raise ConfigError(f"run.dir={self.path} must be a folder, and {place} is a file")
            if place.is_symlink() and not place.exists():
                raise ConfigError(f"run.dir={self.path} must be a folder, and {place} is a link to nothing")
        if not self.config_file.exists():
            if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
                raise ConfigError(f"run.dir={self.path} has checkpoints but no config.yaml: it is no run to go on with")
            return []
        stored_config, stored = self.stored_config(), self._stored_fingerprint()
        if not self._has_trained():
            return []  # a start that was refused, or died before its first step, binds nobody
        stored_config = replace(
            stored_config,
            data=replace(stored_config.data, tokenizer=tokenizer_of(self.path, stored_config)),
            run=replace(stored_config.run, dir=config.run.dir),
        )
        refused, recorded = resume_differences(stored_config, config)
        if refused:
            raise ConfigError(
                f"run.dir={self.path} holds another run ({'; '.join(refused)}): choose another run.dir, "
                f"or give the values of the run"
            )
        if stored != fingerprint:
            raise ConfigError(
                f"{_setting(config)} other text than the run in run.dir={self.path} trained "
                f"on (SHA-256 {fingerprint[:12]}, the run has {stored[:12]}; 'stdlib' differs between Python versions)"
            )
        return recorded

    def has_steps(self) -> bool:
        """Whether a step was ever done in it."""
        return self.metrics_file.exists() and self.metrics_file.stat().st_size > 0

    def last_step(self) -> int:
        """The last one in the metrics; 0 for none. A line without one is somebody else's."""
        steps = (entry.get("step") for entry in reversed(read_jsonl(self.metrics_file)))
        return next((step for step in steps if type(step) is int), 0)

    def _has_trained(self) -> bool:
        return self.has_steps() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def newest_checkpoint(self) -> Path | None:
        """That lacks nothing, its checksums apart."""
        from parallel.checkpoint import newest_complete

        return newest_complete(self.checkpoints)

    def outlook(self) -> str:
        """What a start goes on from, in words for whoever ended the one before."""
        newest = self.newest_checkpoint()
        if newest is None:
            return "there is no checkpoint: the same command begins anew"
        return f"to go on from {newest}, give the same command"

    def stored_config(self) -> Config:
        """What ``config.yaml`` holds. Raises ConfigError."""
        try:
            return load(self.config_file)
        except ConfigError as error:
            raise ConfigError(f"run.dir={self.path} has a damaged {self.config_file} ({error})") from None

    def _stored_fingerprint(self) -> str:
        try:
            fingerprint = json.loads(self.data_file.read_text())["fingerprint"]
            if not isinstance(fingerprint, str):
                raise TypeError("fingerprint must be a string")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"run.dir={self.path} has a damaged {self.data_file} ({error!r})") from None
        return fingerprint

    def open(self, config: Config, fingerprint: str, start: str | None = None) -> TextIO:
        """Make the folder, note what is run, and take the lock, which is held until the file returned is closed.
        ``start``: of the command, where it was given on several nodes. A lost node's rank of the same start may still
        have the lock, stopped, or until its file server misses it: that one cannot take a step, and is in nobody's way.

        Raises ConfigError when it cannot be written or another process is training in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
            _take(lock, start or "")
            data = {"sources": [asdict(part) for _, part in config.data.named()], "fingerprint": fingerprint}
            write_whole(self.data_file, json.dumps(data) + "\n")
            write_whole(self.config_file, dump(config))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES) and not isinstance(error, PermissionError):
                raise ConfigError(f"run.dir={self.path} is in use: another process is training in it") from None
            raise ConfigError(f"run.dir={self.path} must be a folder that can be written: {error.strerror}") from None
        return lock


def _take(lock: TextIO, start: str) -> None:
    """Raises OSError when another start of the command has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        if not start or lock.read() != start:
            raise
        return
    lock.truncate(0)
    lock.write(start)
    lock.flush()


def _setting(config: Config) -> str:
    """The beginning of a message about the data's content."""
    parts = config.data.named()
    if len(parts) > 1:
        return "data.sources hold, or mix in other shares,"
    ((key, part),) = parts
    return f"{key}={show(part.source)} holds"
