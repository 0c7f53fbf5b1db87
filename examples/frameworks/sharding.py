"""A mesh of devices: shard the weights and the batches, and the hyperparameters and solver vectors follow.

python examples/frameworks/sharding.py    # eight virtual CPU devices, 15 seconds on two cores
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # leave this out on GPUs and TPUs

import hypergrad as hg


def cross_entropy(params, batch):
    logits = jax.nn.relu(batch[0] @ params["w"]) @ params["v"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(params, decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, decay)


def valid_loss(params, decay, batch, key):
    return cross_entropy(params, batch)


positive = hg.bijectors.exp()
problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), positive)
tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=optax.adam(1e-2), every=5)


@jax.jit
def step(variables, state, train, valid):
    updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
    return optax.apply_updates(variables, updates), state


def main(steps=10):
    """Print where things are; return the sharded variables and the state."""
    mesh = Mesh(jax.devices(), ("devices",))
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (64, 512)) / 8, "v": jax.random.normal(keys[1], (512, 16)) / 20}
    split = {"w": P(None, "devices"), "v": P("devices", None)}  # each device holds a part of the hidden units
    params = {name: jax.device_put(w, NamedSharding(mesh, split[name])) for name, w in params.items()}
    decay = jax.tree.map(lambda w: jnp.full_like(w, 1e-3), params)  # one per weight, sharded like it
    by_example = NamedSharding(mesh, P("devices"))
    x, y = jax.random.normal(keys[2], (512, 64)), jax.random.randint(keys[3], (512,), 0, 16)
    train, valid = (jax.device_put((x[s], y[s]), by_example) for s in (slice(256), slice(256, 512)))

    variables = hg.BilevelParams(params, hg.unconstrain(positive, decay))
    state = tx.init(variables)
    for _ in range(steps):
        variables, state = step(variables, state, train, valid)
    for name in params:
        placed = {"weights": variables.params, "decays": variables.hyperparams, "warm start": state.estimator.solution}
        print(name, {what: str(tree[name].sharding.spec) for what, tree in placed.items()})
    print(f"validation loss {state.info.outer_loss:.3f}, {len(mesh.devices)} devices")
    return variables, state


if __name__ == "__main__":
    main()
