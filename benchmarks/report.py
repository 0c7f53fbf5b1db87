"""Turn a benchmark's JSON into Markdown: ``python benchmarks/report.py step_cost.json``."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OVER_HAND, IDLE_SMALL, IDLE_LARGE, COMPILE = 1.15, 1.15, 1.25, 1.5
FLOOR = {"mlp64": 12.8, "mlp256": 14.9, "mlp1024": 18.3}
"""Gradients that the floating-point operations of Neumann 10 amount to, for the 784-H-H-10 networks."""


def step_cost(record: dict[str, Any]) -> str:
    """Return targets, then all figures, as Markdown."""
    parts = ["# Cost of a hypergradient and of a joint step", _machine(record["machine"]), _how(record)]
    parts += ["## Targets", _table(("what", "network", "target", "measured", ""), _targets(record))]
    for name, found in record["networks"].items():
        parts += [f"## {name}: {found['weights']:,} weights, as many hyperparameters", *_network(found)]
    if "peak_rss_mib" in record:
        rows = [(which, f"{value:.0f}") for which, value in record["peak_rss_mib"].items()]
        parts += ["## Peak resident memory, mlp1024, 20 calls", _table(("process", "MiB"), rows)]
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value not in ("", None)) + "."


def _how(record: dict[str, Any]) -> str:
    quick = " A quick run on a tiny network: the figures say only that the script works." if record["quick"] else ""
    return (
        f"CPU time (all threads), median of {record['rounds']} rounds in which the candidates take turns; ratios are "
        f"medians of the ratio inside a round; wall time beside it.{quick}"
    )


def _targets(record: dict[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []

    def add(what: str, name: str, limit: float, measured: float) -> None:
        verdict = "" if record["quick"] else ("met" if measured <= limit else "**missed**")
        rows.append((what, name, f"≤ {limit:.2f}", f"{measured:.2f}", verdict))

    for name, found in record["networks"].items():
        for method, values in found["hypergradient"]["candidates"].items():
            if method.endswith(" library"):
                what = f"hypergradient, {method.removesuffix(' library')}, over hand-written"
                add(what, name, OVER_HAND, values["over_hand"])
        if name in FLOOR and not record["quick"]:
            measured = found["hypergradient"]["candidates"]["neumann 10 library"]["in_units"]
            add("Neumann 10 with a given step, in gradients", name, 1.15 * FLOOR[name], measured)
        calls = found["steps"]["candidates"]
        add("joint step, over hand-written", name, OVER_HAND, calls["joint step library"]["over_hand"])
        add("fused window, over hand-written", name, OVER_HAND, calls["window library"]["over_hand"])
        large = found["weights"] > 300_000
        if not large:
            add("call with nothing due, over a plain step", name, IDLE_SMALL, calls["idle step library"]["in_units"])
        if "steps_keeping_memory" in found:
            kept = found["steps_keeping_memory"]["candidates"]["idle step library"]["in_units"]
            what = "call with nothing due, over a plain step, freed memory kept"
            add(what, name, IDLE_LARGE if large else IDLE_SMALL, kept)
        add("compile time of the joint step, over hand-written", name, COMPILE, found["compile_s"]["over_hand"])
    return rows


def _network(found: dict[str, Any]) -> Iterable[str]:
    yield f"Neumann step {found['step_size']:g}, solver unroll={found['unroll']}."
    yield _timings(found["hypergradient"], "in gradients")
    yield _timings(found["steps"], "in plain steps")
    if "steps_keeping_memory" in found:
        yield "The same with an allocator that keeps freed memory:"
        yield _timings(found["steps_keeping_memory"], "in plain steps")
    seconds = {k: v for k, v in found["compile_s"].items() if k != "over_hand"}
    yield "Compile time: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()) + "."


def _timings(part: dict[str, Any], unit: str) -> str:
    rows = []
    for name, v in part["candidates"].items():
        per = 10 if name.startswith("window") else 1
        over = f"{v['over_hand']:.2f}" if "over_hand" in v else ""
        label = name + (", a step" if per > 1 else "")
        numbers = f"{v['cpu_ms'] / per:.2f}", f"{v['wall_ms'] / per:.2f}", f"{v['in_units'] / per:.2f}"
        rows.append((label, *numbers, over, f"{v['scratch_mib']:.1f}", f"{v['minor_faults'] / per:.0f}"))
    return _table(("", "CPU ms", "wall ms", unit, "over hand", "scratch MiB", "page faults"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    print(step_cost(json.loads(Path(sys.argv[1]).read_text())))
