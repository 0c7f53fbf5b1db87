"""What a hypergradient and a joint step cost, beside the same thing written by hand in plain JAX.

    python benchmarks/step_cost.py [--quick] [--only mlp64,cnn] [--rounds 9] [--out DIR] [--merge [--unrolls]]

In one run, candidates taking turns (``harness.py``):

 1. a hypergradient (Neumann 10 and 20, Neumann 10 with its own step, CG 10), in gradients of the inner loss;
 2. a joint step, an outer step every 10: ``hg.bilevel`` by the step (Neumann 10, the default solver, two of its
    products) and by the window, over a plain Adam step;
 3. a call of ``update`` on which nothing outer is due, over a plain Adam step;
 4. a hypergradient through 10 and 50 steps of descent (``unroll_steps.py``), in windows of 10 plain ones;
 5. ``hg.bilevel`` through windows of 10 steps, on a call with an outer step and on one without, likewise;
 6. compile time of the joint step with the default solver;
 7. scratch memory of every compiled function, and the process's peak resident memory.

Writes ``step_cost.json`` and, by ``report.py``, ``step_cost.md``. The calls of 2 to 5 are timed a second time in
a process whose allocator keeps freed memory (``KEEPING`` below): glibc otherwise hands the scratch memory of each
call back to the kernel and pays for its pages again on the next.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import handwritten
import harness
import jax
import jax.numpy as jnp
import networks
import optax
import report
import unroll_steps
from candidates import Candidate, compile_candidate, library_problem
from networks import Network, Tree

import hypergrad as hg

NAMES = ("mlp64", "mlp256", "mlp1024", "cnn", "transformer")
EVERY = 10
INNER, OUTER = optax.adam(1e-4), optax.adam(1e-3)

KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc settings under which freed memory stays with the process."""


def hypergradients(network: Network, step_size: float, everything: bool) -> dict[str, Candidate]:
    """Return the gradient and ways to a hypergradient, the library's and the hand-written."""
    problem = library_problem(network)
    unroll = network.unroll
    at = network.params, network.log_decays, network.inner_batch, network.outer_batch
    loss = handwritten.inner_loss(network)
    found = {"gradient": compile_candidate(jax.grad(loss), *at[:3])}

    def both(name: str, solver: hg.LinearSolver, by_hand: Any) -> None:
        found[f"{name} library"] = compile_candidate(
            functools.partial(hg.value_and_hypergrad(hg.implicit(problem, solver)), key=None), *at
        )
        found[f"{name} hand"] = compile_candidate(by_hand, *at)

    for number in (10, 20) if everything else (10,):
        both(
            f"neumann {number}",
            hg.solvers.neumann(number, step_size=step_size, unroll=unroll),
            handwritten.neumann(network, number, step_size, unroll),
        )
    if unroll is True:
        both(
            "neumann 10 in a loop",
            hg.solvers.neumann(10, step_size=step_size),
            handwritten.neumann(network, 10, step_size, unroll=1),
        )
    both("cg 10", hg.solvers.cg(10, rtol=0.0, unroll=unroll), handwritten.cg(network, 10, unroll))

    if not everything:
        return found
    warm_fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.neumann(10, unroll=unroll)))

    def warm(state: Tree, *rest: Any) -> Any:
        (value, gradient), info = warm_fn(*rest, key=None, state=state)
        return info.state, value, gradient

    def warm_by_hand(direction: Tree, *rest: Any) -> Any:
        value, gradient, direction = by_hand(rest[0], rest[1], direction, *rest[2:])
        return direction, value, gradient

    by_hand = handwritten.neumann_warm(network, 10, unroll)
    start = warm_fn(*at, key=None)[1].state
    direction = jax.grad(loss)(*at[:3])
    found["neumann 10 own step library"] = compile_candidate(warm, start, *at, carried=1)
    found["neumann 10 own step hand"] = compile_candidate(warm_by_hand, direction, *at, carried=1)
    return found


