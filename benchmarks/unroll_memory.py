"""Memory and time of a hypergradient through K training steps, by ways to differentiate and to checkpoint them.

    python benchmarks/unroll_memory.py [--quick] [--only mlp256,cnn] [--rounds 9] [--out DIR] [--merge]

For each network, inner optimizer and K, in one run, candidates taking turns (``harness.py``), one log decay a weight:

 1. in reverse with no checkpoint, one a step, and one every c ≈ √K steps: by hand, and by the library with its mixed
    mode and without; the library's default is among them;
 2. forward, for one decay of all weights: by hand and by the library;
 3. jaxopt's unrolled solver, where it is installed; it takes all steps on one batch.

The unit is the same K steps without differentiation. Candidates must agree: each is compared to the hand-written one
without checkpoints. With mlp1024 goes a run of 1,000 steps in a process of its own (``unroll_long.py``). Writes
``unroll_memory.json`` and, by ``report.py``, ``unroll_memory.md``.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import handwritten
import handwritten_unroll
import harness
import jax
import jax.numpy as jnp
import networks
import optax
import peers
import report
import unroll_long
from candidates import Candidate, compile_candidate, library_problem
from networks import Network, Tree

import hypergrad as hg

GROUPS = {
    "mlp256": [("sgd", 10), ("sgd", 50), ("sgd", 200), ("adam", 10), ("adam", 50)],
    "mlp1024": [("sgd", 10), ("sgd", 50)],
    "cnn": [("sgd", 5)],
    "transformer": [("sgd", 10), ("sgd", 30)],
    "deep": [("sgd", 4)],
}
QUICK = {"mlp64": [("sgd", 6)]}
UNIT, REFERENCE = "forward unroll", "no checkpoint, hand"
AGREEMENT = 1e-3
"""Of single-precision hypergradients through the same steps, as a norm of the difference over that of the reference."""


def divisor_near_root(length: int) -> int | None:
    """Return the steps between checkpoints that keep fewest weights, K/c + c, among divisors 1 < c < K."""
    return min((c for c in range(2, length) if length % c == 0), key=lambda c: c + length // c, default=None)


def optimizer_named(name: str, network: Network) -> optax.GradientTransformation:
    """Return the inner optimizer: descent with a step that the initial Hessian allows, or Adam."""
    if name == "adam":
        return optax.adam(1e-4, eps_root=1e-8)
    return optax.sgd(round(0.5 / handwritten.stiffness(network), 5))


def window_of(network: Network, length: int) -> Tree:
    """Return ``length`` batches: the network's ten, over and over."""
    return jax.tree.map(lambda x: x[jnp.arange(length) % len(x)], network.window)


def reverse_candidates(
    network: Network, optimizer: optax.GradientTransformation, length: int
) -> tuple[dict[str, Candidate], str]:
    """Return candidates of item 1 with the unit, and the name of the library's default."""
    problem, unroll = library_problem(network), network.unroll
    window = window_of(network, length)
    at = network.params, network.log_decays, window, network.outer_batch
    steps = handwritten_unroll.rollout(network, optimizer, unroll=unroll)
    start = network.params, optimizer.init(network.params), network.log_decays, window
    found = {UNIT: compile_candidate(steps, *start)}

    def library(mode: hg.UnrollMode) -> Candidate:
        fn = hg.value_and_hypergrad(hg.unrolled(problem, mode), inner_optimizer=optimizer)
        return compile_candidate(functools.partial(fn, key=None), *at)

    intervals: list[tuple[str, int | None]] = [("no checkpoint", None), ("one a step", 1)]
    if unroll is not True and (near := divisor_near_root(length)):
        intervals += [(f"one every {near}", near)]
    default = ""
    for name, every in intervals:
        how: dict[str, Any] = {"checkpoint_every": every, "unroll": unroll}
        found[f"{name}, hand"] = compile_candidate(handwritten_unroll.reverse(network, optimizer, **how), *at)
        given: dict[str, Any] = {"checkpoint_every": every or math.inf, "unroll": unroll}
        found[f"{name}, library, not mixed"] = library(hg.reverse(**given, mixed=False))
        if every == hg.reverse().interval(length):
            default, given = f"{name}, library", {"unroll": unroll}
        if every:
            found[f"{name}, library"] = library(hg.reverse(**given))
    return found, default


def forward_candidates(network: Network, optimizer: optax.GradientTransformation, length: int) -> dict[str, Candidate]:
    """Return candidates of item 2."""
    fn = hg.value_and_hypergrad(
        hg.unrolled(library_problem(network), hg.forward(unroll=network.unroll)), inner_optimizer=optimizer
    )
    one = jax.tree.leaves(network.log_decays)[0].reshape(-1)[0]
    at = network.params, one, window_of(network, length), network.outer_batch
    by_hand = handwritten_unroll.forward(network, optimizer, unroll=network.unroll)
    return {
        "forward, hand": compile_candidate(by_hand, *at),
        "forward, library": compile_candidate(functools.partial(fn, key=None), *at),
    }


