"""Save a run with Orbax, and go on with it: the resumed run equals one that was never stopped, bit by bit.

python examples/frameworks/resume.py      # 10 seconds on two cores
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import hypergrad as hg

x, y = jax.random.normal(jax.random.key(0), (64, 8)), jnp.arange(64) % 3
train, valid = (x[:32], y[:32]), (x[32:], y[32:])


def cross_entropy(params, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(batch[0] @ params["w"], batch[1]).mean()


def train_loss(params, log_decay, batch, key):
    return cross_entropy(params, batch) + hg.penalties.l2(params, jax.tree.map(jnp.exp, log_decay))


def valid_loss(params, log_decay, batch, key):
    return cross_entropy(params, batch)


tx = hg.bilevel(
    hg.implicit(hg.BilevelProblem(train_loss, valid_loss)),
    inner_optimizer=optax.adam(1e-2),
    outer_optimizer=optax.adam(1e-1),
    every=2,
)


@jax.jit
def step(run):
    variables, state = run
    updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
    return optax.apply_updates(variables, updates), state


def main(folder=None):
    """Print whether both runs agree; return both."""
    params = {"w": jnp.zeros((8, 3))}
    variables = hg.BilevelParams(params, jax.tree.map(lambda w: jnp.full_like(w, -5.0), params))
    run = variables, tx.init(variables)
    for _ in range(5):
        run = step(run)

    folder = Path(folder or tempfile.mkdtemp()) / "step_5"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, run)
        checkpointer.wait_until_finished()
        # A new process would make the same `variables` and `tx.init(variables)`, and restore into their form.
        form = jax.eval_shape(lambda: (variables, tx.init(variables)))
        restored = checkpointer.restore(folder, form)

    for _ in range(5):
        run, restored = step(run), step(restored)
    pairs = zip(jax.tree.leaves(run), jax.tree.leaves(restored), strict=True)
    print("equal after five more steps:", all(np.array_equal(a, b) for a, b in pairs))
    return run, restored


if __name__ == "__main__":
    main()