def steps(network: Network, step_size: float) -> dict[str, tuple[Any, tuple[Any, ...], int]]:
    """Return (function, arguments, number carried) of a plain step and of every joint step."""
    problem = library_problem(network)
    estimator = hg.implicit(problem, hg.solvers.neumann(10, step_size=step_size, unroll=network.unroll))
    hypergradient = handwritten.neumann(network, 10, step_size, network.unroll)
    inner_batch, outer_batch = network.inner_batch, network.outer_batch
    pair = network.params, network.log_decays
    variables = hg.BilevelParams(*pair)
    by_hand = INNER.init(network.params), OUTER.init(network.log_decays), jnp.zeros((), jnp.int32)

    def library(every: int, estimator: hg.Estimator = estimator) -> tuple[Any, tuple[Any, ...], int]:
        tx = hg.bilevel(estimator, inner_optimizer=INNER, outer_optimizer=OUTER, every=every)

        def step(variables: Any, state: Any, inner_batch: Tree, outer_batch: Tree) -> Any:
            grads = jax.grad(problem.inner_loss)(*variables, inner_batch, None)
            updates, state = tx.update(grads, state, variables, inner_batch=inner_batch, outer_batch=outer_batch)
            return optax.apply_updates(variables, updates), state

        return step, (variables, tx.init(variables), inner_batch, outer_batch), 2

    fused = hg.bilevel(estimator, inner_optimizer=INNER, outer_optimizer=OUTER, window=EVERY)

    def library_window(variables: Any, state: Any, window: Tree, outer_batch: Tree) -> Any:
        updates, state = fused.update(None, state, variables, inner_batch=window, outer_batch=outer_batch)
        return optax.apply_updates(variables, updates), state

    def hand(every: int) -> Any:
        return handwritten.joint_step(network, INNER, OUTER, hypergradient, every)

    window = network.window
    zeros = jax.tree.map(jnp.zeros_like, network.params), jnp.zeros(())
    few = hg.implicit(problem, hg.solvers.cg(2, relative_damping=0.01, warm_start=True))

    def warm_by_hand(products: int) -> tuple[Any, tuple[Any, ...], int]:
        fn = handwritten.warm_joint_step(network, INNER, OUTER, handwritten.warm_cg(network, products, 0.01), EVERY)
        return fn, (pair, (*by_hand, zeros), inner_batch, outer_batch), 2

    return {
        "plain step": (
            handwritten.plain_step(network, INNER),
            (network.params, by_hand[0], network.log_decays, inner_batch),
            2,
        ),
        "joint step library": library(EVERY),
        "joint step hand": (hand(EVERY), (pair, by_hand, inner_batch, outer_batch), 2),
        "joint step default library": library(EVERY, hg.implicit(problem)),
        "joint step default hand": warm_by_hand(3),
        "joint step 2 products library": library(EVERY, few),
        "joint step 2 products hand": warm_by_hand(2),
        "idle step library": library(NEVER),
        "idle step hand": (hand(NEVER), (pair, by_hand, inner_batch, outer_batch), 2),
        "window library": (library_window, (variables, fused.init(variables), window, outer_batch), 2),
        "window hand": (
            handwritten.joint_window(network, INNER, OUTER, hypergradient),
            (pair, by_hand, window, outer_batch),
            2,
        ),
    }


NEVER = 10**9
CYCLES = dict.fromkeys(
    (f"joint step{kind} {whose}" for kind in ("", " default", " 2 products") for whose in ("library", "hand")), EVERY
)


class Effort(NamedTuple):
    """How much to measure.

    Attributes:
      rounds: samples of every candidate.
      compile_rounds: times that each joint step is compiled.
      everything: False to leave out 20 Neumann terms, Neumann's own step, fused windows and unrolls of 50 steps.
      min_ms: length of a sample.
    """

    rounds: int
    compile_rounds: int = 3
    everything: bool = True
    min_ms: float = 60.0


QUICK = Effort(rounds=3, compile_rounds=1, everything=False, min_ms=5.0)


def time_hypergradients(network: Network, step_size: float, effort: Effort) -> dict[str, Any]:
    """Time item 1 for one network."""
    return _timed(hypergradients(network, step_size, effort.everything), "gradient", effort)


def time_steps(network: Network, step_size: float, effort: Effort) -> dict[str, Any]:
    """Time items 2 and 3 for one network."""
    wanted = {n: v for n, v in steps(network, step_size).items() if effort.everything or not n.startswith("window")}
    compiled = {n: compile_candidate(f, *a, carried=c) for n, (f, a, c) in wanted.items()}
    return _timed(compiled, "plain step", effort)


def time_unrolls(network: Network, step_size: float, effort: Effort) -> dict[str, Any]:
    """Time items 4 and 5 for one network."""
    long = effort.everything and network.unroll is not True  # convolutions want no loop, and 50 steps want one
    checkpoints = {10: 1, 50: 5} if long else {10: 1}
    candidates = unroll_steps.candidates(network, optax.sgd(step_size), OUTER, checkpoints)
    return _timed(candidates, unroll_steps.UNIT, effort)


def _timed(candidates: dict[str, Candidate], unit: str, effort: Effort) -> dict[str, Any]:
    thunks = {name: candidate.thunk() for name, candidate in candidates.items()}
    timings = harness.interleave(thunks, rounds=effort.rounds, min_ms=effort.min_ms, multiple=CYCLES)
    records = {}
    for name, timing in timings.items():
        records[name] = {
            **timing.record(),
            "scratch_mib": round(harness.scratch_mib(candidates[name].compiled), 2),
            "in_units": round(harness.ratio(timings, name, unit), 3),
        }
        if name.endswith(" library"):
            hand = name.removesuffix("library") + "hand"
            records[name]["over_hand"] = round(harness.ratio(timings, name, hand), 3)
            records[name] |= _solver_steps(thunks[name])
    return {"unit": unit, "candidates": records}


