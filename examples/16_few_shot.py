"""Few-shot learning: an initialisation from which three steps on one image per class learn five new classes.

inner:  w(λ) = three steps of SGD on five images, one per class, from λ
outer:  min_λ  mean over tasks of CE(w(λ); other images of the same classes)

MAML differentiates the steps. A line changes it: first-order MAML stops the gradient in them, Meta-SGD learns a rate per
weight too, iMAML takes a proximal term ½ρ‖w − λ‖² and differentiates its minimum, without memory for the steps.

Reference: Finn et al., arXiv 1703.03400; Li et al., arXiv 1707.09835; Rajeswaran et al., arXiv 1909.04630.
    python examples/16_few_shot.py            # glyphs that it draws itself, a minute on two cores, 16_few_shot.png
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import hypergrad as hg

WAYS, QUERIES, SIDE, STEPS, RATE, RHO = 5, 10, 14, 3, 0.1, 0.5


def network(w, x):
    x = jax.nn.relu(x @ w["in"] + w["b0"])
    return jax.nn.relu(x @ w["mid"] + w["b1"]) @ w["out"] + w["b2"]


def fresh(key):
    shapes = {"in": (SIDE**2, 64), "mid": (64, 64), "out": (64, WAYS)}
    draw = {n: jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, (n, s) in zip(jax.random.split(key, 3), shapes.items(), strict=True)}
    return draw | {"b0": jnp.zeros(64), "b1": jnp.zeros(64), "b2": jnp.zeros(WAYS)}


def task(key):  # a class is two quadratic curves; each drawing of it moves their points a little
    points, moves = jax.random.split(key)
    of_class = jax.random.uniform(points, (WAYS, 1, 2, 3, 1, 2), minval=0.1, maxval=0.9)
    p = of_class + 0.06 * jax.random.normal(moves, (WAYS, 1 + QUERIES, 2, 3, 1, 2))
    t = jnp.linspace(0.0, 1.0, 12)[:, None]
    curves = (1 - t) ** 2 * p[:, :, :, 0] + 2 * t * (1 - t) * p[:, :, :, 1] + t**2 * p[:, :, :, 2]
    pixels = (jnp.indices((SIDE, SIDE)).reshape(2, -1).T + 0.5) / SIDE
    distances = (((curves.reshape(WAYS, 1 + QUERIES, 1, -1, 2) - pixels[:, None]) ** 2).sum(-1)).min(-1)
    x, y = jnp.exp(-distances / (2 * 0.05**2)), jnp.arange(WAYS)
    return (x[:, 0], y), (x[:, 1:].reshape(-1, SIDE**2), jnp.repeat(y, QUERIES))


def loss(w, h, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(network(w, batch[0]), batch[1]).mean()


def proximal(w, h, batch, key):
    return loss(w, h, batch, key) + 0.5 * RHO * optax.tree.norm(optax.tree.sub(w, h["start"]), squared=True)


plain, near, sgd = hg.BilevelProblem(loss, loss), hg.BilevelProblem(proximal, loss), optax.sgd(RATE)
stop = optax.stateless(lambda grads, _: jax.lax.stop_gradient(grads))
METHODS = {  # each a function (weights, λ, batches of the steps) -> adapted weights, differentiable in λ
    "MAML": hg.best_response(hg.unrolled(plain), sgd),
    "first-order MAML": hg.best_response(hg.unrolled(plain), optax.chain(stop, sgd)),
    "Meta-SGD": hg.best_response(hg.unrolled(plain), lambda h: hg.optimizers.scale_by_learning_rate(h["rates"])),
    "iMAML": hg.best_response(hg.implicit(near, hg.solvers.cg(5)), sgd),
}


def adapt(method, h, support):
    steps = STEPS if method != "iMAML" else 5 * STEPS
    batches = hg.IndexedBatch(support, jnp.broadcast_to(jnp.arange(WAYS), (steps, WAYS)))
    return METHODS[method](h["start"], h, batches, key=None)


def accuracy(method, h, tasks):
    right = lambda support, query: jnp.mean(network(adapt(method, h, support), query[0]).argmax(-1) == query[1])  # noqa: E731
    return jax.vmap(right)(*tasks).mean()


def learn(method, outer_steps, batch=32):  # returns the accuracy on new classes, before and while λ is learned
    start: Any = fresh(jax.random.key(0))
    h = {"start": start, "rates": jax.tree.map(lambda w: jnp.full_like(w, RATE), start)}
    tx = optax.adam(1e-3)
    test = jax.vmap(task)(jax.random.split(jax.random.key(1), 200))

    @jax.jit
    def step(carry, key):
        h, state = carry
        tasks = jax.vmap(task)(jax.random.split(key, batch))
        outer = lambda h: jax.vmap(lambda s, q: loss(adapt(method, h, s), h, q, None))(*tasks).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(outer)(h), state, h)
        return (optax.apply_updates(h, updates), state), None

    judge, carry, curve = jax.jit(lambda h: accuracy(method, h, test)), (h, tx.init(h)), []
    for keys in jax.random.split(jax.random.key(2), (10, outer_steps // 10)):
        curve.append(float(judge(carry[0])))
        carry, _ = jax.lax.scan(step, carry, keys)
    return [*curve, float(judge(carry[0]))]


if __name__ == "__main__":
    import sys, time
    for m in METHODS:
        t=time.time(); print(m, [round(x,3) for x in learn(m, int(sys.argv[1]))], time.time()-t, flush=True)
