"""What a self-tuning step costs, in plain training steps of the same network, and beside the same by hand.

    python benchmarks/self_tuning_cost.py [--quick] [--only mlp256,mlp1024] [--rounds 9] [--out DIR] [--merge]

The network is that of ``experiments/self_tuning_mlp`` at 784-H-H-10 with batches of 128, so a plain step draws the
noise and three masks too. In one run, candidates taking turns (``harness.py``):

 1. an inner step of STN and of Delta-STN, by ``hg.bilevel`` on a call on which nothing outer is due;
 2. the hypergradient on a validation batch of the same size: what an outer step adds;
 3. the plain step and both inner steps by hand (``handwritten_self_tuning.py``).

The unit is the library user's plain step: gradient of the training loss, Adam. Writes ``self_tuning_cost.json`` and
``self_tuning_cost.md``.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import handwritten_self_tuning as by_hand
import harness
import jax
import jax.numpy as jnp
import optax
import self_tuning_report as report
from candidates import Candidate, compile_candidate

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import self_tuning_mlp as example
from experiments.common import datasets

WIDTHS = {"mlp256": 256, "mlp1024": 1024}
UNIT, NEVER, SCALE = "plain step", 10**9, 1.0
TARGETS = {"STN step": 2.5, "Delta-STN step": 3.2}


def candidates(hidden: int, inputs: int, batch_size: int) -> dict[str, Candidate]:
    """Return the plain step and all others, compiled."""
    key, optimizer = jax.random.key(0), optax.adam(1e-3)
    x_key, y_key = jax.random.split(key)
    labels = jax.random.randint(y_key, (batch_size,), 0, datasets.NUM_CLASSES)
    batch = datasets.Split(jax.random.uniform(x_key, (batch_size, inputs)), labels)
    model = example.MLP(hidden)
    plain = example.make_problem(model)
    params = model.init(key, batch.x[:1], train=False)["params"]
    values = jax.tree.map(lambda high: jnp.float32(high / 4), example.HIGH)
    hyperparams = hg.unconstrain(example.BOUNDS, values)

    def plain_step(params: Any, state: Any, values: Any, batch: Any, key: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(plain.inner_loss)(params, values, batch, key), state, params)
        return optax.apply_updates(params, updates), state

    found = {UNIT: compile_candidate(plain_step, params, optimizer.init(params), values, batch, key, carried=2)}
    for name, form in {"STN": hg.responses.stn(), "Delta-STN": hg.responses.delta_stn()}.items():
        problem, _ = example.self_tune(plain, example.Settings(hidden=hidden, scale=SCALE), form)
        tx = hg.bilevel(hg.direct(problem), inner_optimizer=optimizer, outer_optimizer=optimizer, every=NEVER)
        start = hg.responses.init(problem, key, params, hyperparams, batch)
        variables = hg.BilevelParams(start, hyperparams)

        def step(tx: Any, variables: Any, state: Any, inner_batch: Any, outer_batch: Any) -> Any:
            updates, state = tx.update(None, state, variables, inner_batch=inner_batch, outer_batch=outer_batch)
            return optax.apply_updates(variables, updates), state

        at = variables, tx.init(variables), batch, batch
        found[f"{name} step"] = compile_candidate(functools.partial(step, tx), *at, carried=2)
        fn = hg.value_and_hypergrad(hg.direct(problem))
        found[f"{name} hypergradient"] = compile_candidate(
            functools.partial(fn, key=key), start, hyperparams, batch, batch
        )

    sizes, high = (inputs, hidden, hidden, datasets.NUM_CLASSES), jnp.asarray(jax.tree.leaves(example.HIGH))
    at_hand, gate_std = jnp.full(len(high), -1.0), {"STN": 0.01, "Delta-STN": 0.0}
    losses = {"STN": by_hand.stn_loss(high, SCALE), "Delta-STN": by_hand.delta_stn_loss(high, SCALE)}
    weights, _ = by_hand.init(key, sizes, len(high), 0.0)
    steps = {UNIT: (by_hand.plain_loss(high), weights)}
    for name, loss in losses.items():
        steps[f"{name} step"] = loss, by_hand.init(key, sizes, len(high), gate_std[name])
    for name, (loss, own) in steps.items():
        arguments = own, optimizer.init(own), at_hand, batch, key
        found[f"{name}, by hand"] = compile_candidate(by_hand.step(loss, optimizer), *arguments, carried=2)
    return found


def measure(hidden: int, inputs: int, batch_size: int, rounds: int, min_ms: float) -> dict[str, Any]:
    """Return every candidate's timing, in plain steps and beside the hand-written one."""
    compiled = candidates(hidden, inputs, batch_size)
    timings = harness.interleave({n: c.thunk() for n, c in compiled.items()}, rounds=rounds, min_ms=min_ms)
    found = {}
    for name, timing in timings.items():
        found[name] = {
            **timing.record(),
            "scratch_mib": round(harness.scratch_mib(compiled[name].compiled), 2),
            "in_plain_steps": round(harness.ratio(timings, name, UNIT), 3),
        }
        if f"{name}, by hand" in timings:
            found[name]["over_hand"] = round(harness.ratio(timings, name, f"{name}, by hand"), 3)
    return {**harness.circumstances(rounds), "hidden": hidden, "batch": batch_size, "candidates": found}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    args = harness.arguments(__doc__ or "", tuple(WIDTHS), Path(__file__).parent / "results").parse_args(argv)
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    record: dict[str, Any] = {"quick": args.quick, "scale": SCALE, "targets": TARGETS, "networks": {}}
    if args.merge:
        record = harness.merged(args.out, "self_tuning_cost", record)
    for name in ["mlp256"] if args.quick else args.only.split(","):
        if args.quick:
            found = measure(16, inputs=32, batch_size=16, rounds=3, min_ms=5.0)
        else:
            found = measure(WIDTHS[name], inputs=784, batch_size=128, rounds=args.rounds, min_ms=200.0)
        record["networks"] = harness.in_order({**record["networks"], name: found}, tuple(WIDTHS))
        harness.write(args.out, "self_tuning_cost", record, report.costs(record))
    print(report.costs(record))
    return record


if __name__ == "__main__":
    main()
