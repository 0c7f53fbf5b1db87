"""Flax NNX: a loop over a module with BatchNorm and Dropout gets learned weight decays.

python examples/frameworks/nnx.py         # 15 seconds on two cores; lines that differ from a plain loop end in #!
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
train, valid = {"image": x[:300], "label": y[:300]}, {"image": x[300:700], "label": y[300:700]}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    logits = model(batch["image"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def train_loss(model, decay, batch, key):  #!
    return loss_fn(model, batch) + hg.penalties.l2(hg.integrations.nnx.params(model), decay)


def valid_loss(model, decay, batch, key):  #!
    model.eval()
    return loss_fn(model, batch)


def main(steps=200):
    """Print what is learned; return the decays."""
    model, positive = Net(nnx.Rngs(0)), hg.bijectors.exp()
    problem = hg.reparameterize(hg.integrations.nnx.problem(model, train_loss, valid_loss), positive)  #!
    tx = hg.bilevel(  #!
        hg.implicit(problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(3e-2), every=10
    )
    decay = hg.unconstrain(positive, {name: jnp.array(1e-3) for name in hg.integrations.nnx.params(model)})  #!
    optimizer = hg.integrations.nnx.Optimizer(model, tx, decay)  #! instead of nnx.Optimizer(model, optax.adam(1e-2))

    @nnx.jit
    def train_step(model, optimizer, train_batch, valid_batch):
        decay = problem.constrain(optimizer.hyperparams)
        value, grads = nnx.value_and_grad(train_loss)(model, decay, train_batch, None)
        optimizer.update(model, grads, inner_batch=train_batch, outer_batch=valid_batch, value=value)  #!

    for _ in range(steps):
        train_step(model, optimizer, train, valid)
    learned = problem.constrain(optimizer.hyperparams)
    print(f"validation loss {optimizer.info.outer_loss:.3f}, outer steps skipped {optimizer.info.num_skipped}")
    print({name: f"{float(value):.2g}" for name, value in learned.items()})
    return jax.tree.map(float, learned)


if __name__ == "__main__":
    main()