def difference(gradient: Tree, reference: Tree) -> float:
    """Return ‖gradient − reference‖/‖reference‖; one number is compared to the sum over all weights."""
    if not isinstance(gradient, dict):
        reference = sum(jnp.sum(x) for x in jax.tree.leaves(reference))
    return float(optax.tree.norm(optax.tree.sub(gradient, reference)) / optax.tree.norm(reference))


def time_group(network: Network, optimizer_name: str, length: int, rounds: int, min_ms: float) -> dict[str, Any]:
    """Measure one network with one optimizer and one K."""
    optimizer = optimizer_named(optimizer_name, network)
    found, default = reverse_candidates(network, optimizer, length)
    found |= forward_candidates(network, optimizer, length)
    references = dict.fromkeys(found, _gradient(found[REFERENCE]))
    record: dict[str, Any] = {"optimizer": optimizer_name, "steps": length, "unit": UNIT, "default": default}
    try:
        solve = peers.jaxopt_unroll(network, optimizer, length)
        at = network.params, network.log_decays, network.inner_batch, network.outer_batch
        found["jaxopt"] = compile_candidate(solve, *at)
        same = jax.tree.map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), network.inner_batch)
        references["jaxopt"] = _gradient(found[REFERENCE], network.params, network.log_decays, same, at[3])
        record["jaxopt"] = peers.version("jaxopt")
    except Exception as error:  # whatever it is that does not run with the present JAX is what we report
        found.pop("jaxopt", None)
        record["jaxopt"] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
    differences = {n: difference(_gradient(c), references[n]) for n, c in found.items() if n != UNIT}
    timings = harness.interleave({n: c.thunk() for n, c in found.items()}, rounds=rounds, min_ms=min_ms)
    record["candidates"] = {}
    for name, candidate in found.items():
        hand = name.split(", library")[0] + ", hand"
        entry = {
            **timings[name].record(),
            "in_units": round(harness.ratio(timings, name, UNIT), 3),
            "scratch_mib": round(harness.scratch_mib(candidate.compiled), 2),
            "compile_s": round(candidate.compile_s, 2),
        }
        if hand != name and hand in found:
            entry["over_hand"] = round(harness.ratio(timings, name, hand), 3)
        if f"{name}, not mixed" in found:
            entry["over_not_mixed"] = round(harness.ratio(timings, name, f"{name}, not mixed"), 3)
        if name in differences:
            entry["difference"] = float(f"{differences[name]:.1e}")
        record["candidates"][name] = entry
    wrong = {n: d for n, d in differences.items() if not d < AGREEMENT}
    if wrong:
        raise ValueError(f"{network.name}, {optimizer_name}, {length} steps: candidates differ from hand: {wrong}")
    return record


def _gradient(candidate: Candidate, *arguments: Any) -> Tree:
    result = candidate.compiled(*(arguments or candidate.arguments))
    return result[0][1] if isinstance(result[0], tuple) else result[1]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    parser = harness.arguments(__doc__ or "", tuple(GROUPS), Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    groups = QUICK if args.quick else {name: GROUPS[name] for name in args.only.split(",")}
    rounds, min_ms = (3, 5.0) if args.quick else (args.rounds, 60.0)
    scale = networks.Scale(inputs=32, batch=16) if args.quick else networks.Scale()
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    record: dict[str, Any] = {"quick": args.quick, "networks": {}, "long": {}}
    if args.merge:
        record = harness.merged(args.out, "unroll_memory", record)
    for name, wanted in groups.items():
        network = networks.build(name, scale)
        found: dict[str, Any] = {
            **harness.circumstances(rounds),
            "weights": network.num_weights,
            "params_mib": round(sum(x.nbytes for x in jax.tree.leaves(network.params)) / 2**20, 3),
            "groups": {},
        }
        for optimizer_name, length in wanted:
            print(f"{name}, {optimizer_name}, {length} steps ...", flush=True)
            group = time_group(network, optimizer_name, length, rounds, min_ms)
            found["groups"][f"{optimizer_name}, {length} steps"] = group
            record["networks"] = harness.in_order({**record["networks"], name: found}, (*QUICK, *GROUPS))
            harness.write(args.out, "unroll_memory", record, report.unroll_memory(record))
        if args.quick:
            record["long"] = unroll_long.measure(name, 60, scale)
        elif name == unroll_long.NAME:
            print(f"{name}, {unroll_long.STEPS} steps ...", flush=True)
            record["long"] = harness.in_a_process(unroll_long.__file__, [])
        harness.write(args.out, "unroll_memory", record, report.unroll_memory(record))
    print(report.unroll_memory(record))
    return record


if __name__ == "__main__":
    main()
