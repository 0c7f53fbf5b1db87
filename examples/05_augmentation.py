"""A network that augments images, learned by the validation loss of the classifier that trains on its images.

inner:  w*(φ) = argmin_w  CE(w; warp(x; affine map drawn from φ), y)       200 training images
outer:  min_φ  CE(w*(φ); 400 validation images)

python examples/05_augmentation.py        # scikit-learn's digits, 50 seconds on two cores, 05_augmentation.png
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16.0, jnp.float32).reshape(-1, 8, 8), jnp.asarray(labels[order])
train, valid, test = (x[:200], y[:200]), (x[200:600], y[200:600]), (x[600:], y[600:])
layers: Any = [lambda x: x.reshape(len(x), -1), nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)]
classifier: Any = nn.Sequential(layers)


class Augmenter(nn.Module):
    """Random numbers to an affine map for each image. Odd in the numbers, so that the mean map is the identity."""

    @nn.compact
    def __call__(self, x, key):
        hidden = nn.tanh(nn.Dense(32, use_bias=False)(jax.random.normal(key, (len(x), 8))))
        changes = nn.Dense(6, use_bias=False, kernel_init=nn.initializers.normal(0.03))(hidden).reshape(-1, 2, 3)
        return jax.vmap(warp)(x, changes + jnp.eye(2, 3))


def warp(image, affine):
    """Take each pixel from where the map sends it, around the centre of the image."""
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij")) - 3.5
    places = jnp.einsum("ij,jhw->ihw", affine[:, :2], grid) + 4.0 * affine[:, 2, None, None] + 3.5
    return map_coordinates(image, list(places), order=1, mode="constant")


augmenter: Any = Augmenter()
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def train_loss(params, phi, batch, key):
    logits = classifier.apply({"params": params}, augmenter.apply({"params": phi}, batch[0], key))
    return cross_entropy(logits, batch[1]).mean() + hg.penalties.l2(params, 2e-3)


def valid_loss(params, phi, batch, key):
    return cross_entropy(classifier.apply({"params": params}, batch[0]), batch[1]).mean()


def run(phi, steps, outer_rate):  # trains classifier and augmenter together, returns both
    problem = hg.BilevelProblem(train_loss, valid_loss)
    tx = hg.bilevel(
        hg.implicit(problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=optax.adam(outer_rate), every=5, key=0
    )
    variables = hg.BilevelParams(classifier.init(jax.random.key(0), x[:1])["params"], phi)

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _ in range(steps):
        variables, state = step(variables, state)
    return variables


def main(steps=1500, out="05_augmentation.png"):
    """Print test losses, save a picture; return the losses."""
    first = augmenter.init(jax.random.key(1), x[:1], jax.random.key(2))["params"]
    nothing = jax.tree.map(jnp.zeros_like, first)  # the identity for all noise
    learned = run(first, steps, outer_rate=1e-2)
    again = run(learned.hyperparams, steps, outer_rate=0.0)  # new weights, the augmenter as it was learned
    runs = {"no augmentation": run(nothing, steps, outer_rate=0.0), "learned": learned, "learned, new weights": again}
    losses = {name: float(valid_loss(variables.params, None, test, None)) for name, variables in runs.items()}
    for name, loss in losses.items():
        print(f"{name:22} test loss {loss:.3f}")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    rows = [augmenter.apply({"params": learned.hyperparams}, x[:10], jax.random.key(i)) for i in range(3)]
    for place, image in zip(figure.subplots(4, 10).flat, jnp.concatenate([x[:10], *rows]), strict=True):
        place.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        place.set(xticks=[], yticks=[])
    figure.suptitle("images, and three draws of the learned augmentation")
    figure.savefig(out, dpi=120)
    return losses


if __name__ == "__main__":
    main()
