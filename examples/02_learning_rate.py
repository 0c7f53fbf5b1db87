"""A learning rate for each step of a run, by unrolling the whole run.

w_{i+1} = w_i − αᵢ m_i                  100 steps of momentum SGD, each with its own rate αᵢ
min_α  CE(w_100(α); validation images)

python examples/02_learning_rate.py       # scikit-learn's digits, 30 seconds on two cores, 02_learning_rate.png
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
train, valid = (x[:1000], y[:1000]), (x[1000:], y[1000:])
STEPS = 100


def loss(params, rates, batch, key):
    hidden = jnp.tanh(batch[0] @ params["w"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ params["v"], batch[1]).mean()


def draw(key):
    """Return random weights, and the indices of a run's batches of 32."""
    for_w, for_v, for_batches = jax.random.split(key, 3)
    params = {"w": jax.random.normal(for_w, (64, 32)) / 8.0, "v": jax.random.normal(for_v, (32, 10)) / 6.0}
    return params, hg.IndexedBatch(train, jax.random.randint(for_batches, (STEPS, 32), 0, 1000))


problem = hg.reparameterize(hg.BilevelProblem(loss, loss), hg.bijectors.exp())
make_optimizer = lambda rates: optax.sgd(hg.optimizers.schedule(rates), momentum=0.9)  # noqa: E731
unrolled_run = hg.value_and_hypergrad(hg.unrolled(problem), make_optimizer)


@jax.jit
def value_and_grad(log_rates, key):
    """Return the validation loss after a run from a random start, and its derivative in every log rate."""
    params, batches = draw(key)
    (value, grad), _ = unrolled_run(params, log_rates, batches, valid, key=None)
    return value, grad


tx = optax.adam(0.1)


@jax.jit
def step(log_rates, state, key):
    updates, state = tx.update(value_and_grad(log_rates, key)[1], state)
    return optax.apply_updates(log_rates, updates), state


def validation_loss(log_rates):
    """Return the mean over eight new starts."""
    return float(np.mean([value_and_grad(log_rates, jax.random.key(1000 + seed))[0] for seed in range(8)]))


def main(outer_steps=60, grid=(0.01, 0.03, 0.1, 0.3, 1.0), out="02_learning_rate.png"):
    """Print validation losses, save a picture; return the losses."""
    constant = {rate: validation_loss(jnp.full(STEPS, jnp.log(rate))) for rate in grid}
    best = min(constant, key=lambda rate: constant[rate])
    log_rates = jnp.full(STEPS, jnp.log(best), jnp.float32)
    state = tx.init(log_rates)
    for i in range(outer_steps):
        log_rates, state = step(log_rates, state, jax.random.key(i))
    learned = validation_loss(log_rates)
    print(f"best constant rate, {best:g}: validation loss {constant[best]:.3f}")
    print(f"a learned rate per step:      validation loss {learned:.3f}")

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(jnp.exp(log_rates), label=f"learned, validation loss {learned:.3f}")
    axes.axhline(best, color="0.5", linestyle=":", label=f"best constant, {constant[best]:.3f}")
    axes.set(xlabel="training step", ylabel="learning rate")
    axes.legend()
    figure.savefig(out, dpi=120)
    return {"constant": constant[best], "learned": learned}


if __name__ == "__main__":
    main()
