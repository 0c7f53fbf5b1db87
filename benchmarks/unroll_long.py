"""One hypergradient through 1,000 training steps of 1.9 million weights: peak memory of the process, and time.

    python benchmarks/unroll_long.py [--steps 1000]

By ``hg.value_and_hypergrad(hg.unrolled(...))`` with its default checkpoints, batches of 256 given by index. A process
of its own, since its peak of resident memory is what is measured: it holds data, compiler and all. Prints JSON.
"""

import argparse
import functools
import json
import time
from typing import Any

import handwritten
import harness
import jax
import networks
import numpy as np
import optax
from candidates import compile_candidate, library_problem

import hypergrad as hg

NAME, STEPS = "mlp1024", 1000


def measure(name: str, steps: int, scale: networks.Scale) -> dict[str, Any]:
    """Compute the hypergradient once and return its cost."""
    network = networks.build(name, scale)
    optimizer = optax.sgd(round(0.5 / handwritten.stiffness(network), 5))
    examples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), network.window)
    count = len(jax.tree.leaves(examples)[0])
    indices = np.random.default_rng(0).integers(0, count, (steps, scale.batch), dtype=np.int32)
    fn = hg.value_and_hypergrad(hg.unrolled(library_problem(network)), inner_optimizer=optimizer)
    batches = hg.IndexedBatch(examples, jax.numpy.asarray(indices))
    at = network.params, network.log_decays, batches, network.outer_batch
    candidate = compile_candidate(functools.partial(fn, key=None), *at)
    before, cpu, wall = harness.peak_rss_mib(), time.process_time(), time.perf_counter()
    (value, _), info = jax.block_until_ready(candidate.compiled(*at))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if info.skipped:
        raise ValueError(f"after {steps} steps value {float(value)} or hypergradient is not finite")
    return {
        **harness.circumstances(rounds=1),
        "network": name,
        "weights": network.num_weights,
        "batch": scale.batch,
        "steps": steps,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "compile_s": round(candidate.compile_s, 2),
        "scratch_mib": round(harness.scratch_mib(candidate.compiled), 1),
        "peak_rss_before_mib": round(before, 1),
        "peak_rss_mib": round(harness.peak_rss_mib(), 1),
        "outer_loss": float(value),
        "hypergrad_norm": float(info.hypergrad_norm),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    print(json.dumps(measure(NAME, parser.parse_args().steps, networks.Scale())))
