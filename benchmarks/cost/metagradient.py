"""What the gradient of a whole training run costs, and whether its plan says so before.

    python benchmarks/cost/metagradient.py [--quick] [--steps 2500,10000] [--long 100000] [--out DIR]

MLPs with one log decay per weight, Adam with ``eps_root``, batches of 32 drawn from 4,096 examples, segments of 50
steps, ten slots in host memory: 270 thousand weights over runs of several lengths, 10 million over three segments, for
the memory; and a model of 110 weights over a long run, in segments of 500. Each run is in a process of its own: a
first call, which compiles, a plan, the call that counts, a plan.

    over the schedule    seconds / (segments that ran forward · seconds forward + segments · seconds of a vjp)
    copies               device memory of a segment's vjp over the bytes of the weights
    resident             what the largest resident set of the process grew by in the first call

The seconds of one segment are means of the two plans. Writes ``metagradient.json`` and
``metagradient.md``.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

EXAMPLES, BATCH, SLOTS = 4096, 32, 10
MODELS = {  # layers, and steps per segment
    "270 k": ((256, 512, 256, 16), 50),
    "10 M": ((1024, 3072, 2048, 16), 50),
    "110": ((8, 10, 3), 500),
}
QUICK = {"270 k": ((8, 16, 4), 5), "10 M": ((8, 32, 4), 5), "110": ((8, 10, 3), 5)}
MIB = 2**20


def problem_of(layers: tuple[int, ...], steps: int) -> tuple[Any, Any, Any, Any]:
    """Return the problem, ``batch_at``, variables and a validation batch."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(EXAMPLES, layers[0])), jnp.float32)
    y = jnp.asarray(jnp.argmax(x @ rng.normal(size=(layers[0], layers[-1])), axis=1), jnp.int32)
    rows = jnp.asarray(rng.integers(0, EXAMPLES // 2, (steps, BATCH)), jnp.int32)

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        hidden, labels = batch
        for kernel in params[:-1]:
            hidden = jnp.tanh(hidden @ kernel)
        return optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ params[-1], labels).mean()

    problem = hg.reparameterize(
        hg.BilevelProblem(
            lambda w, decay, batch, _key: cross_entropy(w, batch) + hg.penalties.l2(w, decay),
            lambda w, _decay, batch, _key: cross_entropy(w, batch),
        ),
        hg.bijectors.exp(),
    )
    params = [jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), jnp.float32) for a, b in itertools.pairwise(layers)]
    decays = jax.tree.map(lambda w: jnp.full_like(w, -9.0), params)
    half = x[EXAMPLES // 2 :][:512], y[EXAMPLES // 2 :][:512]
    return problem, lambda i: hg.IndexedBatch((x, y), rows[i]), (params, decays), half


def measured(model: str, steps: int, quick: bool) -> dict[str, Any]:
    """Plan and take one metagradient in this process."""
    layers, segment = (QUICK if quick else MODELS)[model]
    problem, batch_at, variables, valid = problem_of(layers, steps)
    rule = optax.adam(1e-4, eps_root=1e-8)
    settings: dict[str, Any] = {"batch_at": batch_at, "segment": segment, "store": hg.stores.host(SLOTS)}
    plan_of = hg.metagradient_plan(problem, rule, num_steps=steps, **settings)
    fn = hg.metagradient(problem, rule, num_steps=steps, **settings)
    before, begun = harness.peak_rss_mib(), time.perf_counter()
    fn(*variables, valid, key=0)
    first_seconds, resident = time.perf_counter() - begun, harness.peak_rss_mib() - before
    in_all = harness.peak_rss_mib()
    plans = [plan_of(*variables, valid, key=0)]
    begun = time.perf_counter()
    (value, _), info = fn(*variables, valid, key=0)
    seconds = time.perf_counter() - begun
    plans.append(plan_of(*variables, valid, key=0))
    plan = plans[0]
    forward, reverse = (statistics.mean(getattr(p, f"{way}_seconds") for p in plans) for way in ("forward", "reverse"))
    schedule = info.num_forward * forward + plan.num_segments * reverse
    weights = sum(leaf.size for leaf in variables[0])
    return {
        "model": model,
        "weights": weights,
        "steps": steps,
        "segment": segment,
        "segments": plan.num_segments,
        "status": info.status.name,
        "value": float(value),
        "forward": info.num_forward,
        "forward_planned": plan.num_forward,
        "forward_seconds": forward,
        "reverse_seconds": reverse,
        "first_seconds": first_seconds,
        "seconds": seconds,
        "over_schedule": seconds / schedule,
        "over_plan": seconds / plan.seconds,
        "copies": plan.device_bytes / (4 * weights),
        "planned_mib": (plan.device_bytes + plan.host_bytes) / MIB,
        "resident_mib": resident,
        "resident_in_all_mib": in_all,
        "largest_cotangent": float(np.max(info.cotangent_norms)),
        **harness.circumstances(1),
    }


def report(record: dict[str, Any]) -> str:
    """Return the table."""
    lines = ["# The gradient of a whole training run", "", ABOUT, ""]
    head = ["weights", "steps", "segments", "forward, planned", "seconds", "over its schedule", "over its plan"]
    head += ["copies in a vjp", "planned, MiB", "resident, MiB", "in all"]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in record["rows"]:
        cells = [
            f"{row['weights']:,}",
            f"{row['steps']:,}",
            f"{row['segments']:,}",
            f"{row['forward']:,}, {row['forward_planned']:,}",
            f"{row['seconds']:.0f}",
            f"{row['over_schedule']:.2f}",
            f"{row['over_plan']:.2f}",
            f"{row['copies']:.0f}",
            f"{row['planned_mib']:,.0f}",
            f"{row['resident_mib']:,.0f}",
            f"{row['resident_in_all_mib']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", harness.where(record["machine"])]
    return "\n".join(lines) + "\n"


ABOUT = """Adam, one log decay per weight. "over its schedule": the seconds over those of the schedule's forward
segments and vjps, each timed alone in the same process; "over its plan": over what `hg.metagradient_plan` said before.
"copies": the device memory of a segment's vjp over the bytes of the weights; the optimizer's state and the decays are
in it. "planned" is device and host memory; "resident" is what the largest resident set grew by, compilation and what
the allocator holds back with it; "in all": of the process. `python benchmarks/cost/metagradient.py` writes this."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps: does it run?")
    parser.add_argument("--steps", default="2500,10000", help="of the run of 270 thousand weights, with commas")
    parser.add_argument("--long", type=int, default=100_000, help="steps of the small model")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "STEPS"), help="one row, in this process")
    args = parser.parse_args(argv)
    if args.one:
        row = measured(args.one[0], int(args.one[1]), args.quick)
        print(json.dumps(row))
        return row
    flags = ["--quick"] if args.quick else []
    cases = (
        [("270 k", steps) for steps in ("20", "60")] if args.quick else [("270 k", s) for s in args.steps.split(",")]
    )
    cases += [("10 M", "15" if args.quick else "150"), ("110", "40" if args.quick else str(args.long))]
    record: dict[str, Any] = {**harness.circumstances(1), "rows": []}
    for case in cases:
        record["rows"].append(harness.in_a_process(__file__, [*flags, "--one", *case]))
        print({k: v for k, v in record["rows"][-1].items() if k != "machine"}, flush=True)
        harness.write(args.out, "metagradient", record, report(record))
    return record


if __name__ == "__main__":
    main()
