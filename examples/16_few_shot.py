"""Few-shot learning: an initialisation from which three steps on one image per class learn five new classes.

inner:  w(λ) = three steps of SGD on five images, one per class, from λ
outer:  min_λ  mean over tasks of CE(w(λ); other images of the same classes)
MAML (arXiv 1703.03400) differentiates the steps. First-order MAML takes them as constants. Meta-SGD (arXiv 1707.09835)
also learns one rate per weight. iMAML (arXiv 1909.04630) differentiates the minimum of CE + ½ρ‖w − λ‖².
python examples/16_few_shot.py            # glyphs of random strokes, a minute on two cores, 16_few_shot.png
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import hypergrad as hg

WAYS, DRAWINGS, SIDE, RATE, RHO = 5, 12, 14, 0.1, 2.0
model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(WAYS)])
apply = jax.jit(model.apply)


def glyphs(key, classes):  # a class is two quadratic curves; each drawing moves their points a little
    keys, t = jax.random.split(key), jnp.linspace(0.0, 1.0, 12)[:, None]
    points = jax.random.uniform(keys[0], (classes, 1, 2, 3, 2), minval=0.1, maxval=0.9)
    points += 0.06 * jax.random.normal(keys[1], (classes, DRAWINGS, 2, 3, 2))
    curves = jnp.hstack([(1 - t) ** 2, 2 * t * (1 - t), t**2]) @ points
    pixels = (jnp.indices((SIDE, SIDE)).reshape(2, -1).T[:, None] + 0.5) / SIDE
    draw = lambda curve: jnp.exp(-((pixels - curve) ** 2).sum(-1).min(-1) / 0.005)  # noqa: E731
    return jax.lax.map(draw, curves.reshape(-1, 24, 2), batch_size=200).reshape(classes, DRAWINGS, -1)


def task(key, images):  # support: one drawing per class; query: the others
    x, y = images[jax.random.permutation(key, len(images))[:WAYS]], jnp.arange(WAYS)
    return (x[:, 0], y), (x[:, 1:].reshape(-1, SIDE**2), jnp.repeat(y, DRAWINGS - 1))


def loss(w, h, batch, key):
    return optax.losses.softmax_cross_entropy_with_integer_labels(apply({"params": w}, batch[0]), batch[1]).mean()


def proximal(w, h, batch, key):
    return loss(w, h, batch, key) + 0.5 * RHO * optax.tree.norm(optax.tree.sub(w, h["start"]), squared=True)


unrolled, implicit = hg.unrolled(hg.BilevelProblem(loss, loss)), hg.implicit(hg.BilevelProblem(proximal, loss))
maml, constant = hg.best_response(unrolled, optax.sgd(RATE)), jax.lax.stop_gradient
METHODS = {  # adapt(weights, λ, batches, key=None) -> weights, differentiable in λ; and how many steps it takes
    "MAML": (maml, 3),
    "first-order MAML": (lambda w, *a, **k: optax.tree.add(w, constant(optax.tree.sub(maml(w, *a, **k), w))), 3),
    "Meta-SGD": (hg.best_response(unrolled, lambda h: hg.optimizers.scale_by_learning_rate(h["rates"])), 3),
    "iMAML": (hg.best_response(implicit, optax.sgd(optax.cosine_decay_schedule(2 * RATE, 16))), 16),
}


def learn(name, train, test, looks, outer_steps):  # to the accuracy on new classes, before and while λ is learned
    (adapt, steps), tx = METHODS[name], optax.adam(1e-3)
    start = model.init(jax.random.key(0), train[0])["params"]
    h = {"start": start, "rates": jax.tree.map(lambda w: jnp.full_like(w, RATE), start)}

    def after(h, images, keys):  # mean loss and accuracy on query images, after adaptation to the support images
        def of_task(key):
            support, (x, y) = task(key, images)
            w = adapt(h["start"], h, hg.IndexedBatch(support, jnp.tile(jnp.arange(WAYS), (steps, 1))), key=None)
            return loss(w, h, (x, y), None), jnp.mean(apply({"params": w}, x).argmax(1) == y)

        return jax.tree.map(jnp.mean, jax.vmap(of_task)(keys))

    def step(carry, key):
        grads = jax.grad(lambda h: after(h, train, jax.random.split(key, 16))[0])(carry[0])
        updates, state = tx.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    def run(carry, key):
        accuracy = after(carry[0], test, jax.random.split(jax.random.key(1), 200))[1]
        return jax.lax.scan(step, carry, jax.random.split(key, outer_steps))[0], accuracy

    return jax.lax.scan(run, (h, tx.init(h)), jax.random.split(jax.random.key(2), looks))[1]


def main(looks=11, outer_steps=50, classes=1000, out="16_few_shot.png"):
    """Print accuracies on new classes, save a picture; return the accuracies."""
    train, test = glyphs(jax.random.key(3), classes), glyphs(jax.random.key(4), 100)
    figure, found = Figure(figsize=(8, 3), layout="constrained"), {}
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for name in METHODS:
        curve = learn(name, train, test, looks, outer_steps).tolist()
        found[name] = curve[-1]
        print(f"{name}: accuracy on new classes {curve[-1]:.3f}, from random weights {curve[0]:.3f}", flush=True)
        right.plot([look * outer_steps for look in range(looks)], curve, label=name)
    left.imshow(-jnp.vstack([jnp.hstack(rows.reshape(-1, SIDE, SIDE)[:6]) for rows in test[:WAYS]]), cmap="gray")
    left.set(title="drawings of five classes", xticks=[], yticks=[])
    right.set(xlabel="outer steps", ylabel="accuracy on new classes")
    right.legend(frameon=False)
    figure.savefig(out, dpi=100)
    return found


if __name__ == "__main__":
    main()
