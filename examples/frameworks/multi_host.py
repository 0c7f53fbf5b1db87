"""Data and tensor parallel joint training over several processes; it goes on from its checkpoint on any other mesh.

python examples/frameworks/multi_host.py --folder /tmp/run     # alone, 15 seconds on two cores
python examples/frameworks/multi_host.py --folder /tmp/run --address 127.0.0.1:1234 --processes 2 --index 0    # and 1
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hypergrad as hg

ROWS, INPUTS, HIDDEN, CLASSES = 32, 16, 64, 4
SPECS = {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)}  # each device holds some hidden units


def cross_entropy(params, batch):
    logits = jnp.tanh(batch[0] @ params["up"] + params["bias"]) @ params["down"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(params, decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, decay)


def valid_loss(params, decay, batch, key):
    return cross_entropy(params, batch)


problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), hg.bijectors.exp())


def begin(mesh):
    """Return weights and one log decay per weight, each made on the devices that hold it."""

    def make():
        keys = jax.random.split(jax.random.key(0), 2)
        up, down = jax.random.normal(keys[0], (INPUTS, HIDDEN)), jax.random.normal(keys[1], (HIDDEN, CLASSES))
        params = {"up": up / 4, "bias": jnp.zeros(HIDDEN), "down": down / 8}
        return hg.BilevelParams(params, jax.tree.map(lambda w: jnp.full_like(w, -6.0), params))

    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.jit(make, out_shardings=hg.BilevelParams(places, places))()


def batch(mesh, number):
    """Return a batch of which this process reads its own rows only."""
    share = ROWS // jax.process_count()
    rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    rng = np.random.default_rng(number)  # in place of a file
    x = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    y = (x[:, :CLASSES] + rng.normal(size=(ROWS, CLASSES))).argmax(1).astype(np.int32)
    by_row = NamedSharding(mesh, P("data"))
    return tuple(jax.make_array_from_process_local_data(by_row, part[rows], part.shape) for part in (x, y))


def main(folder, steps=10, model=1):
    """Train up to ``steps``, from the checkpoint in ``folder`` if there is one, and save; return what was saved."""
    rule, outer_rule = optax.adam(1e-2), optax.adam(1e-1, eps=1e-4)
    tx = hg.bilevel(hg.implicit(problem), inner_optimizer=rule, outer_optimizer=outer_rule, every=2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # without donation, old and new states are in memory at once
    def step(variables, state, train, valid):
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    mesh = jax.make_mesh((jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    variables = begin(mesh)
    run = variables, tx.init(variables)  # the state is sharded like the variables
    with ocp.CheckpointManager(Path(folder).resolve()) as manager:
        first = manager.latest_step() or 0
        if first:  # into the shapes and the places that this run has
            form = jax.tree.map(ocp.utils.to_shape_dtype_struct, run)
            run = manager.restore(first, args=ocp.args.StandardRestore(form))
        for number in range(first, steps):
            run = step(*run, batch(mesh, 2 * number), batch(mesh, 2 * number + 1))
        if first < steps:
            manager.save(steps, args=ocp.args.StandardSave(run))  # every process writes the parts that it holds
    variables, state = run
    kernel = variables.hyperparams["up"]
    print(f"process {jax.process_index()}: steps {first} to {steps} on {mesh.shape}, loss {state.info.outer_loss:.6f}")
    print(f"decays {kernel.shape}, {kernel.addressable_shards[0].data.shape} on each device")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="that every process can reach")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", type=int, default=1, help="devices that share the weights, all of one process")
    parser.add_argument("--address", help="of process 0, with a port")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--index", type=int, help="of this process")
    parser.add_argument("--cpu-devices", type=int, help="per process; on GPUs and TPUs leave it out")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.address:  # on a cluster that JAX knows (SLURM, TPU pods): jax.distributed.initialize() alone
        jax.distributed.initialize(args.address, args.processes, args.index)
    main(args.folder, args.steps, args.model)
