"""Which form of the Hessian product, and which loop around it, a linear solve should take.

    python benchmarks/hessian_modes.py [--quick] [--only mlp64,cnn] [--rounds 9] [--out DIR] [--merge]

In one run, candidates taking turns (``harness.py``), in gradients of the inner loss and in scratch memory:

 1. a solve by 10 Neumann terms with the library's loop and each way to write v ↦ Hv (``MODES``); where the
    benchmark unrolls the loop (convolutions) both in the loop and unrolled;
 2. a solve by 10 Neumann terms and by 10 conjugate gradient steps with vjp(grad) and each way to
    write the loop (``LOOPS``).

The solvers are the library's own: ``hypergrad.solvers._base.iterate`` is what 2 replaces. ``hypergrad.curvature``
and ``hypergrad.solvers._base`` rest their choices on these figures. Writes ``hessian_modes.json`` and, by
``report.py``, ``hessian_modes.md``.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import handwritten
import harness
import jax
import networks
import optax
import report
from jax import lax
from networks import Network, Tree

import hypergrad as hg
from hypergrad.solvers import _base, _krylov, _neumann

NAMES = ("mlp64", "mlp256", "mlp1024", "cnn", "transformer")
STEPS = 10

Loss = Callable[[Tree], jax.Array]
Product = Callable[[Tree], Tree]


def linearized(loss: Loss, params: Tree) -> Product:
    """Forward over reverse, linearized before the loop."""
    return jax.linearize(jax.grad(loss), params)[1]


def jvp_of_grad(loss: Loss, params: Tree) -> Product:
    """Forward over reverse, at every product."""
    return lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]


def vjp_of_grad(loss: Loss, params: Tree) -> Product:
    """Reverse over reverse, linearized before the loop: what the others are measured against."""
    _, pull_back = jax.vjp(jax.grad(loss), params)
    return lambda v: pull_back(v)[0]


def reverse_over_forward(loss: Loss, params: Tree) -> Product:
    """The gradient of a directional derivative, at every product: the library's choice."""
    return lambda v: jax.grad(lambda w: jax.jvp(loss, (w,), (v,))[1])(params)


MODES = {
    "linearize(grad)": linearized,
    "jvp(grad)": jvp_of_grad,
    "vjp(grad)": vjp_of_grad,
    "reverse over forward": reverse_over_forward,
}


def while_loop(step: Any, start: Any, *, length: int, unroll: int | bool) -> Any:
    """The library's choice: stops when done."""
    del unroll
    return _base.iterate(step, start, length=length, unroll=1)


def scan(step: Any, start: Any, *, length: int, unroll: int | bool) -> Any:
    """Every step, whether done or not."""
    del unroll
    return lax.scan(lambda c, _: (step(c), None), start, length=length)[0]


def scan_of_cond(step: Any, start: Any, *, length: int, unroll: int | bool) -> Any:
    """Steps that cost nothing once done, of a length known beforehand."""
    del unroll
    return lax.scan(lambda c, _: (lax.cond(c.done, lambda c: c, step, c), None), start, length=length)[0]


def unrolled(step: Any, start: Any, *, length: int, unroll: int | bool) -> Any:
    """The library's ``unroll=True``: no loop, and steps after done are thrown away."""
    del unroll
    return _base.iterate(step, start, length=length, unroll=True)


LOOPS = {"while_loop": while_loop, "scan": scan, "scan of cond": scan_of_cond, "unrolled scan": unrolled}
REFERENCE_MODE, CHOSEN_LOOP = "vjp(grad)", "while_loop"


def candidate_name(solver: str, mode: str, loop: str) -> str:
    """Return the name under which a candidate is recorded."""
    return f"{solver}, {mode}, {loop}"


