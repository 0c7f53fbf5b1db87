"""Flax Linen: a TrainState loop with BatchNorm gets one learned weight decay per layer.

python examples/frameworks/linen.py       # 10 seconds on two cores; lines that differ from a plain loop end in #!
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import hypergrad as hg
from hypergrad.integrations.flax import TrainState  #! instead of flax.training.train_state

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
train, valid = {"image": x[:300], "label": y[:300]}, {"image": x[300:700], "label": y[300:700]}


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(16, (3, 3))(x.reshape(-1, 8, 8, 1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


model = CNN()


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def train_loss(params, decay, batch, key, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
    return cross_entropy(logits, batch) + hg.penalties.l2(params, decay), new["batch_stats"]


def valid_loss(params, decay, batch, key, batch_stats):  #! the loss that tunes
    logits = model.apply({"params": params, "batch_stats": batch_stats}, batch["image"], train=False)
    return cross_entropy(logits, batch), batch_stats


positive = hg.bijectors.exp()  #!
problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss, stateful=True), positive)  #!
tx = hg.bilevel(  #!
    hg.implicit(problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(3e-2), every=10
)


@jax.jit
def train_step(state, train_batch, valid_batch):
    def loss(params):
        return problem.inner_loss(params, state.hyperparams, train_batch, None, state.model_state)

    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(
        grads=grads,
        value=value,
        model_state=batch_stats,
        inner_batch=train_batch,  #!
        outer_batch=valid_batch,  #!
    )


def main(steps=200):
    """Print what is learned; return the decays."""
    variables = model.init(jax.random.key(0), x[:1], train=False)
    decay = {name: jnp.array(1e-3) for name in variables["params"]}  #! one decay per layer
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        hyperparams=hg.unconstrain(positive, decay),  #!
        tx=tx,
        model_state=variables["batch_stats"],
    )
    for _ in range(steps):
        state = train_step(state, train, valid)
    learned = problem.constrain(state.hyperparams)
    print(f"validation loss {state.info.outer_loss:.3f}, outer steps skipped {state.info.num_skipped}")
    print({name: f"{float(value):.2g}" for name, value in learned.items()})
    return learned


if __name__ == "__main__":
    main()
