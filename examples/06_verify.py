"""Is the hypergradient right? A check on your own problem, and a bug that it finds.

python examples/06_verify.py              # 20 seconds on two cores, 06_verify.png
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(n_class=3, return_X_y=True)
x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
train, valid = (x[:100], y[:100]), (x[100:300], y[100:300])


def cross_entropy(params, batch):
    logits = batch[0] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(params, log_decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, jnp.exp(log_decay))


def valid_loss(params, log_decay, batch, key):
    return cross_entropy(params, batch)


def buggy_loss(params, log_decay, batch, key):  # the decay is a constant to the derivative
    return cross_entropy(params, batch) + hg.penalties.l2(params, jax.lax.stop_gradient(jnp.exp(log_decay)))


problem, start = hg.BilevelProblem(train_loss, valid_loss), {"w": jnp.zeros((64, 3)), "b": jnp.zeros(3)}


@jax.jit
def solve(log_decay):
    """Return weights that minimise the training loss."""
    return hg.diagnostics.solve_inner(problem, hg.BilevelParams(start, log_decay), train).params


def descend(log_decay, steps):
    """Return the weights after some steps of gradient descent."""
    params = start
    for _ in range(steps):
        slope = jax.grad(train_loss)(params, log_decay, train, None)
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, slope)
    return params


def main(points=13, out="06_verify.png"):
    """Print three verdicts, save a picture; return the verdicts."""
    log_decay, verdicts = jnp.array(-3.0), {}
    check = functools.partial(hg.diagnostics.check_hypergrad, key=None)
    for name, params in {"at the solution": solve(log_decay), "after 20 steps": descend(log_decay, 20)}.items():
        found = check(hg.implicit(problem), hg.BilevelParams(params, log_decay), train, valid)
        print(f"--- {name}\n{found}\n")
        verdicts[name] = found.verdict
    solved = hg.BilevelParams(solve(log_decay), log_decay)
    try:  # a hyperparameter whose derivative is cut off is refused, with the leaf's name
        check(hg.implicit(hg.BilevelProblem(buggy_loss, valid_loss)), solved, train, valid)
    except ValueError as error:
        verdicts["with the bug"] = str(error)
        print(f"--- with a stop_gradient in the loss\n{error}\n")

    # The validation loss along the decay, every time with new weights, and the tangent that hypergrad computes.
    (at, slope), _ = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(100)))(*solved, train, valid, key=None)
    along = np.linspace(-6.0, 0.0, points)
    losses = [valid_loss(solve(jnp.asarray(a, jnp.float32)), a, valid, None) for a in along]
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(along, losses, "o-", label="trained again for each decay")
    axes.plot(along, at + slope * (along - log_decay), "--", label="tangent by hypergrad")
    axes.set(xlabel="log decay", ylabel="validation loss", ylim=(0.0, None))
    axes.legend()
    figure.savefig(out, dpi=120)
    return verdicts


if __name__ == "__main__":
    main()
