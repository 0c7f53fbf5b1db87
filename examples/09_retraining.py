"""One weight decay per word, such that the decays hold when the weights are trained again.

    w*(c) = argmin_w  CE(w; train) + ½ Σⱼ cⱼ ‖wⱼ‖²           softmax regression on word counts, one decay per word
    min_λ  CE(w*(c); valid) − log p(λ) / N                    log cⱼ = λ of the word's band + λ of the word

Each of eight bands of word frequency has a λ, and so has each word, with the prior N(0, 0.5²). For each c the weights
are trained to a minimum, so that the decays hold what was learned. A third split says where to stop.

    python examples/09_retraining.py          # documents drawn by Zipf's law, 40 seconds, 09_retraining.png
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg

WORDS, CLASSES = 400, 5
BAND = jnp.repeat(jnp.arange(8), WORDS // 8)  # the 50 most frequent words, the next 50, …


def draw(rng, favours, count):  # word counts of length 1, and classes: rarer words favour a class each
    y = rng.integers(0, CLASSES, count)
    rate = np.where(favours == np.arange(CLASSES)[:, None], 3.0, 1.0) * 8.0 / np.arange(1, WORDS + 1)
    counts = rng.poisson(rate[y])
    return jnp.asarray(counts / np.maximum(np.linalg.norm(counts, axis=1), 1)[:, None]), jnp.asarray(y)


def cross_entropy(params, batch):
    logits = batch[0] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def decays(hyperparams):
    return jnp.exp(hyperparams["band"][BAND] + hyperparams["word"])


def penalized_loss(params, decay, batch):
    return cross_entropy(params, batch) + hg.penalties.l2(params, {"w": decay[:, None], "b": 1e-4})


@jax.jit
def train(decay, batch):  # to the minimum of the penalised loss, by 100 steps of L-BFGS
    loss = lambda params: penalized_loss(params, decay, batch)  # noqa: E731
    tx, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(_, at):
        value, grad = value_and_grad(at[0], state=at[1])
        updates, state = tx.update(grad, at[1], at[0], value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(at[0], updates), state

    params = {"w": jnp.zeros((WORDS, CLASSES)), "b": jnp.zeros(CLASSES)}
    return jax.lax.fori_loop(0, 100, step, (params, tx.init(params)))[0]


def main(steps=30, out="09_retraining.png"):  # prints and returns the losses, saves a picture
    rng = np.random.default_rng(0)
    favours = np.where(np.arange(WORDS) < 40, -1, rng.integers(-1, CLASSES, WORDS))  # -1: no class
    fit, valid, stop, test = (draw(rng, favours, count) for count in (300, 300, 100, 5000))
    judged, both = (jax.tree.map(lambda *a: jnp.concatenate(a), *s) for s in ((valid, stop), (fit, valid, stop)))
    grid = (jnp.full(WORDS, c) for c in jnp.geomspace(1e-5, 1e-1, 13))
    single = min(grid, key=lambda decay: float(cross_entropy(train(decay, fit), judged)))

    problem = hg.BilevelProblem(
        lambda params, h, batch, key: penalized_loss(params, decays(h), batch),
        lambda params, h, batch, key: cross_entropy(params, batch),
    )
    prior = hg.priors.normal(0.0, 0.5)
    problem = hg.with_prior(problem, lambda h: prior(h["word"]), num_examples=300)
    hypergrad_fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(100, rtol=1e-3, warm_start=True)))
    hyperparams = {"band": jnp.full(8, jnp.log(single[0])), "word": jnp.zeros(WORDS)}
    tx, state, best, learned = optax.adam(0.1), None, np.inf, single
    outer_state = tx.init(hyperparams)
    for _ in range(steps):
        params = train(decays(hyperparams), fit)
        if (loss := float(cross_entropy(params, stop))) < best:
            best, learned = loss, decays(hyperparams)
        (_, grad), info = hypergrad_fn(params, hyperparams, fit, valid, key=None, state=state)
        updates, outer_state = tx.update(grad, outer_state)
        hyperparams, state = optax.apply_updates(hyperparams, updates), info.state

    rows = {}
    for name, decay in {"one decay": single, "learned decays": learned}.items():
        alone, together = train(decay, fit), train(decay * len(fit[1]) / len(both[1]), both)  # more data, less decay
        rows[name] = [float(cross_entropy(*at)) for at in ((alone, valid), (alone, test), (together, test))]
        print(f"{name:15}", "valid loss {:.3f}, test loss {:.3f}, trained on all splits {:.3f}".format(*rows[name]))
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(1 + np.arange(WORDS), learned, ".", label="learned")
    axes.loglog(1 + np.arange(WORDS), single, label="best single decay")
    axes.set(xlabel="rank of the word", ylabel="weight decay")
    axes.legend()
    figure.savefig(out, dpi=120)
    return rows


if __name__ == "__main__":
    main()
