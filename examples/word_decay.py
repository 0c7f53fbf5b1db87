"""Learn one weight decay per word, such that they hold when the weights are trained again.

    w*(c) = argmin_w  CE(w; train) + ½ Σⱼ cⱼ ‖wⱼ‖²          softmax regression on word counts, one decay per word
    min_λ  CE(w*(c); valid) − log p(λ) / N                   log cⱼ = λ of the word's band + λ of the word

Words differ: common ones mean little, rarer ones a lot. Eight bands of frequency learn that. A prior, λ of a word
~ N(0, 0.5²), keeps 400 more numbers from fitting the noise of 300 validation documents. The weights are trained to a
minimum for every c, so that the decays, not the weights, carry what was learned. A third split says where to stop.

    python examples/word_decay.py           documents drawn by Zipf's law; ``experiments/text_decay.py`` has real ones
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hypergrad as hg

WORDS, CLASSES = 400, 5
BAND = jnp.repeat(jnp.arange(8), WORDS // 8)  # of each word: the fifty most frequent, the next fifty, …


class Documents(NamedTuple):
    """Word counts scaled to length 1 (n, words), and classes (n,)."""

    x: jax.Array
    y: jax.Array


def draw(rng: np.random.Generator, favours: np.ndarray, count: int) -> Documents:
    """Return documents in which the rarer words favour a class each."""
    y = rng.integers(0, CLASSES, count)
    rate = np.where(favours == np.arange(CLASSES)[:, None], 3.0, 1.0) * 8.0 / np.arange(1, WORDS + 1)
    counts = rng.poisson(rate[y])
    return Documents(jnp.asarray(counts / np.maximum(np.linalg.norm(counts, axis=1), 1)[:, None]), jnp.asarray(y))


def cross_entropy(params: Any, batch: Documents) -> jax.Array:
    """Return the mean negative log-likelihood."""
    logits = batch.x @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def train_loss(params: Any, decay: jax.Array, batch: Documents) -> jax.Array:
    """Return the training loss."""
    return cross_entropy(params, batch) + hg.penalties.l2(params, {"w": decay[:, None], "b": 1e-4})


def decays(hyperparams: Any) -> jax.Array:
    """Return the decay of each word."""
    return jnp.exp(hyperparams["band"][BAND] + hyperparams["word"])


def valid_loss(params: Any, _hyperparams: Any, batch: Documents, _key: Any) -> jax.Array:
    """Return the validation loss."""
    return cross_entropy(params, batch)


@jax.jit
def train(decay: jax.Array, batch: Documents) -> Any:
    """Return the weights that minimise the training loss, by 100 steps of L-BFGS."""
    objective = lambda params: train_loss(params, decay, batch)  # noqa: E731
    tx, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(objective)

    def step(_: int, at: Any) -> Any:
        params, state = at
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.zeros((WORDS, CLASSES)), "b": jnp.zeros(CLASSES)}
    return lax.fori_loop(0, 100, step, (params, tx.init(params)))[0]


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Print validation and test loss of the best single decay and of learned ones; return them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="outer steps")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    favours = np.where(np.arange(WORDS) < 40, -1, rng.integers(-1, CLASSES, WORDS))  # -1: no class
    fit, valid, stop, test = (draw(rng, favours, count) for count in (300, 300, 100, 5000))

    judged = Documents(*(jnp.concatenate(leaves) for leaves in zip(valid, stop, strict=True)))
    grid = jnp.geomspace(1e-5, 1e-1, 13)
    single = min((jnp.full(WORDS, c) for c in grid), key=lambda c: float(cross_entropy(train(c, fit), judged)))

    problem = hg.BilevelProblem(lambda params, h, batch, _: train_loss(params, decays(h), batch), valid_loss)
    prior = hg.priors.normal(0.0, 0.5)
    problem = hg.with_prior(problem, lambda h: prior(h["word"]), num_examples=len(valid.y))
    hypergradient = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(100, rtol=1e-3, warm_start=True)))
    hyperparams = {"band": jnp.full(8, jnp.log(single[0])), "word": jnp.zeros(WORDS)}
    tx, state, best, learned = optax.adam(0.1), None, np.inf, single
    outer_state = tx.init(hyperparams)
    for _ in range(args.steps):
        params = train(decays(hyperparams), fit)
        if (loss := float(cross_entropy(params, stop))) < best:
            best, learned = loss, decays(hyperparams)
        (_, grad), info = hypergradient(params, hyperparams, fit, valid, key=None, state=state)
        updates, outer_state = tx.update(grad, outer_state)
        hyperparams, state = optax.apply_updates(hyperparams, updates), info.state

    both = Documents(*(jnp.concatenate(leaves) for leaves in zip(fit, judged, strict=True)))
    share = len(fit.y) / len(both.y)  # more documents need less decay
    rows: dict[str, list[float]] = {}
    print(f"{'':16}{'valid loss':>12}{'test loss':>12}{'test loss, trained on all splits':>36}")
    for name, decay in {"one decay": single, "learned decays": learned}.items():
        alone, together = train(decay, fit), train(decay * share, both)
        losses = cross_entropy(alone, valid), cross_entropy(alone, test), cross_entropy(together, test)
        rows[name] = [float(loss) for loss in losses]
        print(f"{name:16}{rows[name][0]:12.3f}{rows[name][1]:12.3f}{rows[name][2]:36.3f}")
    return rows


if __name__ == "__main__":
    main()