def _solver_steps(thunk: harness.Thunk) -> dict[str, int]:
    """Return how many products the library says its last solve took: a solve that broke off would look cheap."""
    results = thunk(), getattr(thunk, "held", [])
    infos = [x for x in jax.tree.leaves(results, is_leaf=_is_solve_info) if _is_solve_info(x)]
    return {"solver_steps": int(infos[0].num_products)} if infos else {}


def _is_solve_info(x: Any) -> bool:
    return isinstance(x, hg.SolveInfo)


PARTS = {"steps": time_steps, "unroll_steps": time_unrolls}
"""What is timed a second time in a process that keeps freed memory."""


def compile_times(network: Network, step_size: float, rounds: int) -> dict[str, Any]:
    """Return seconds to trace, lower and compile the joint step, the library's and the hand-written in turn."""
    seconds: dict[str, list[float]] = {"joint step default library": [], "joint step default hand": []}
    for _ in range(rounds):
        for name, samples in seconds.items():
            jax.clear_caches()
            fn, arguments, carried = steps(network, step_size)[name]
            start = time.process_time()
            compile_candidate(fn, *arguments, carried=carried)
            samples.append(time.process_time() - start)
    pairs = zip(*seconds.values(), strict=True)
    return {
        **{name: round(statistics.median(samples), 3) for name, samples in seconds.items()},
        "over_hand": round(statistics.median(a / b for a, b in pairs), 3),
    }


def peak_memory(name: str, which: str, scale: networks.Scale) -> float:
    """Train for 2·EVERY calls in this process and return its peak resident memory in MiB."""
    network = networks.build(name, scale)
    fn, arguments, carried = steps(network, step_size=0.01)[which]
    call = jax.jit(fn, donate_argnums=tuple(range(carried)))
    held = list(jax.tree.map(jnp.copy, arguments[:carried]))
    for _ in range(2 * EVERY):
        held[:] = jax.block_until_ready(call(*held, *arguments[carried:]))[:carried]
    return harness.peak_rss_mib()


def measure(name: str, scale: networks.Scale, effort: Effort) -> dict[str, Any]:
    """Measure one network: everything but what needs a process of its own."""
    network = networks.build(name, scale)
    step_size = _step_size(network)
    record: dict[str, Any] = {"weights": network.num_weights, "step_size": step_size, "unroll": network.unroll}
    record["hypergradient"] = time_hypergradients(network, step_size, effort)
    record["steps"] = time_steps(network, step_size, effort)
    record["unroll_steps"] = {**harness.circumstances(effort.rounds), **time_unrolls(network, step_size, effort)}
    record["compile_s"] = compile_times(network, step_size, effort.compile_rounds)
    return record


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    parser = harness.arguments(__doc__ or "", NAMES, Path(__file__).parent / "results")
    parser.add_argument("--unrolls", action="store_true", help="4 and 5 alone, of networks in the file; with --merge")
    parser.add_argument("--part", choices=("all", *PARTS, "peak"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--which", default="plain step", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = ["mlp64"] if args.quick else args.only.split(",")
    effort = QUICK if args.quick else Effort(args.rounds)
    scale = networks.Scale(inputs=32, batch=16) if args.quick else networks.Scale()
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    if args.part == "peak":
        print(json.dumps(peak_memory(names[0], args.which, scale)))
        return {}
    if args.part in PARTS:
        network = networks.build(names[0], scale)
        print(json.dumps(PARTS[args.part](network, _step_size(network), effort)))
        return {}

    record: dict[str, Any] = {"every": EVERY, "quick": args.quick, "allocator": KEEPING, "networks": {}}
    if args.merge:
        record = harness.merged(args.out, "step_cost", record)
    for name in names:
        print(f"{name} ...", flush=True)
        circumstances = harness.circumstances(effort.rounds)
        child = ["--only", name, "--rounds", str(effort.rounds), "--part"]
        if args.unrolls:
            unrolls = {**circumstances, **harness.in_a_process(__file__, [*child, "unroll_steps"])}
            found = {**record["networks"][name], "unroll_steps": unrolls}
        else:
            found = {**circumstances, **measure(name, scale, effort)}
        if not args.quick:
            for part in ["unroll_steps"] if args.unrolls else PARTS:
                found[f"{part}_keeping_memory"] = harness.in_a_process(__file__, [*child, part], KEEPING)
        if name == "mlp1024" and not args.unrolls:
            child = ["--only", name, "--part", "peak", "--which"]
            found["peak_rss_mib"] = {
                which: round(harness.in_a_process(__file__, [*child, which]), 1)
                for which in ("plain step", "joint step library", "joint step default library", "joint step hand")
            }
        record["networks"] = harness.in_order({**record["networks"], name: found}, NAMES)
        _save(args.out, record)
    print(report.step_cost(record))
    return record


def _step_size(network: Network) -> float:
    return round(0.5 / handwritten.stiffness(network), 5)


def _save(folder: Path, record: dict[str, Any]) -> None:
    harness.write(folder, "step_cost", record, report.step_cost(record))


if __name__ == "__main__":
    main()
