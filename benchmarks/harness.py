"""Timing that can be believed on a shared machine, and a record of where and with what it was taken.

Candidates take turns: one sample of each a round, in an order that rotates. A ratio of two candidates is the
median over rounds of the ratio inside a round, so that what disturbs a whole round cancels. CPU time counts
every thread of the process; wall time stands beside it.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

Thunk = Callable[[], Any]

# Costs and accuracies of solvers need no large validation set.
warnings.filterwarnings("ignore", message=".*hyperparameters are learned from")


class Timing(NamedTuple):
    """Milliseconds a call of one candidate, one entry a round."""

    cpu_ms: list[float]
    wall_ms: list[float]
    faults: list[float]

    def record(self) -> dict[str, Any]:
        """Return medians and all samples, rounded for a file."""
        return {
            "cpu_ms": round(statistics.median(self.cpu_ms), 4),
            "wall_ms": round(statistics.median(self.wall_ms), 4),
            "minor_faults": round(statistics.median(self.faults), 1),
            "cpu_ms_rounds": [round(x, 4) for x in self.cpu_ms],
        }


def interleave(
    candidates: dict[str, Thunk], *, rounds: int, min_ms: float = 60.0, multiple: dict[str, int] | None = None
) -> dict[str, Timing]:
    """Time every candidate once a round.

    Args:
      candidates: functions of no argument; each call is waited for.
      rounds: samples of each candidate.
      min_ms: a sample is as many calls as take about this long.
      multiple: of candidates whose calls come in cycles, the length of a cycle: a sample is whole cycles.
    """
    multiple = multiple or {}
    counts = {}
    for name, call in candidates.items():
        cycle = multiple.get(name, 1)
        _sample(call, cycle)
        counts[name] = cycle * max(1, round(min_ms / (cycle * max(1e-3, _sample(call, cycle)[1]))))
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in candidates}
    names = list(candidates)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_sample(candidates[name], counts[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(*(list(column) for column in zip(*rows, strict=True))) for name, rows in samples.items()}


def ratio(timings: dict[str, Timing], name: str, unit: str) -> float:
    """Return the median over rounds of CPU time of ``name`` over that of ``unit`` in the same round."""
    pairs = zip(timings[name].cpu_ms, timings[unit].cpu_ms, strict=True)
    return statistics.median(a / b for a, b in pairs)


def scratch_mib(compiled: Any) -> float:
    """Return the scratch memory of a compiled function, without arguments and results, in MiB."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    settings = ("XLA_FLAGS", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "device": str(jax.devices()[0].device_kind),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")},
        "date": datetime.date.today().isoformat(),
        **{name: os.environ.get(name, "") for name in settings},
    }


def where(machine: dict[str, Any], keys: Sequence[str] = ("cpu", "cores", "jax", "date")) -> str:
    """Return the last line of a report: on what it was measured, and when."""
    return ", ".join(f"{key} {machine[key]}" for key in keys) + "."


def circumstances(rounds: int) -> dict[str, Any]:
    """Return what is recorded with every network: the parts of a file may come from several runs."""
    return {"machine": machine(), "rounds": rounds, "load": [round(x, 2) for x in os.getloadavg()]}


def arguments(document: str, names: Sequence[str], results: Path) -> argparse.ArgumentParser:
    """Return the command line that the benchmarks share."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny network, 3 rounds: does it run?")
    parser.add_argument("--only", default=",".join(names), help="comma-separated networks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--merge", action="store_true", help="keep the other networks that the file has")
    return parser


def merged(folder: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return ``record`` with what the file already holds, if it was taken with the same settings.

    Raises:
      ValueError: a setting (an entry that is not a dict of results) differs.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return record
    before = json.loads(path.read_text())
    for key, value in record.items():
        if not isinstance(value, dict) and before.get(key) != value:
            raise ValueError(f"--merge: {key} is {before.get(key)!r} in {path.name}, {value!r} in this run")
    return {**before, **{k: {**before.get(k, {}), **v} if isinstance(v, dict) else v for k, v in record.items()}}


def in_order(found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return ``found`` with its entries in the order of ``names``, whatever the order they were measured in."""
    return {name: found[name] for name in names if name in found}


def write(folder: Path, name: str, record: dict[str, Any], table: str) -> None:
    """Write ``name.json`` and ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)


def in_a_process(script: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Any:
    """Return what ``script`` prints as JSON on its last line, run in a process of its own."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss_mib() -> float:
    """Return the largest resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # rusage's maximum survives exec: a child would report its parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _sample(call: Thunk, count: int) -> tuple[float, float, float]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return 1e3 * cpu / count, 1e3 * wall / count, faults / count


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
