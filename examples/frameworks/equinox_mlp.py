"""Equinox: the arrays of a module are the weights, and get one learned decay each.

python examples/frameworks/equinox_mlp.py       # 10 seconds on two cores; needs `pip install equinox`
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
train, valid = (x[:300], y[:300]), (x[300:700], y[300:700])

model = eqx.nn.MLP(in_size=64, out_size=10, width_size=64, depth=2, key=jax.random.key(0))
params, combine = hg.integrations.equinox.partition(model)  # like eqx.partition(model, eqx.is_inexact_array)


def cross_entropy(params, batch):
    logits = jax.vmap(combine(params))(batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(params, decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, decay)


def valid_loss(params, decay, batch, key):
    return cross_entropy(params, batch)


positive = hg.bijectors.exp()
problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), positive)
tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(3e-2), every=10)


@jax.jit
def step(variables, state):
    updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
    return optax.apply_updates(variables, updates), state


def main(steps=200):
    """Print what is learned; return the trained module."""
    decay = jax.tree.map(lambda w: jnp.array(1e-3), params)  # one decay per array
    variables = hg.BilevelParams(params, hg.unconstrain(positive, decay))
    state = tx.init(variables)
    for _ in range(steps):
        variables, state = step(variables, state)
    trained = combine(variables.params)  # an eqx.nn.MLP again
    print(f"validation loss {state.info.outer_loss:.3f}, outer steps skipped {state.info.num_skipped}")
    print([f"{float(value):.2g}" for value in jax.tree.leaves(problem.constrain(variables.hyperparams))])
    return trained


if __name__ == "__main__":
    main()
