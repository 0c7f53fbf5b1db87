"""Turn a benchmark's JSON into Markdown: ``python benchmarks/report.py step_cost.json``.

The file's name without its ending is the report's: ``step_cost``, ``hessian_modes`` or ``unroll_memory``.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OVER_HAND, IDLE_SMALL, IDLE_LARGE, COMPILE = 1.15, 1.15, 1.25, 1.5
JOINT_STEPS = {"joint step": None, "joint step default": 1.6, "joint step 2 products": 1.45}  # in plain steps
UNROLL_SCRATCH, LONG_MIB = 25.0, 4096.0
UNROLLS = {
    "unroll 10 library": "hypergradient through 10 steps, over hand-written",
    "unroll 50 library": "hypergradient through 50 steps, over hand-written",
    "joint unroll 10 library": "unrolled window of 10, outer step due, over hand-written",
    "idle unroll 10 library": "unrolled window of 10, nothing due, over 10 plain steps",
}
FLOOR = {"mlp64": 12.8, "mlp256": 14.9, "mlp1024": 18.3}
"""Gradients that the floating-point operations of Neumann 10 amount to, for the 784-H-H-10 networks."""


def step_cost(record: dict[str, Any]) -> str:
    """Return targets, then all figures, as Markdown."""
    parts = ["# Cost of a hypergradient and of a joint step", how(record), circumstances(record)]
    parts += ["## Targets", table(("what", "network", "target", "measured", ""), _targets(record))]
    for name, found in record["networks"].items():
        parts += [f"## {name}: {found['weights']:,} weights, as many hyperparameters", *_network(found)]
    return "\n\n".join(parts) + "\n"


def hessian_modes(record: dict[str, Any]) -> str:
    """Return the choices side by side over all networks, then all figures, as Markdown."""
    parts = ["# Forms of the Hessian product and of the loop around it", how(record), circumstances(record)]
    rows = {
        name: [v for v in found["candidates"].values() if "solver" in v] for name, found in record["networks"].items()
    }
    steps = record["steps"]
    for title, loop in (("in the library's loop", "while_loop"), ("unrolled", "unrolled scan")):
        chosen = {
            n: {v["mode"]: v for v in all_ if (v["solver"], v["loop"]) == ("neumann", loop)} for n, all_ in rows.items()
        }
        chosen = {n: modes for n, modes in chosen.items() if len(modes) > 1}
        if chosen:
            parts += [f"## Product, in Neumann {steps} {title}: CPU time and scratch memory over those of vjp(grad)"]
            parts += [_beside(chosen, "vjp(grad)")]
    for solver in ("neumann", "cg"):
        loops = {
            n: {v["loop"]: v for v in all_ if (v["solver"], v["mode"]) == (solver, "vjp(grad)")}
            for n, all_ in rows.items()
        }
        parts += [f"## Loop, in {solver} {steps} with vjp(grad): CPU time and scratch memory over those of while_loop"]
        parts += [_beside(loops, "while_loop")]
    for name, found in record["networks"].items():
        head = ("", "CPU ms", "wall ms", "in gradients", "scratch MiB", "steps", "differs by")
        solves = [_solve(which, v) for which, v in found["candidates"].items()]
        parts += [f"## {name}: {found['weights']:,} weights, Neumann step {found['step_size']:g}", table(head, solves)]
    return "\n\n".join(parts) + "\n"


def _beside(chosen: dict[str, dict[str, Any]], unit: str) -> str:
    def cell(form: dict[str, Any], of: dict[str, Any]) -> str:
        over = 1.0 if form is of else form["over_chosen"]
        return f"{over:.2f} / {form['scratch_mib'] / of['scratch_mib']:.2f}"

    forms = next(iter(chosen.values()))
    rows = [(form, *(cell(found[form], found[unit]) for found in chosen.values())) for form in forms]
    return table(("", *chosen), rows)


def _solve(which: str, v: dict[str, Any]) -> Sequence[str]:
    steps, difference = (str(v["solver_steps"]), f"{v['difference']:.0e}") if "solver" in v else ("", "")
    numbers = f"{v['cpu_ms']:.2f}", f"{v['wall_ms']:.2f}", f"{v['in_units']:.2f}", f"{v['scratch_mib']:.1f}"
    return (which, *numbers, steps, difference)


def unroll_memory(record: dict[str, Any]) -> str:
    """Return targets, what the mixed mode gains, then all figures, as Markdown."""
    parts = ["# Memory and time of a hypergradient through K training steps", how(record), circumstances(record)]
    parts += [
        "Scratch memory is what the compiled function allocates besides arguments and results. *differs by*: from the "
        "hypergradient of the hand-written loop without checkpoints.",
        "## Targets",
        table(("what", "network", "target", "measured", ""), _unroll_targets(record)),
        "## Mixed mode over plain autodiff, in the library, with the same checkpoints: CPU time and scratch memory",
        table(("network", "", "checkpoints", "time", "memory", "MiB"), _mixed(record)),
    ]
    for name, found in record["networks"].items():
        parts += [f"## {name}: {found['weights']:,} weights, {found['params_mib']:.2f} MiB"]
        for title, group in found["groups"].items():
            parts += [f"{title}. Library's default: *{group['default']}*. jaxopt: {group['jaxopt']}."]
            parts += [_unrolls(group, found["params_mib"])]
    if record["long"]:
        parts += [f"## {record['long']['steps']:,} steps", _long(record["long"])]
    return "\n\n".join(parts) + "\n"


def _unroll_targets(record: dict[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []

    def add(what: str, name: str, limit: float, measured: float) -> None:
        verdict = "" if record["quick"] else ("met" if measured <= limit else "**missed**")
        rows.append((what, name, f"≤ {limit:g}", f"{measured:.2f}", verdict))

    for name, found in record["networks"].items():
        for title, group in found["groups"].items():
            default = group["candidates"][group["default"]]
            add(f"{title}: default over hand-written, time", name, OVER_HAND, default["over_hand"])
            if group["steps"] == 50 and group["optimizer"] == "sgd":
                copies = default["scratch_mib"] / found["params_mib"]
                add(f"{title}: default, scratch in copies of the weights", name, UNROLL_SCRATCH, copies)
    if long := record["long"]:
        what = f"{long['steps']:,} steps: peak resident memory, MiB"
        add(what, long["network"], LONG_MIB, long["peak_rss_mib"])
    return rows


def _mixed(record: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, found in record["networks"].items():
        for title, group in found["groups"].items():
            for which, values in group["candidates"].items():
                if "over_not_mixed" in values:
                    plain = group["candidates"][f"{which}, not mixed"]
                    memory = values["scratch_mib"], plain["scratch_mib"]
                    checkpoints = which.removesuffix(", library") + (" (default)" if which == group["default"] else "")
                    ratios = f"{values['over_not_mixed']:.2f}", f"{memory[0] / memory[1]:.2f}"
                    yield name, title, checkpoints, *ratios, f"{memory[0]:.1f} / {memory[1]:.1f}"


def _unrolls(group: dict[str, Any], params_mib: float) -> str:
    rows = []
    for name, v in group["candidates"].items():
        numbers = f"{v['cpu_ms']:.1f}", f"{v['wall_ms']:.1f}", f"{v['in_units']:.2f}"
        over = f"{v['over_hand']:.2f}" if "over_hand" in v else ""
        memory = f"{v['scratch_mib']:.1f}", f"{v['scratch_mib'] / params_mib:.1f}"
        differs = f"{v['difference']:.0e}" if "difference" in v else ""
        rows.append((name, *numbers, over, *memory, f"{v['compile_s']:.1f}", differs))
    head = ("", "CPU ms", "wall ms", f"in {group['unit']}s", "over hand", "scratch MiB", "in weights")
    return table((*head, "compile s", "differs by"), rows)


def _long(found: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value not in ("", None))
    return (
        f"One hypergradient, {found['weights']:,} weights, batches of {found['batch']} by index: "
        f"{found['wall_s']:.1f} s ({found['cpu_s']:.1f} s of CPU time), compiled in {found['compile_s']:.1f} s; "
        f"scratch {found['scratch_mib']:.0f} MiB, peak resident memory {found['peak_rss_mib']:.0f} MiB, of which "
        f"{found['peak_rss_before_mib']:.0f} MiB before the call. {machine}; load {found['load'][0]:g}."
    )


def circumstances(record: dict[str, Any]) -> str:
    """Return a line for each machine (and day) on which networks were measured."""
    lines: dict[str, list[str]] = {}
    for name, found in record["networks"].items():
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value not in ("", None))
        lines.setdefault(f"{machine}; {found['rounds']} rounds", []).append(f"{name} (load {found['load'][0]:g})")
    return "\n".join(f" - {', '.join(names)}: {line}." for line, names in lines.items())


def how(record: dict[str, Any]) -> str:
    quick = (
        " A quick run on a tiny network, compiled without most optimizations: the figures say only that it works."
        if record["quick"]
        else ""
    )
    return (
        f"CPU time (all threads), median of rounds in which the candidates take turns; ratios are "
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
        for which, limit in JOINT_STEPS.items():
            if f"{which} library" in calls:
                add(f"{which}, over hand-written", name, OVER_HAND, calls[f"{which} library"]["over_hand"])
                if limit is not None:
                    add(f"{which}, over a plain step", name, limit, calls[f"{which} library"]["in_units"])
        if "window library" in calls:
            add("fused window, over hand-written", name, OVER_HAND, calls["window library"]["over_hand"])
        large = found["weights"] > 300_000
        if not large:
            add("call with nothing due, over a plain step", name, IDLE_SMALL, calls["idle step library"]["in_units"])
        if "steps_keeping_memory" in found:
            kept = found["steps_keeping_memory"]["candidates"]["idle step library"]["in_units"]
            what = "call with nothing due, over a plain step, freed memory kept"
            add(what, name, IDLE_LARGE if large else IDLE_SMALL, kept)
        for part, setting in (("unroll_steps", ""), ("unroll_steps_keeping_memory", ", freed memory kept")):
            calls = found[part]["candidates"] if part in found else {}
            for method, what in UNROLLS.items():
                if method in calls:
                    measured = calls[method]["in_units" if method.startswith("idle") else "over_hand"]
                    add(what + setting, name, OVER_HAND, measured)
        compiled = found["compile_s"]
        which = "joint step default" if "joint step default library" in compiled else "joint step"
        add(f"compile time of the {which}, over hand-written", name, COMPILE, compiled["over_hand"])
    return rows


def _network(found: dict[str, Any]) -> Iterable[str]:
    yield f"Neumann step {found['step_size']:g}, solver unroll={found['unroll']}."
    yield _timings(found["hypergradient"], "in gradients")
    yield _timings(found["steps"], "in plain steps")
    if "steps_keeping_memory" in found:
        yield "The same with an allocator that keeps freed memory:"
        yield _timings(found["steps_keeping_memory"], "in plain steps")
    if "unroll_steps" in found:
        part, unit = found["unroll_steps"], "in windows of 10 plain steps"
        yield (
            f"Unrolled differentiation, with steps of descent, on {part['machine']['date']}, {part['rounds']} rounds, "
            f"load {part['load'][0]:g}:"
        )
        yield _timings(part, unit)
        if "unroll_steps_keeping_memory" in found:
            yield "The same with an allocator that keeps freed memory:"
            yield _timings(found["unroll_steps_keeping_memory"], unit)
    seconds = {k: v for k, v in found["compile_s"].items() if k != "over_hand"}
    yield "Compile time: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()) + "."
    if "peak_rss_mib" in found:
        peaks = ", ".join(f"{which} {value:.0f} MiB" for which, value in found["peak_rss_mib"].items())
        yield f"Peak resident memory of a process that makes 20 calls: {peaks}."


def _timings(part: dict[str, Any], unit: str) -> str:
    rows = []
    for name, v in part["candidates"].items():
        per = 10 if name.startswith("window") else 1
        over = f"{v['over_hand']:.2f}" if "over_hand" in v else ""
        label = name + (", a step" if per > 1 else "")
        numbers = f"{v['cpu_ms'] / per:.2f}", f"{v['wall_ms'] / per:.2f}", f"{v['in_units'] / per:.2f}"
        rows.append((label, *numbers, over, f"{v['scratch_mib']:.1f}", f"{v['minor_faults'] / per:.0f}"))
    return table(("", "CPU ms", "wall ms", unit, "over hand", "scratch MiB", "page faults"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    reports = {"step_cost": step_cost, "hessian_modes": hessian_modes, "unroll_memory": unroll_memory}
    print(reports[path.stem](json.loads(path.read_text())))
