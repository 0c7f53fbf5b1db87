"""Is the hypergradient right? A check on your own problem, and a bug that it finds.

python examples/06_verify.py              # 20 seconds on two cores, 06_verify.png
"""

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


def solve(log_decay, steps):
    """Return weights that minimise the training loss, nearly."""
    params, tx = {"w": jnp.zeros((64, 3)), "b": jnp.zeros(3)}, optax.adam(0.1)

    def step(_, at):
        updates, state = tx.update(jax.grad(train_loss)(at[0], log_decay, train, None), at[1])
        return optax.apply_updates(at[0], updates), state

    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]


def main(steps=2000, out="06_verify.png"):
    """Print three verdicts and a table of solvers, save a picture; return the verdicts."""
    problem = hg.BilevelProblem(train_loss, valid_loss)
    log_decay = jnp.array(-3.0)
    solved, early = (hg.BilevelParams(solve(log_decay, count), log_decay) for count in (steps, 20))
    check, verdicts = hg.diagnostics.check_hypergrad, {}
    for name, variables in {"at the solution": solved, "after 20 steps": early}.items():
        found = check(hg.implicit(problem), variables, train, valid, key=None)
        print(f"--- {name}\n{found}\n")
        verdicts[name] = found.verdict
    try:  # a hyperparameter whose derivative is cut off is refused, with the leaf's name
        check(hg.implicit(hg.BilevelProblem(buggy_loss, valid_loss)), solved, train, valid, key=None)
    except ValueError as error:
        verdicts["with the bug"] = str(error)
        print(f"--- with a stop_gradient in the loss\n{error}\n")

    # The validation loss along the decay, every time with new weights, and the tangent that hypergrad computes.
    value = jax.jit(lambda log_decay: valid_loss(solve(log_decay, steps), log_decay, valid, None))
    (at, slope), _ = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(100)))(*solved, train, valid, key=None)
    along = np.linspace(-6.0, 0.0, 13)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(along, [value(jnp.asarray(a)) for a in along], "o-", label="trained again for each decay")
    axes.plot(along, at + slope * (along - log_decay), "--", label="tangent by hypergrad")
    axes.set(xlabel="log decay", ylabel="validation loss", ylim=(0.0, None))
    axes.legend()
    figure.savefig(out, dpi=120)
    return verdicts


if __name__ == "__main__":
    main()