def candidates(network: Network, step_size: float) -> dict[str, Any]:
    """Return compiled functions of ``arguments(network)``: the gradient, and every solve."""
    loss = handwritten.inner_loss(network)
    solvers = {
        "neumann": hg.solvers.neumann(STEPS, step_size=step_size),
        "cg": hg.solvers.cg(STEPS, rtol=0.0),
    }

    def compiled(solver: str, mode: str, loop: str) -> Any:
        def solve(params: Tree, log_decays: Tree, batch: Tree, b: Tree) -> Any:
            product = MODES[mode](lambda w: loss(w, log_decays, batch), params)
            x, _, info = solvers[solver].solve(hg.solvers.LinearSystem(product), b, ())
            return x, info

        with mock.patch.object(_neumann, "iterate", LOOPS[loop]), mock.patch.object(_krylov, "iterate", LOOPS[loop]):
            return jax.jit(solve).lower(*arguments(network)).compile()

    mode_loops = [CHOSEN_LOOP, *(["unrolled scan"] if network.unroll is True else [])]
    wanted = [("neumann", mode, loop) for loop in mode_loops for mode in MODES]
    wanted += [(solver, REFERENCE_MODE, loop) for solver in solvers for loop in LOOPS]
    found = {candidate_name(*which): compiled(*which) for which in dict.fromkeys(wanted)}

    def gradient(params: Tree, log_decays: Tree, batch: Tree, b: Tree) -> Tree:
        del b
        return jax.grad(loss)(params, log_decays, batch)

    return {"gradient": jax.jit(gradient).lower(*arguments(network)).compile(), **found}


def arguments(network: Network) -> tuple[Tree, Tree, Tree, Tree]:
    """Return where to solve, and the right-hand side: the outer gradient."""
    b = jax.grad(network.cross_entropy)(network.params, network.outer_batch)
    return network.params, network.log_decays, network.inner_batch, b


def measure(name: str, scale: networks.Scale, rounds: int, min_ms: float) -> dict[str, Any]:
    """Measure one network."""
    network = networks.build(name, scale)
    step_size = round(0.5 / handwritten.stiffness(network), 5)
    compiled = candidates(network, step_size)
    at = arguments(network)
    solutions = {n: fn(*at) for n, fn in compiled.items() if n != "gradient"}
    timings = harness.interleave(
        {n: functools.partial(fn, *at) for n, fn in compiled.items()}, rounds=rounds, min_ms=min_ms
    )
    records: dict[str, Any] = {}
    for which, timing in timings.items():
        records[which] = {
            **timing.record(),
            "scratch_mib": round(harness.scratch_mib(compiled[which]), 2),
            "in_units": round(harness.ratio(timings, which, "gradient"), 3),
        }
        if which != "gradient":
            solver, mode, loop = which.split(", ")
            chosen_loop = loop if mode != REFERENCE_MODE else CHOSEN_LOOP
            chosen = candidate_name(solver, REFERENCE_MODE, chosen_loop)
            (x, info), (expected, _) = solutions[which], solutions[chosen]
            difference = optax.tree.norm(optax.tree.sub(x, expected)) / optax.tree.norm(expected)
            records[which] |= {
                "solver": solver,
                "mode": mode,
                "loop": loop,
                "over_chosen": round(harness.ratio(timings, which, chosen), 3),
                "solver_steps": int(info.num_products),
                "difference": float(f"{float(difference):.1e}"),
            }
    return {"weights": network.num_weights, "step_size": step_size, "unit": "gradient", "candidates": records}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    args = harness.arguments(__doc__ or "", NAMES, Path(__file__).parent / "results").parse_args(argv)
    names = ["mlp64"] if args.quick else args.only.split(",")
    rounds, min_ms = (3, 5.0) if args.quick else (args.rounds, 60.0)
    scale = networks.Scale(inputs=32, batch=16) if args.quick else networks.Scale()
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    record: dict[str, Any] = {"steps": STEPS, "quick": args.quick, "networks": {}}
    if args.merge:
        record = harness.merged(args.out, "hessian_modes", record)
    for name in names:
        print(f"{name} ...", flush=True)
        found = {**harness.circumstances(rounds), **measure(name, scale, rounds, min_ms)}
        record["networks"] = harness.in_order({**record["networks"], name: found}, NAMES)
        harness.write(args.out, "hessian_modes", record, report.hessian_modes(record))
    print(report.hessian_modes(record))
    return record


if __name__ == "__main__":
    main()
