"""``dualpipe plan --phases FILE``: a run of several phases, and how it compares with what was published.

The file has ``phases``, each with a ``name`` and either ``gpu_hours``, which are taken as they are, or ``tokens`` or
``steps`` with ``sequence_length`` and ``global_batch_size`` (a number, or two for a ramp); and, if there is anything to
compare with, ``published``: the ``gpu_hours`` of some ``phases`` together. It is a run as it was, whatever its layout;
the ``phases`` section of a configuration is what its own layout trains.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.command import UsageError
from launch.config_file import read
from launch.plan_table import aligned, scaled
from parallel.estimate.hardware import Cluster
from parallel.estimate.phases import PhaseError, PricedPhase, RunPhase, price
from parallel.estimate.plan import Run, make_plan
from parallel.estimate.workload import Workload


@dataclass(frozen=True)
class PhasesFile:
    """``published``: (names of phases, GPU-hours of all of them)."""

    phases: list[RunPhase]
    published: list[tuple[list[str], float]]


def answer(path: str, workload: Workload, cluster: Cluster, run: Run, as_json: bool) -> str:
    """What is to be printed. Raises UsageError, and ValueError for what the cluster or the schedule refuses."""
    file = read_phases(Path(path))
    try:
        priced = price(file.phases, workload, cluster, run)
    except PhaseError as error:
        raise UsageError(f"--phases {path}: {error}") from None
    fraction = make_plan(workload, cluster, run).faults.effective_fraction
    hours = {each.phase.name: each.gpu_hours for each in priced}
    total = sum(hours.values())
    stated = sum(each.gpu_hours for each in priced if not each.parts)  # failures and checkpoints are in them
    compared = [(names, sum(hours[name] for name in names), known) for names, known in file.published]
    if as_json:
        return json.dumps(
            {
                "phases": [_object(each) for each in priced],
                "gpu_hours": total,
                "dollars": total * cluster.dollars_per_gpu_hour,
                "effective_training_fraction": fraction,
                "published": [
                    {"phases": names, "gpu_hours": planned, "published_gpu_hours": known}
                    for names, planned, known in compared
                ],
            }
        )
    lines = [_table(priced, workload), ""]
    lines.append(f"in all: {scaled(total)} GPU-hours, ${scaled(total * cluster.dollars_per_gpu_hour)}")
    lines[-1] += f"; with failures and checkpoints {scaled(stated + (total - stated) / fraction)}"
    for names, planned, known in compared:
        lines.append(f"{' + '.join(names)}: {scaled(planned)}, published {scaled(known)} ({planned / known - 1:+.1%})")
    known = sum(hours for _, hours in file.published)
    if {name for names, _ in file.published for name in names} == set(hours):
        lines.append(f"published in all: {scaled(known)} ({total / known - 1:+.1%})")
    return "\n".join(lines + _notes(priced, workload))


def read_phases(path: Path) -> PhasesFile:
    """Raises UsageError and ConfigError."""
    document = read(path, "--phases", "`phases` and, at most, `published`")
    rows = document.get("phases")
    if not isinstance(rows, list) or not rows or set(document) - {"phases", "published"}:
        raise UsageError(f"--phases {path} must hold a list `phases` and, at most, a list `published`")
    if not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        raise UsageError(f"--phases {path}: every phase must be a mapping with a name")
    phases = [_phase(path, row) for row in rows]
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise UsageError(f"--phases {path}: two phases have the same name")
    published = document.get("published") or []
    if not isinstance(published, list):
        raise UsageError(f"--phases {path}: published must be a list of rows with phases and gpu_hours")
    return PhasesFile(phases, [_published(path, row, names) for row in published])


def _phase(path: Path, row: Mapping[str, Any]) -> RunPhase:
    where = f"--phases {path}: phase {row['name']}"
    if "gpu_hours" in row:
        if set(row) != {"name", "gpu_hours"}:
            raise UsageError(f"{where}: gpu_hours stands alone: a phase's hours are stated or planned")
        return RunPhase(row["name"], gpu_hours=_positive(where, row, "gpu_hours"))
    length = "tokens" if "tokens" in row else "steps"
    needed = {"name", length, "sequence_length", "global_batch_size"}
    if set(row) != needed:
        raise UsageError(f"{where} must have gpu_hours, or sequence_length, global_batch_size and tokens or steps")
    batch = row["global_batch_size"]
    ends = batch if isinstance(batch, list) else [batch, batch]
    if len(ends) != 2:
        raise UsageError(f"{where}: global_batch_size={batch} must be a number of sequences, or two for a ramp")
    first, last = (_positive(where, {"global_batch_size": end}, "global_batch_size") for end in ends)
    if last < first:
        raise UsageError(f"{where}: global_batch_size={batch} must not fall")
    if length == "steps" and first != last:
        raise UsageError(f"{where}: a ramp of global_batch_size needs tokens, not steps")
    sequence = int(_positive(where, row, "sequence_length"))
    amount = _positive(where, row, length)
    return RunPhase(row["name"], amount if length == "tokens" else amount * first * sequence, sequence, (first, last))


def _positive(where: str, row: Mapping[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise UsageError(f"{where}: {key}={value!r} must be a number above 0 and below 1e18")
    return float(value)


def _published(path: Path, row: Any, known: Sequence[str]) -> tuple[list[str], float]:
    where = f"--phases {path}: published"
    if not isinstance(row, dict) or set(row) != {"phases", "gpu_hours"} or not isinstance(row["phases"], list):
        raise UsageError(f"{where}: every row must have phases, a list of names, and gpu_hours")
    if not row["phases"] or len(set(row["phases"])) < len(row["phases"]):
        raise UsageError(f"{where}: phases={row['phases']} must name one phase or more, each once")
    for name in row["phases"]:
        if name not in known:
            raise UsageError(f"{where}: {name} is not a phase; the phases are {', '.join(known)}")
    return list(row["phases"]), _positive(where, row, "gpu_hours")


def _object(each: PricedPhase) -> dict[str, Any]:
    phase = each.phase
    return {
        "name": phase.name,
        "gpu_hours": each.gpu_hours,
        "tokens": phase.tokens,
        "stated": phase.gpu_hours is not None,
        "parts": [asdict(part) for part in each.parts],
    }


def _table(priced: Sequence[PricedPhase], workload: Workload) -> str:
    rows = ["phase,tokens,context,micro-batches,schedule,GPU-hours,per trillion".split(",")]
    for each in priced:
        if not each.parts:
            rows.append([each.phase.name, "", "", "", "stated", scaled(each.gpu_hours), ""])
        for part in each.parts:
            first, last = part.microbatches
            rows.append(
                [
                    each.phase.name,
                    scaled(part.tokens),
                    str(each.phase.sequence_length),
                    f"{first:g}" if first == last else f"{first:g} to {last:g}",
                    part.schedule,
                    scaled(part.gpu_hours),
                    scaled(part.gpu_hours / part.tokens * 1e12),
                ]
            )
    return aligned(rows)


def _notes(priced: Sequence[PricedPhase], workload: Workload) -> list[str]:
    """What does not run as the configuration says, and what is not counted."""
    notes = []
    for each in priced:
        for part in each.parts:
            name, numbers = each.phase.name, "{:g} to {:g}".format(*part.microbatches)
            if part.schedule != workload.schedule:
                notes.append(
                    f"{name}: {numbers} micro-batches for each replica are too few for {workload.schedule} on "
                    f"{workload.layout.pipeline} ranks; of those that run, {part.schedule} is the fastest that fits"
                )
        if each.parts and each.phase.sequence_length > workload.sequence_length:
            notes.append(
                f"{each.phase.name}: sequences in pieces of {workload.sequence_length} tokens; keys and values reach "
                "other pieces for nothing, and their memory is not counted"
            )
    return ["", *notes] if notes else []
