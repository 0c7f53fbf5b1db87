"""Ten images that teach a classifier: the training set itself is the hyperparameter.

    inner:  w_T(X) = 50 steps of SGD on CE(w; ten images X, one per class)           from new weights each time
    outer:  min_X  CE(w_T(X); 1,000 training images)                                 unrolled

    python examples/07_distillation.py        # scikit-learn's digits, 20 seconds on two cores, 07_distillation.png

Reference: Wang et al., Dataset distillation, arXiv 1811.10959.
"""

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
train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
CLASSES, INNER_STEPS = jnp.arange(10), 50


def predict(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]


def init(key):
    for_w, for_v = jax.random.split(key)
    w, v = jax.random.normal(for_w, (64, 64)) / 8.0, jax.random.normal(for_v, (64, 10)) / 8.0
    return {"w": w, "b": jnp.zeros(64), "v": v}


def inner_loss(params, points, batch, key):  # the batch is empty: the data are hyperparameters
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, points), CLASSES).mean()


def outer_loss(params, points, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, batch[0]), batch[1]).mean()


inner_optimizer = optax.sgd(0.3, momentum=0.9)
problem = hg.BilevelProblem(inner_loss, outer_loss)
unrolled = hg.value_and_hypergrad(hg.unrolled(problem), inner_optimizer)
no_batches = hg.IndexedBatch((), jnp.arange(INNER_STEPS))  # a window of 50 steps without data


@jax.jit
def outer_step(points, state, key):
    """Train new weights on the points, and move the points by the derivative of what the weights are worth."""
    (value, grad), _ = unrolled(init(key), points, no_batches, train, key=None)
    updates, state = tx.update(grad, state)
    return optax.apply_updates(points, updates), state, value


tx = optax.adam(0.02)


@jax.jit
def accuracy(points, key):
    """Return the test accuracy of new weights that have only seen the points."""
    best_response = hg.best_response(hg.unrolled(problem), inner_optimizer)
    params = best_response(init(key), points, no_batches, key=None)
    return jnp.mean(predict(params, test[0]).argmax(1) == test[1])


def main(outer_steps=400, out="07_distillation.png"):
    """Print test accuracies, save a picture; return the accuracies."""
    first = points = jnp.stack([x[jnp.argmax(y == digit)] for digit in range(10)])  # a real image per class
    state = tx.init(points)
    for i in range(outer_steps):
        points, state, _ = outer_step(points, state, jax.random.key(i))
    judged = [jax.random.key(10_000 + i) for i in range(10)]  # starts that were not seen
    found = {
        name: float(np.mean([accuracy(given, key) for key in judged]))
        for name, given in {"ten real images": first, "ten distilled images": points}.items()
    }
    for name, value in found.items():
        print(f"{name:21} test accuracy {value:.1%}")
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    for place, image in zip(figure.subplots(2, 10).flat, jnp.concatenate([first, points]), strict=True):
        place.imshow(image.reshape(8, 8), cmap="gray_r")
        place.set(xticks=[], yticks=[])
    figure.suptitle("above: real images; below: distilled images")
    figure.savefig(out, dpi=120)
    return found


if __name__ == "__main__":
    main()
