"""All kinds of hyperparameters of a small CNN in one run: each kind has its own estimator.

    decays, label smoothing            implicit differentiation
    learning rate and its slope        unrolled: the derivative of ten training steps
    dropout, noise, shift in pixels    evolution: what is drawn or rounded has no derivative

Beside it, Optuna's TPE, which starts at the same values and spends as many gradients in all.

    python examples/15_one_run.py             # scikit-learn's digits, 2 minutes on two cores, 15_one_run.png
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from optuna import create_study, distributions, samplers
from sklearn.datasets import load_digits

import hypergrad as hg

SPACE = {  # estimator, lower end, upper end, first value
    **{f"log decay {layer}": ("implicit", -12.0, 0.0, -6.0) for layer in (1, 2, 3)},
    "smoothing": ("implicit", 0.0, 0.5, 0.1),
    "log rate": ("unrolled", -9.0, -3.0, -7.0),
    "slope": ("unrolled", -5.0, 1.0, -1.0),
    "dropout": ("evolution", 0.0, 0.8, 0.2),
    "noise": ("evolution", 0.0, 0.5, 0.1),
    "shift": ("evolution", 0.0, 2.0, 0.5),
}
FIRST = {name: first for name, (*_, first) in SPACE.items()}
BOUNDS = {name: hg.bijectors.interval(low, high) for name, (_, low, high, _) in SPACE.items()}
WINDOW, EVERY, PAIRS, BATCH = 10, 3, 2, 100
COST = EVERY * WINDOW + 11 + (2 * WINDOW + 1) + 2 * PAIRS * (WINDOW + 1)  # gradients of three calls; a product is two
images, labels = load_digits(return_X_y=True)
x, y = (jax.random.permutation(jax.random.key(0), jnp.asarray(a)) for a in (images.reshape(-1, 8, 8) / 16, labels))
train, valid, test = (x[:300], y[:300]), (x[300:700], y[300:700]), (x[700:], y[700:])


def logits(w, x, dropout=0.0, key=None):  # a convolution of 3 × 3, pooling, two dense layers
    patches = jnp.stack([jnp.roll(x, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)], -1)
    maps = jax.nn.relu(patches @ w["log decay 1"]).reshape(-1, 4, 2, 4, 2, 16).mean((2, 4)).reshape(len(x), -1)
    hidden = jax.nn.relu(maps @ w["log decay 2"])
    return (hidden if key is None else hg.noise.dropout(key, hidden, dropout)) @ w["log decay 3"]


def train_loss(w, h, batch, key):
    drop, noise, move = jax.random.split(key, 3)
    by = jnp.round(h["shift"] * jax.random.uniform(move, (BATCH, 2), minval=-1, maxval=1)).astype(int)
    x = hg.noise.gaussian_noise(noise, jax.vmap(lambda a, by: jnp.roll(a, by, (0, 1)))(batch[0], by), h["noise"])
    targets = hg.noise.smooth_labels(batch[1], 10, h["smoothing"])
    loss = optax.losses.softmax_cross_entropy(logits(w, x, h["dropout"], drop), targets).mean()
    return loss + hg.penalties.l2(w, {layer: jnp.exp(h[layer]) for layer in w})


def valid_loss(w, h, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(w, batch[0]), batch[1]).mean()


problem = hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), BOUNDS)
evolution = hg.evolution(problem, sigma=0.3, num_pairs=PAIRS)
parts = {"implicit": hg.implicit(problem), "unrolled": hg.unrolled(problem), "evolution": evolution}
estimator = hg.partition(parts, {name: label for name, (label, *_) in SPACE.items()})


def transformation(every):
    adam = lambda h: optax.adam(lambda n: jnp.exp(h["log rate"] + h["slope"] * n / 1000), eps_root=1e-8)  # noqa: E731
    due = lambda call: call % every == every - 1  # noqa: E731
    return hg.bilevel(estimator, inner_optimizer=adam, outer_optimizer=optax.adam(0.1), window=WINDOW, every=due, key=0)


@jax.jit
def step(old, state, key, every):
    batches = jax.tree.map(lambda a: a[jax.random.randint(key, (WINDOW, BATCH), 0, len(a))], train)
    updates, state = transformation(every).update(None, state, old, inner_batch=batches, outer_batch=valid)
    variables: Any = optax.apply_updates(old, updates)
    return variables, state, [valid_loss(variables.params, None, split, None) for split in (valid, test)]


def run(values, calls, every, seed):  # to (validation, test loss) at the lowest validation loss, values over time
    keys, shapes = jax.random.split(jax.random.key(seed), calls + 1), ((9, 16), (256, 64), (64, 10))
    w = {f"log decay {i}": np.sqrt(2 / s[0]) * jax.random.normal(keys[0], s) for i, s in enumerate(shapes, 1)}
    variables = hg.BilevelParams(w, hg.unconstrain(BOUNDS, jax.tree.map(jnp.array, values)))
    state, found, history = transformation(every).init(variables), [], []
    for call in range(calls):
        variables, state, losses = step(variables, state, keys[call + 1], every)
        found.append(tuple(map(float, losses)))
        history.append(list(hg.constrain(BOUNDS, variables.hyperparams).items()))
        if call % 150 == 149:
            print(f"{found[-1][0]:.3f}:", ", ".join(f"{name} {value:.2f}" for name, value in history[-1]))
    return min(found), history


def main(calls=450, trial_calls=90, seed=0, out="15_one_run.png"):
    """Print losses and values, save a picture; return test losses."""
    (one, history), found = run(FIRST, calls, EVERY, seed), []
    trials = max(1, COST * calls // EVERY // (WINDOW * trial_calls))  # as many gradients
    study = create_study(sampler=samplers.TPESampler(seed=seed, n_startup_trials=max(1, trials // 4)))
    study.enqueue_trial(FIRST)
    for number in range(trials):
        trial = study.ask(
            {name: distributions.FloatDistribution(low, high) for name, (_, low, high, _) in SPACE.items()}
        )
        found.append(run(trial.params, trial_calls, 10**6, 100 * seed + number)[0])
        study.tell(trial, found[-1][0])
    losses = {"one run": one, f"TPE, {trials} trials": min(found)}
    for name, (valid, test) in losses.items():
        print(f"{name:16} validation loss {valid:.3f}, test loss {test:.3f}")
    figure = Figure(figsize=(7, 5), layout="constrained")
    for axes, *values in zip(figure.subplots(3, 3, sharex=True).flat, *history, strict=True):
        axes.plot([float(value) for _, value in values])
        axes.set_title(values[0][0], fontsize="small")
    figure.savefig(out, dpi=110)
    return {name: test for name, (_, test) in losses.items()}


if __name__ == "__main__":
    main()
