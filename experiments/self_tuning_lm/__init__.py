"""Tune seven regularisers of an LSTM language model online, in the one run that trains it, by Δ-STN.

    inner:     min_w  CE + α mean h² + β mean (h_{t+1} − h_t)²  under five kinds of dropout with rates in λ; Adam
    response:  how outputs answer to λ, learned from one perturbed λ + σε an example
    outer:     min_λ  CE(w(λ); validation text), without noise; one gradient through the response; Adam

Rates of dropout on the input, between layers, on the output, of word types, and of recurrent weights; α and β. Nothing
differentiates through a mask, and no run is repeated. The table also has the same model with the first hyperparameters
held fixed, and with the learned ones held fixed from scratch, for the same number of gradients.

    HYPERGRAD_DATA=... python -m experiments.self_tuning_lm        # War and Peace; without it, a few thousand words

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Bae & Grosse, Delta-STN, arXiv 2010.13514.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from experiments.common import progress
from experiments.self_tuning_lm import model as lm
from experiments.self_tuning_lm import run

TUNED, START, LEARNED = "self-tuned", "fixed at the start", "fixed at the learned end"


class Settings(NamedTuple):
    """For minutes on two cores. Warm-up, first strengths and σ's bound were chosen by hand, on the validation text."""

    steps: int = 1500
    words: int = 30_000
    vocabulary: int = 1000
    width: int = 64
    batch: int = 32
    inner_rate: float = 3e-3
    response_rate: float = 1e-2
    outer_rate: float = 3e-2
    every: int = 4  # steps an outer step, after a warm-up of a quarter of all steps
    entropy: float = 1e-3
    looks: int = 15
    seed: int = 0

    @property
    def cost(self) -> float:
        """Of a self-tuning step in gradients: weights, linearised response, and a share of two for an outer step."""
        return 2.5 + 2.0 / self.every


def inner_optimizer(rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def self_tuned(plain: hg.BilevelProblem, params: Any, text: lm.Text, settings: Settings) -> run.Method:
    """Return the method that learns weights, response, hyperparameters and perturbation scales together."""
    problem = hg.responses.self_tuning(plain, variant=hg.responses.delta_stn(), per_example=lm.PER_EXAMPLE)
    problem = hg.responses.perturbed(problem, scale=hg.responses.learned_scale(settings.entropy, low=0.5))
    rates = {"weights": settings.inner_rate, "response": settings.response_rate}
    tx = hg.bilevel(
        hg.direct(problem),
        inner_optimizer=optax.partition(
            {n: inner_optimizer(r) for n, r in rates.items()}, hg.responses.optimizer_labels
        ),
        outer_optimizer=optax.adam(settings.outer_rate),
        every=lambda n: (n > settings.steps // 4) & (n % settings.every == 0),
    )
    hyperparams = hg.unconstrain(lm.BIJECTORS, lm.START)
    perturbed = hg.responses.HyperparamsWithScale(hyperparams, jax.tree.map(jnp.zeros_like, hyperparams))  # σ = 1
    first = hg.responses.init(problem, settings.seed, params, perturbed, lm.windows(text.train, settings.batch)[0])
    variables = hg.BilevelParams(first, perturbed)

    @jax.jit
    def advance(at: Any, key: jax.Array) -> Any:
        variables, state = at
        train, valid = (lm.draw(t, settings.batch, k) for t, k in zip(text[:2], jax.random.split(key), strict=True))
        updates, state = tx.update(None, state, variables, inner_batch=train, outer_batch=valid)
        return optax.apply_updates(variables, updates), state

    def read(at: Any) -> tuple[Any, Any, Any]:
        return hg.responses.deployable_params(at[0]), problem.constrain(at[0].hyperparams), at[1].info

    return run.Method((variables, tx.init(variables)), advance, read, settings.steps, settings.cost)


def fixed(plain: hg.BilevelProblem, params: Any, text: lm.Text, settings: Settings) -> Callable[[Any], run.Method]:
    """Return ``method(values)``, which learns weights alone with these hyperparameters and as many gradients."""
    tx = inner_optimizer(settings.inner_rate)

    @jax.jit
    def advance(at: Any, key: jax.Array) -> Any:
        params, state, hyperparams = at
        batch_key, loss_key = jax.random.split(key)
        batch = lm.draw(text.train, settings.batch, batch_key)
        updates, state = tx.update(jax.grad(plain.inner_loss)(params, hyperparams, batch, loss_key), state)
        return optax.apply_updates(params, updates), state, hyperparams

    def method(values: Any) -> run.Method:
        start = params, tx.init(params), hg.unconstrain(lm.BIJECTORS, values)
        return run.Method(start, advance, lambda at: (at[0], values, None), round(settings.steps * settings.cost), 1.0)

    return method


def main(argv: Sequence[str] | None = None) -> dict[str, run.Run]:
    """Train all three, print the table, draw the picture; return the runs by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("steps", "self-tuning steps; the others take as many more as they are cheaper"),
        ("words", "length of the training text"),
        ("vocabulary", "word types"),
        ("width", "of the embedding and both LSTM layers"),
        ("batch", "windows in a batch"),
        ("looks", "validation passes a run"),
        ("seed", "of everything random"),
    ):
        parser.add_argument(f"--{name}", type=int, default=Settings._field_defaults[name], help=what)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for self_tuning_lm.png")
    progress.add_argument(parser)
    args = vars(parser.parse_args(argv))
    out, log = args.pop("out"), args.pop("log")
    settings = Settings(**args)

    text = lm.load(settings.words, settings.vocabulary)
    model = lm.Model(text.vocabulary, settings.width)
    plain = lm.make_problem(model)
    params = jax.jit(model.init)(jax.random.key(settings.seed), text.train[None, : lm.LENGTH])["params"]
    evaluate = run.evaluator(plain, text, 8 * settings.batch)
    tuned, with_fixed = self_tuned(plain, params, text, settings), fixed(plain, params, text, settings)
    total = settings.steps + 2 * round(settings.steps * settings.cost)
    with progress.progress(total, log=log) as shown:
        rest = evaluate, settings.looks, settings.seed, shown
        runs = {TUNED: run.fit(TUNED, tuned, *rest)}
        for name, values in ((START, lm.START), (LEARNED, runs[TUNED].history[-1])):
            runs[name] = run.fit(name, with_fixed(values), *rest)

    picture, title = out / "self_tuning_lm.png", f"seven regularisers of an LSTM, tuned while it trains ({text.name})"
    run.draw(runs, runs[TUNED], title, picture)
    print(f"\n{run.table(runs)}\n\n{run.strengths(runs)}\n\npicture: {picture}")
    return runs
