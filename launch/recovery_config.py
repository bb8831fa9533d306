"""``recovery.*``: what keeps a run going, and what it tells of what goes wrong."""

from dataclasses import dataclass
from typing import Literal

from launch.config_file import check, check_count

DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class RecoveryConfig:
    max_restarts: int = 0
    """Times that ``dualpipe train`` starts all ranks again when one of them died; torchrun has its own --max-restarts,
    which decides there."""
    replicate_every: int = 0
    """Steps between two snapshots of every rank's state in host memory, its own and that of a rank on another node.
    Restarted ranks go on from there instead of from the disk. 0 takes none; needs max_restarts, and Linux."""
    max_bad_steps: int = 0
    """Bad steps in a row (launch/bad_steps.py) after which the run goes back to the newest checkpoint, without the
    batches of these steps; 0 ends the run at the first one."""
    spike_factor: float = 0.0
    """Times the usual spread above the usual loss that make a step a bad one; 0 is never."""
    hash_every: int = 0
    """Steps between two comparisons of all copies of the parameters (parallel/flips.py), apart from those before each
    checkpoint that is due, which that at a stop is not; 0 makes none."""
    hang_factor: float = 0.0
    """A step in which no rank comes further for so many median steps, and at least a second, hangs: the rank that is to
    blame is named and killed, as if it had died. One that sleeps instead of computing has so many times the longest
    that it lately computed without a wait, and one that is stopped by a signal has a second. 0 leaves hangs to
    train.timeout_seconds; otherwise at least 2, and Linux and the launcher of ``dualpipe train``: under torchrun nobody
    watches."""
    slow_factor: float = 0.0
    """Times as long as it should that a rank computes, over some steps, to be reported as slow (launch/slow.py); nobody
    is stopped for it. 0 reports nobody; otherwise above 1, such as 1.5."""
    grace_seconds: int = 120
    """Seconds from SIGTERM, SIGINT or SIGHUP to ``dualpipe train`` in which the ranks may finish their step, write a
    checkpoint and leave; who is left then is killed. Under torchrun, its own --shutdown-timeout decides."""
    node_wait_seconds: float = 600.0
    """How long the nodes of ``dualpipe train --nnodes`` wait for each other, at the start and for one that takes a lost
    one's place, before they end."""

    on_node_loss: Literal["spare", "wait", "shrink"] = "spare"
    """What becomes of the place of a lost node under ``dualpipe train --nnodes N:M``. spare: a node that waits takes
    it, and where none does, the others wait. wait: there are no spares, and the others wait for a node to be started.
    shrink: where no spare waits, the others go on at once with fewer data-parallel replicas and the same global batch,
    and with more again when a node comes."""

    def __post_init__(self) -> None:
        for key in ("max_restarts", "replicate_every", "max_bad_steps", "hash_every"):
            check_count(f"recovery.{key}", getattr(self, key))
        check(self.spike_factor >= 0, "recovery.spike_factor", self.spike_factor, "must not be negative")
        sane = self.hang_factor == 0 or 2 <= self.hang_factor <= 1e6
        check(sane, "recovery.hang_factor", self.hang_factor, "must be 0, or from 2 to 1000000")
        sane = self.slow_factor == 0 or 1 < self.slow_factor <= 1e6
        check(sane, "recovery.slow_factor", self.slow_factor, "must be 0, or above 1 and at most 1000000")
        check_count("recovery.grace_seconds", self.grace_seconds, least=1, limit=DAY_SECONDS)
        check(self.node_wait_seconds > 0, "recovery.node_wait_seconds", self.node_wait_seconds, "must be positive")
        ends = self.on_node_loss != "spare" and self.max_restarts == 0
        rule = "needs recovery.max_restarts of at least 1: with 0 a lost node ends the run"
        check(not ends, "recovery.on_node_loss", self.on_node_loss, rule)
        needless = self.replicate_every > 0 and self.max_restarts == 0
        rule = "needs recovery.max_restarts of at least 1: nobody else gives ranks what memory kept"
        check(not needless, "recovery.replicate_every", self.replicate_every, rule)
