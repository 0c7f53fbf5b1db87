"""A language model with one weight decay per character of its embedding, and one per layer.

inner:  w*(c) = argmin_w  CE(w; windows of the training text) + ½ Σᵢ cᵢ wᵢ²         batches of 64 windows
outer:  min_c  CE(w*(c); windows of the validation text)             of scikit-learn's descriptions of data

python examples/08_language_model.py      # 50 seconds on two cores, 08_language_model.png
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from matplotlib.figure import Figure

import hypergrad as hg

text = "".join(getattr(sklearn.datasets, f"load_{n}")().DESCR for n in ("breast_cancer", "diabetes", "digits", "wine"))
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text])
blocks = [ids[i : i + 400] for i in range(0, len(ids), 400)]
train, valid, test = (jnp.asarray(np.concatenate(part)) for part in (blocks[::2], blocks[1::4], blocks[3::4]))
CONTEXT = 12


class Model(nn.Module):  # the next character from the last twelve
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(len(letters), 16, name="embedding")(ids)
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(len(letters), name="output")(x)


model: Any = Model()


def draw(text, key, size):  # random windows, (size, CONTEXT + 1)
    starts = jax.random.randint(key, (size,), 0, len(text) - CONTEXT)
    return text[starts[:, None] + jnp.arange(CONTEXT + 1)]


def train_loss(params, decay, windows, key):
    return valid_loss(params, decay, windows, key) + hg.penalties.l2(params, decay)


def valid_loss(params, decay, windows, key):
    logits = model.apply({"params": params}, windows[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def run(params, decay, steps, outer_rate):  # trains model and decays together, returns both
    positive = hg.bijectors.exp()
    problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), positive)
    problem = hg.with_prior(problem, hg.priors.shared_mean(1.0), num_examples=len(valid))
    tx = hg.bilevel(
        hg.implicit(problem), inner_optimizer=optax.adam(2e-3), outer_optimizer=optax.adam(outer_rate), every=10
    )
    variables = hg.BilevelParams(params, hg.unconstrain(positive, decay))

    @jax.jit
    def step(variables, state, key):
        for_train, for_valid = jax.random.split(key)
        batches = {"inner_batch": draw(train, for_train, 64), "outer_batch": draw(valid, for_valid, 256)}
        updates, state = tx.update(None, state, variables, **batches)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for key in jax.random.split(jax.random.key(0), steps):
        variables, state = step(variables, state, key)
    return variables.params, problem.constrain(variables.hyperparams)


def main(steps=3000, out="08_language_model.png"):
    """Print test losses, save a picture; return the losses."""
    windows = test[jnp.arange(len(test) - CONTEXT)[:, None] + jnp.arange(CONTEXT + 1)]
    first = model.init(jax.random.key(0), windows[:1, :-1])["params"]
    single = jnp.array(1e-3)
    each = jax.tree.map(lambda w: single, first)  # one per array
    each["embedding"]["embedding"] = jnp.full((len(letters), 1), single)  # here, one per character
    runs = {"one decay, 0.001": (single, 0.0), "one decay, learned": (single, 0.03), "many, learned": (each, 0.03)}
    losses, decay = {}, each
    for name, (start, outer_rate) in runs.items():
        params, decay = run(first, start, steps, outer_rate)
        losses[name] = float(valid_loss(params, decay, windows, None))
        print(f"{name:19} test loss {losses[name]:.3f} nats per character")
    often = np.bincount(np.asarray(train), minlength=len(letters))
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(often + 1, decay["embedding"]["embedding"][:, 0], ".")
    axes.set(xlabel="times in the training text, plus 1", ylabel="learned decay of its embedding")
    figure.savefig(out, dpi=120)
    return losses


if __name__ == "__main__":
    main()
