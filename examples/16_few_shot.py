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

WAYS, DRAWINGS, SIDE, STEPS, RATE, RHO = 5, 12, 14, 3, 0.1, 0.5


def glyphs(key, classes):  # a class is two quadratic curves; each drawing moves their points a little
    points, moves = jax.random.split(key)
    p = jax.random.uniform(points, (classes, 1, 2, 3, 1, 2), minval=0.1, maxval=0.9)
    p = p + 0.06 * jax.random.normal(moves, (classes, DRAWINGS, 2, 3, 1, 2))
    t = jnp.linspace(0.0, 1.0, 12)[:, None]
    curves = (1 - t) ** 2 * p[:, :, :, 0] + 2 * t * (1 - t) * p[:, :, :, 1] + t**2 * p[:, :, :, 2]
    pixels = (jnp.indices((SIDE, SIDE)).reshape(2, -1).T[:, None] + 0.5) / SIDE
    draw = lambda curve: jnp.exp(-((pixels - curve) ** 2).sum(-1).min(-1) / 0.005)  # noqa: E731
    return jax.lax.map(draw, curves.reshape(-1, 24, 2), batch_size=200).reshape(classes, DRAWINGS, -1)


def tasks(images, key, count):  # support: one drawing per class; query: the others
    def one(key):
        x, y = jax.random.permutation(key, images)[:WAYS], jnp.arange(WAYS)
        return (x[:, 0], y), (x[:, 1:].reshape(-1, SIDE**2), jnp.repeat(y, DRAWINGS - 1))

    return jax.vmap(one)(jax.random.split(key, count))


def network(w, x):
    x = jax.nn.relu(x @ w["in"] + w["b0"])
    return jax.nn.relu(x @ w["mid"] + w["b1"]) @ w["out"] + w["b2"]


def fresh(key):
    keys, sizes = jax.random.split(key, 3), ((SIDE**2, 64), (64, 64), (64, WAYS))
    into, mid, out = (jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(keys, sizes, strict=True))
    return {"in": into, "mid": mid, "out": out, "b0": jnp.zeros(64), "b1": jnp.zeros(64), "b2": jnp.zeros(WAYS)}


def loss(w, h, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(network(w, batch[0]), batch[1]).mean()


def proximal(w, h, batch, key):
    return loss(w, h, batch, key) + 0.5 * RHO * optax.tree.norm(optax.tree.sub(w, h["start"]), squared=True)


def first_order(adapt):  # the steps count as constants: the adapted weights move along with λ
    along = lambda w, moved: w + jax.lax.stop_gradient(moved - w)  # noqa: E731
    return lambda w, *args, **kwargs: jax.tree.map(along, w, adapt(w, *args, **kwargs))


plain, near, sgd = hg.BilevelProblem(loss, loss), hg.BilevelProblem(proximal, loss), optax.sgd(RATE)
METHODS = {  # each a function (weights, λ, batches of the steps) -> adapted weights, and its number of steps
    "MAML": (hg.best_response(hg.unrolled(plain), sgd), STEPS),
    "first-order MAML": (first_order(hg.best_response(hg.unrolled(plain), sgd)), STEPS),
    "Meta-SGD": (
        hg.best_response(hg.unrolled(plain), lambda h: hg.optimizers.scale_by_learning_rate(h["rates"])),
        STEPS,
    ),
    "iMAML": (hg.best_response(hg.implicit(near, hg.solvers.cg(5)), sgd), 5 * STEPS),
}


def adapted(method, h, support):
    adapt, steps = METHODS[method]
    batches = hg.IndexedBatch(support, jnp.broadcast_to(jnp.arange(WAYS), (steps, WAYS)))
    return adapt(h["start"], h, batches, key=None)


def learn(method, train, test, looks, outer_steps):  # to the accuracy on new classes, before and while λ is learned
    start: Any = fresh(jax.random.key(0))
    h, tx = {"start": start, "rates": jax.tree.map(lambda w: jnp.full_like(w, RATE), start)}, optax.adam(1e-3)
    of_test = tasks(test, jax.random.key(1), 200)

    def step(carry, key):
        h, state = carry
        task_loss = lambda h, support, query: loss(adapted(method, h, support), h, query, None)  # noqa: E731
        of_train = tasks(train, key, 16)
        grads = jax.grad(lambda h: jax.vmap(task_loss, (None, 0, 0))(h, *of_train).mean())(h)
        updates, state = tx.update(grads, state, h)
        return (optax.apply_updates(h, updates), state), None

    @jax.jit
    def accuracy(h):
        right = lambda s, q: jnp.mean(network(adapted(method, h, s), q[0]).argmax(1) == q[1])  # noqa: E731
        return jax.vmap(right)(*of_test).mean()

    carry, curve, steps = (h, tx.init(h)), [float(accuracy(h))], jax.jit(lambda c, keys: jax.lax.scan(step, c, keys)[0])
    for keys in jax.random.split(jax.random.key(2), (looks, outer_steps)):
        carry = steps(carry, keys)
        curve.append(float(accuracy(carry[0])))
    return curve


def main(looks=12, outer_steps=50, classes=300, out="16_few_shot.png"):
    """Print accuracies on new classes, save a picture; return the accuracies."""
    train, test = glyphs(jax.random.key(3), classes), glyphs(jax.random.key(4), 100)
    curves = {method: learn(method, train, test, looks, outer_steps) for method in METHODS}
    print(f"three steps from random weights: {curves['MAML'][0]:.3f} of the images of new classes are right")
    for method, curve in curves.items():
        print(f"from weights learned by {method}: {curve[-1]:.3f}")
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    shown = test[:WAYS, :4].reshape(WAYS, 4, SIDE, SIDE).transpose(0, 2, 1, 3).reshape(WAYS * SIDE, 4 * SIDE)
    left.imshow(1 - shown, cmap="gray")
    left.set(title="four drawings of five classes", xticks=[], yticks=[])
    for method, curve in curves.items():
        right.plot([look * outer_steps for look in range(looks + 1)], curve, label=method)
    right.set(xlabel="outer steps", ylabel="accuracy on new classes")
    right.legend(frameon=False)
    figure.savefig(out, dpi=100)
    return {"random weights": curves["MAML"][0]} | {method: curve[-1] for method, curve in curves.items()}


if __name__ == "__main__":
    main()
