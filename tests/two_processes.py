"""One of two processes that train one model together; also the problem that the sharding tests share.

Run as ``python -m tests.two_processes PORT INDEX``: prints a line of JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hypergrad as hg


def problem(out_sharding=None):
    """Return a two-layer network with a log decay a weight, its variables, and one batch.

    ``out_sharding`` is that of the logits, which a mesh of explicit axes asks for.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.integers(0, 3, 16)

    def nll(params, batch):
        hidden = jnp.tanh(batch[0] @ params["first"]["kernel"] + params["first"]["bias"])
        logits = jnp.matmul(hidden, params["second"]["kernel"], out_sharding=out_sharding) + params["second"]["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def inner(params, decay, batch, key):
        return nll(params, batch) + hg.penalties.l2(params, decay)

    def outer(params, decay, batch, key):
        return nll(params, batch)

    shapes = {"first": {"kernel": (6, 16), "bias": (16,)}, "second": {"kernel": (16, 3), "bias": (3,)}}
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32) / 2, shapes, is_leaf=is_shape)
    decays = jax.tree.map(lambda w: jnp.full_like(w, -2.0), params)
    bilevel_problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.exp())
    return bilevel_problem, hg.BilevelParams(params, decays), (x, y)


def train(variables, batch):
    """Take four joint steps and return figures that every process can read."""
    tx = hg.bilevel(
        hg.implicit(problem()[0], hg.solvers.neumann(10)),
        inner_optimizer=optax.adam(1e-2),
        outer_optimizer=optax.adam(1e-1),
        every=2,
    )

    @jax.jit
    def step(variables, state, batch):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _ in range(4):
        variables, state = step(variables, state, batch)
    total = jax.jit(
        lambda h: sum(jnp.sum(x * jnp.arange(1.0, x.size + 1).reshape(x.shape)) for x in jax.tree.leaves(h))
    )
    return {
        "loss": float(state.info.outer_loss),
        "hyperparams": float(total(variables.hyperparams)),
        "residual": float(state.info.solver.residual),
    }


def main(port, index):
    """Join the other process, shard the batch over both, train, print."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    _, variables, batch = problem()

    def placed(x, spec):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])

    variables = jax.tree.map(lambda x: placed(x, P()), variables)
    batch = jax.tree.map(lambda x: placed(x, P("d")), batch)
    print(json.dumps({**train(variables, batch), "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
