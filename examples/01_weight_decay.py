"""One learned weight decay per weight, while the weights train.

inner:  w*(c) = argmin_w  CE(w; 200 training images) + ½ Σᵢ cᵢ wᵢ²
outer:  min_c  CE(w*(c); 400 validation images)

python examples/01_weight_decay.py        # scikit-learn's digits, 20 seconds on two cores, 01_weight_decay.png
"""

import warnings
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
model: Any = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])


def cross_entropy(params, batch):
    logits = model.apply({"params": params}, batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(params, decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, decay)


def valid_loss(params, decay, batch, key):
    return cross_entropy(params, batch)


positive = hg.bijectors.exp()  # the optimizer moves log decays
problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), positive)
warnings.filterwarnings("ignore", category=hg.OverfittingWarning)  # 400 images judge 9,000 decays: test loss is shown


def run(params, decay, steps, outer_rate):
    """Train weights and decays together; return both, and the test loss after every 20 steps."""
    tx = hg.bilevel(
        hg.implicit(problem),
        inner_optimizer=optax.adam(1e-3),
        outer_optimizer=optax.adam(outer_rate),
        every=lambda n: (n > 100) & (n % 10 == 0),
    )
    variables = hg.BilevelParams(params, hg.unconstrain(positive, decay))

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    state, curve = tx.init(variables), []
    for i in range(steps):
        variables, state = step(variables, state)
        if i % 20 == 19:
            curve.append(float(cross_entropy(variables.params, test)))
    return variables.params, problem.constrain(variables.hyperparams), curve


def main(steps=1000, out="01_weight_decay.png"):
    """Print test losses, save a picture; return the losses."""
    params = model.init(jax.random.key(0), x[:1])["params"]
    single = jnp.array(1e-3)
    curves = {}
    _, _, curves["one decay, 0.001"] = run(params, single, steps, outer_rate=0.0)
    _, _, curves["one decay, learned"] = run(params, single, steps, outer_rate=0.05)
    each = jax.tree.map(lambda w: jnp.full_like(w, single), params)
    _, decay, curves["one decay per weight, learned"] = run(params, each, steps, outer_rate=0.05)
    new = model.init(jax.random.key(1), x[:1])["params"]  # what was learned: the decays, or only these weights?
    _, _, curves["these decays held, new weights"] = run(new, decay, steps, outer_rate=0.0)
    for name, curve in curves.items():
        print(f"{name:32} test loss {curve[-1]:.3f}")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(20 * np.arange(1, len(curve) + 1), curve, label=name)
    left.set(xlabel="training steps", ylabel="test loss", ylim=(0, 1))
    left.legend()
    first = np.log10(decay["layers_0"]["kernel"]).mean(axis=1).reshape(8, 8)
    shown = right.imshow(first, cmap="viridis")
    right.set(title="mean log10 decay of each pixel's weights", xticks=[], yticks=[])
    figure.colorbar(shown)
    figure.savefig(out, dpi=120)
    return {name: curve[-1] for name, curve in curves.items()}


if __name__ == "__main__":
    main()
