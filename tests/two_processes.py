"""One of two processes that share weights and batches; also the problem that the sharding tests share.

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


def convex():
    """Return softmax regression with a log decay a weight, its variables, and batches for training and validation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8)).astype(np.float32)
    y = (x[:, :3] + rng.normal(size=(32, 3))).argmax(1)

    def nll(w, decay, batch, key):
        return optax.losses.softmax_cross_entropy_with_integer_labels(batch[0] @ w, batch[1]).mean()

    inner = lambda w, decay, batch, key: nll(w, decay, batch, key) + hg.penalties.l2(w, decay)  # noqa: E731
    variables = hg.BilevelParams(np.full((8, 3), 0.1, np.float32), np.full((8, 3), -2.0, np.float32))
    return (
        hg.reparameterize(hg.BilevelProblem(inner, nll), hg.bijectors.exp()),
        variables,
        (x[:16], y[:16]),
        (x[16:], y[16:]),
    )


def metagradient(variables, valid, store):
    """Differentiate twelve steps. Their batches are arrays of NumPy: each process holds all of them."""
    bilevel_problem, _, train, _ = convex()
    at = lambda step: jax.tree.map(jnp.asarray, train)  # noqa: E731
    fn = hg.metagradient(
        bilevel_problem, optax.sgd(0.1, momentum=0.9), batch_at=at, num_steps=12, segment=3, store=store
    )
    return fn(*variables, valid, key=None)


def drive(variables, train, valid):
    """Call the drivers other than ``hg.bilevel``, and return figures that every process can read."""
    total = jax.jit(lambda x: jnp.sum(x * jnp.arange(1.0, x.size + 1).reshape(x.shape)))
    told = []
    solved = hg.minimize(
        convex()[0], variables, train, valid, max_steps=2, callback=lambda result: told.append(result.message)
    )
    (value, grad), info = metagradient(variables, valid, hg.stores.device(2))
    one_value, one_grad = hg.value_and_hypergrad(hg.implicit(convex()[0]))(*variables, train, valid, key=None)[0]
    return {
        "minimize": [float(solved.value), float(total(solved.hyperparams)), len(told)],
        "metagradient": [float(value), float(total(grad)), info.num_forward],
        "value_and_hypergrad": [float(one_value), float(total(one_grad))],
    }


def main(port, index):
    """Join the other process, share variables and batches with it, call the drivers, print."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    by_row = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
    given = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, by_row, lambda i: x[i]), convex()[1:])
    refused = {}
    for store in (hg.stores.host(2), hg.stores.directory(f"never_made_{index}", 2)):
        try:
            metagradient(given[0], given[2], store)
        except ValueError as error:
            refused[store.where] = str(error)
    print(json.dumps({**drive(*given), "refused": refused, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
