"""A weight for every training example: wrong labels lose theirs.

inner:  w*(s) = argmin_w  mean_i s_i CE(w; example i) + decay          1,000 images, 40 % of the labels wrong
outer:  min_s  CE(w*(s); 400 images with right labels)

python examples/04_data_cleaning.py       # scikit-learn's digits, 20 seconds on two cores, 04_data_cleaning.png
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import hypergrad as hg

rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
order = rng.permutation(len(labels))
x, y = images[order].astype(np.float32) / 16.0, labels[order]
wrong = rng.random(1000) < 0.4
noisy = np.where(wrong, (y[:1000] + rng.integers(1, 10, 1000)) % 10, y[:1000])
train = jnp.asarray(x[:1000]), jnp.asarray(noisy), jnp.arange(1000)  # the third: which example it is
valid, test = (jnp.asarray(x[1000:1400]), jnp.asarray(y[1000:1400])), (jnp.asarray(x[1400:]), jnp.asarray(y[1400:]))
model: Any = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def predict(params, x):
    return model.apply({"params": params}, x)


def losses(params, x, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(params, x), y)


def train_loss(params, weights, batch, key):
    x, y, example = batch
    return jnp.mean(weights[example] * losses(params, x, y)) + hg.penalties.l2(params, 1e-3)


def valid_loss(params, weights, batch, key):
    return losses(params, *batch).mean()


problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), hg.bijectors.sigmoid())  # weights in (0, 1)
# Most weights belong near 0 or 1; a wide prior on their logits keeps them from running away.
problem = hg.with_prior(problem, hg.priors.normal(0.0, 3.0), num_examples=400)


def run(steps, outer_rate):
    """Train the network and the weights of its examples together; return both."""
    tx = hg.bilevel(
        hg.implicit(problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=optax.adam(outer_rate), every=5
    )
    variables = hg.BilevelParams(model.init(jax.random.key(0), train[0][:1])["params"], jnp.zeros(1000))

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _ in range(steps):
        variables, state = step(variables, state)
    return variables.params, problem.constrain(variables.hyperparams)


def main(steps=1000, out="04_data_cleaning.png"):
    """Print test errors, save a picture; return the errors and the area under the ROC curve."""
    error = lambda params: float(jnp.mean(predict(params, test[0]).argmax(1) != test[1]))  # noqa: E731
    plain, _ = run(steps, outer_rate=0.0)
    params, weights = run(steps, outer_rate=0.1)
    auc = float(roc_auc_score(wrong, -weights))
    print(f"all examples count the same: test error {error(plain):.1%}")
    print(f"a learned weight each:       test error {error(params):.1%}")
    print(f"a wrong label has a smaller weight than a right one in {auc:.1%} of all pairs")

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.2))[0]
    axes = left.subplots()
    axes.hist([np.asarray(weights)[~wrong], np.asarray(weights)[wrong]], 20, label=["right label", "wrong label"])
    axes.set(xlabel="learned weight", ylabel="examples")
    axes.legend()
    lowest = np.argsort(weights)[:10]
    right.suptitle("smallest weights: label given (true label)")
    for place, i in zip(right.subplots(2, 5).flat, lowest, strict=True):
        place.imshow(x[i].reshape(8, 8), cmap="gray_r")
        place.set(xticks=[], yticks=[], title=f"{noisy[i]} ({y[i]})")
    figure.savefig(out, dpi=120)
    return {"plain": error(plain), "learned": error(params), "auc": auc}


if __name__ == "__main__":
    main()
