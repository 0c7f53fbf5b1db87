"""Few-shot learning: an initialisation from which three steps on one image per class learn five new classes.

inner:  w(λ) = three steps of SGD on five images, one per class, from λ
outer:  min_λ  mean over tasks of CE(w(λ); other images of the same classes)

MAML differentiates the steps. A line changes it: first-order MAML takes them as constants, Meta-SGD learns a rate per
weight too, iMAML differentiates the minimum of CE + ½ρ‖w − λ‖², so that its memory does not grow with the steps.

Reference: Finn et al., arXiv 1703.03400; Li et al., arXiv 1707.09835; Rajeswaran et al., arXiv 1909.04630.
python examples/16_few_shot.py            # glyphs of random strokes, a minute on two cores, 16_few_shot.png
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import hypergrad as hg

WAYS, DRAWINGS, SIDE, RATE, RHO = 5, 12, 14, 0.1, 2.0


def glyphs(key, classes):  # a class is two quadratic curves; each drawing moves their points a little
    points, moves = jax.random.split(key)
    p = jax.random.uniform(points, (classes, 1, 2, 3, 1, 2), minval=0.1, maxval=0.9)
    p = p + 0.06 * jax.random.normal(moves, (classes, DRAWINGS, 2, 3, 1, 2))
    t = jnp.linspace(0.0, 1.0, 12)[:, None]
    curves = (1 - t) ** 2 * p[:, :, :, 0] + 2 * t * (1 - t) * p[:, :, :, 1] + t**2 * p[:, :, :, 2]
    pixels = (jnp.indices((SIDE, SIDE)).reshape(2, -1).T[:, None] + 0.5) / SIDE
    draw = lambda curve: jnp.exp(-((pixels - curve) ** 2).sum(-1).min(-1) / 0.005)  # noqa: E731
    return jax.lax.map(draw, curves.reshape(-1, 24, 2), batch_size=200).reshape(classes, DRAWINGS, -1)


def task(key, images):  # support: one drawing per class; query: the others
    x, y = images[jax.random.permutation(key, len(images))[:WAYS]], jnp.arange(WAYS)
    return (x[:, 0], y), (x[:, 1:].reshape(-1, SIDE**2), jnp.repeat(y, DRAWINGS - 1))


def network(w, x):
    return jnp.tanh(jnp.tanh(x @ w["in"] + w["b0"]) @ w["mid"] + w["b1"]) @ w["out"] + w["b2"]


def loss(w, h, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(network(w, batch[0]), batch[1]).mean()


def proximal(w, h, batch, key):
    return loss(w, h, batch, key) + 0.5 * RHO * optax.tree.norm(optax.tree.sub(w, h["start"]), squared=True)


def first_order(adapt):  # the weights that the steps reach move along with λ
    along = lambda start, w: start + jax.lax.stop_gradient(w - start)  # noqa: E731
    return lambda start, *args, **kwargs: jax.tree.map(along, start, adapt(start, *args, **kwargs))


unrolled, implicit = hg.unrolled(hg.BilevelProblem(loss, loss)), hg.implicit(hg.BilevelProblem(proximal, loss))
METHODS = {  # adapt(weights, λ, batches, key=None) -> weights, differentiable in λ; and how many steps it takes
    "MAML": (hg.best_response(unrolled, optax.sgd(RATE)), 3),
    "first-order MAML": (first_order(hg.best_response(unrolled, optax.sgd(RATE))), 3),
    "Meta-SGD": (hg.best_response(unrolled, lambda h: hg.optimizers.scale_by_learning_rate(h["rates"])), 3),
    "iMAML": (hg.best_response(implicit, optax.sgd(optax.cosine_decay_schedule(2 * RATE, 16))), 16),
}


def learn(name, train, test, looks, outer_steps):  # to the accuracy on new classes, before and while λ is learned
    (adapt, steps), tx = METHODS[name], optax.adam(1e-3)
    keys, sizes = jax.random.split(jax.random.key(0), 3), {"in": (SIDE**2, 64), "mid": (64, 64), "out": (64, WAYS)}
    start: Any = {n: jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, (n, s) in zip(keys, sizes.items(), strict=True)}
    start |= {f"b{i}": jnp.zeros(size) for i, size in enumerate((64, 64, WAYS))}
    h = {"start": start, "rates": jax.tree.map(lambda w: jnp.full_like(w, RATE), start)}

    def evaluate(h, images, key):  # mean loss and accuracy after adaptation to a task's support images
        support, query = task(key, images)
        w = adapt(h["start"], h, hg.IndexedBatch(support, jnp.tile(jnp.arange(WAYS), (steps, 1))), key=None)
        return loss(w, h, query, None), jnp.mean(network(w, query[0]).argmax(1) == query[1])

    def mean(h, images, keys):
        return jax.tree.map(jnp.mean, jax.vmap(evaluate, (None, None, 0))(h, images, keys))

    @jax.jit
    def run(carry, key):
        def step(carry, key):
            grads, _ = jax.grad(mean, has_aux=True)(carry[0], train, jax.random.split(key, 16))
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        found = mean(carry[0], test, jax.random.split(jax.random.key(1), 200))[1]
        return jax.lax.scan(step, carry, jax.random.split(key, outer_steps))[0], found

    return jax.lax.scan(run, (h, tx.init(h)), jax.random.split(jax.random.key(2), looks))[1]


def main(looks=11, outer_steps=50, classes=1000, out="16_few_shot.png"):
    """Print accuracies on new classes, save a picture; return the accuracies."""
    train, test = glyphs(jax.random.key(3), classes), glyphs(jax.random.key(4), 100)
    figure = Figure(figsize=(8, 3), layout="constrained")
    found: dict[str, float] = {}
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for name in METHODS:
        curve = learn(name, train, test, looks, outer_steps).tolist()
        found |= {f"{name}, random start": curve[0], name: curve[-1]}
        print(f"{name}: accuracy on new classes {curve[-1]:.3f}, from random weights {curve[0]:.3f}", flush=True)
        right.plot([look * outer_steps for look in range(looks)], curve, label=name)
    shown = test[:WAYS, :6].reshape(WAYS, 6, SIDE, SIDE).transpose(0, 2, 1, 3)
    left.imshow(1 - shown.reshape(WAYS * SIDE, -1), cmap="gray")
    left.set(title="drawings of five classes", xticks=[], yticks=[])
    right.set(xlabel="outer steps", ylabel="accuracy on new classes")
    right.legend(frameon=False)
    figure.savefig(out, dpi=100)
    return found


if __name__ == "__main__":
    main()
