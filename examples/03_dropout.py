"""Dropout rates of a Flax model, tuned in the one run that trains it (self-tuning networks).

A validation loss has no useful derivative in a dropout rate. While the network trains, a response learns how the
outputs of each layer change with the rates. The rates then follow the validation loss through that response (MacKay
et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514).

    python examples/03_dropout.py             # scikit-learn's digits, 30 seconds on two cores, 03_dropout.png
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16.0, jnp.float32), jnp.asarray(labels[order])
train, valid, test = (x[:200], y[:200]), (x[200:600], y[200:600]), (x[600:], y[600:])


class MLP(nn.Module):
    """Dropout before each layer. A rate is one number, or one per example while the response is learned."""

    @nn.compact
    def __call__(self, x, rates=None):
        for layer, width in {"first": 128, "second": 128, "last": 10}.items():
            if rates is not None:
                x = hg.noise.dropout(self.make_rng("dropout"), x, rates[layer])
            x = nn.Dense(width, name=layer)(x)
            x = x if layer == "last" else nn.relu(x)
        return x


model: Any = MLP()
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def train_loss(params, rates, batch, key):
    return cross_entropy(model.apply({"params": params}, batch[0], rates, rngs={"dropout": key}), batch[1]).mean()


def valid_loss(params, rates, batch, key):
    return cross_entropy(model.apply({"params": params}, batch[0]), batch[1]).mean()


bounds = hg.bijectors.interval(0.0, 0.8)
problem = hg.responses.self_tuning(hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), bounds))
problem = hg.responses.perturbed(problem, scale=1.0)


def run(first_rate, steps, tune):  # to the test loss at the end, and the rates after every 20 steps
    params = model.init(jax.random.key(0), x[:1])["params"]
    rates = hg.unconstrain(bounds, dict.fromkeys(("first", "second", "last"), jnp.array(first_rate)))
    inner = optax.partition({"weights": optax.adam(1e-3), "response": optax.adam(3e-3)}, hg.responses.optimizer_labels)
    tx = hg.bilevel(
        hg.direct(problem),
        inner_optimizer=inner,
        outer_optimizer=optax.adam(0.03 if tune else 0.0),
        every=lambda n: (n > 200) & (n % 5 == 0),  # first the response learns
    )
    variables = hg.BilevelParams(hg.responses.init(problem, 0, params, rates, train), rates)

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    state, history = tx.init(variables), []
    for i in range(steps):
        variables, state = step(variables, state)
        if i % 20 == 19:
            history.append(problem.constrain(variables.hyperparams))
    return float(valid_loss(hg.responses.deployable_params(variables), None, test, None)), history


def main(steps=2000, out="03_dropout.png"):
    """Print test losses, save a picture; return the losses."""
    losses = {f"rates stay at {rate}": run(rate, steps, tune=False)[0] for rate in (0.01, 0.2)}
    losses["rates tuned from 0.2"], history = run(0.2, steps, tune=True)
    for name, loss in losses.items():
        print(f"{name:22} test loss {loss:.3f}")
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for layer in history[0]:
        axes.plot(20 * np.arange(1, len(history) + 1), [rates[layer] for rates in history], label=f"before {layer}")
    axes.set(xlabel="training steps", ylabel="dropout rate", ylim=(0, 0.8))
    axes.legend()
    figure.savefig(out, dpi=120)
    return losses


if __name__ == "__main__":
    main()
