"""What a skipped outer step keeps, and which reason counts, by estimators that break in one chosen way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.solvers import Status

PROBLEM = hg.BilevelProblem(
    lambda w, h, b, k: 0.5 * jnp.sum((w - h) ** 2) + b, lambda w, h, b, k: 0.5 * jnp.sum((w - 1.0) ** 2)
)
START = hg.BilevelParams(jnp.zeros(2), jnp.full(2, 0.5))
GOOD = hg.SolveInfo(*(jnp.zeros((), d) for d in (jnp.int32, float, float, float, jnp.int32)))


def breaking(*, advance=1.0, state=1.0, value=1.0, hypergrad=1.0, residual=0.0, status=Status.CONVERGED):
    """Return an estimator whose parts are multiplied by what is given, on every call; its state counts the calls."""

    def estimate(seen, ctx):
        info = GOOD._replace(residual=jnp.float32(residual), status=jnp.int32(status))
        return hg.Estimate(jnp.float32(value), ctx.hyperparams * hypergrad, (seen + 10.0) * state, info)

    return hg.Estimator(
        PROBLEM, lambda ctx: (jnp.zeros(()), GOOD), estimate, advance=lambda s, ctx: (s + 1.0) * advance
    )


def call(inner_batch=0.0, calls=1, **broken):
    """Return updates and state after some calls."""
    tx = hg.bilevel(breaking(**broken), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1, momentum=0.9))
    state, update = tx.init(START), jax.jit(tx.update)
    for _ in range(calls):
        updates, state = update(None, state, START, inner_batch=jnp.float32(inner_batch), outer_batch=())
    return updates, state


NAN = jnp.nan
REASONS = [
    ({}, "NONE", 11.0),
    ({"value": NAN}, "OUTER_LOSS", 1.0),
    ({"inner_batch": NAN}, "INNER_LOSS", 1.0),
    ({"residual": 3.5}, "SOLVE", 11.0),
    ({"residual": NAN}, "NONE", 11.0),  # not measured
    ({"residual": jnp.inf}, "SOLVE", 11.0),
    ({"status": Status.DIVERGED}, "SOLVE", 11.0),
    ({"status": Status.NOT_FINITE}, "SOLVE", 11.0),
    ({"status": Status.INDEFINITE}, "NONE", 11.0),
    ({"status": Status.TRUNCATED}, "NONE", 11.0),
    ({"residual": 3.5, "state": NAN}, "SOLVE", 1.0),
    ({"hypergrad": jnp.inf}, "HYPERGRAD", 1.0),
    ({"state": jnp.inf}, "ESTIMATOR_STATE", 1.0),
    ({"advance": NAN}, "ESTIMATOR_STATE", 0.0),
    # the first reason that holds counts
    ({"value": NAN, "inner_batch": NAN, "residual": 9.0, "hypergrad": NAN}, "OUTER_LOSS", 1.0),
    ({"inner_batch": NAN, "residual": 9.0, "hypergrad": NAN}, "INNER_LOSS", 1.0),
    ({"residual": 9.0, "hypergrad": NAN, "state": NAN}, "SOLVE", 1.0),
    ({"hypergrad": NAN, "state": NAN}, "HYPERGRAD", 1.0),
]


@pytest.mark.parametrize(("broken", "reason", "kept"), REASONS, ids=lambda x: str(x) if isinstance(x, dict) else None)
def test_reasons_and_what_is_kept(broken, reason, kept):
    updates, state = call(**broken)
    assert hg.SkipReason(int(state.info.skip_reason)).name == reason
    taken = reason == "NONE"
    assert bool(state.info.skipped) == (not taken)
    assert int(state.info.num_skipped) == int(not taken)
    assert bool(jnp.any(updates.hyperparams != 0)) == taken
    np.testing.assert_array_equal(state.outer[0].trace, START.hyperparams if taken else jnp.zeros(2))
    assert float(state.estimator) == kept


def test_skips_are_counted():
    assert int(call(calls=3, value=NAN)[1].info.num_skipped) == 3


def test_a_limit_may_be_lifted():
    tx = hg.bilevel(
        breaking(residual=1e6),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
        guard=hg.guard(max_residual=jnp.inf),
    )
    _, state = tx.update(None, tx.init(START), START, inner_batch=0.0, outer_batch=())
    assert not bool(state.info.skipped)


def test_the_functional_form_keeps_its_state_by_the_same_rules():
    for broken, kept in (({}, 11.0), ({"residual": 9.0}, 11.0), ({"state": NAN}, 1.0), ({"advance": NAN}, 0.0)):
        fn = hg.value_and_hypergrad(breaking(**broken), optax.sgd(0.1))
        _, info = fn(*START, jnp.zeros(1), (), key=None)
        assert float(info.state) == kept
        assert bool(info.skipped) == bool(broken)
        assert int(info.num_skipped) == bool(broken)


def test_a_skipped_solve_warms_the_next_one():
    """Undoing it would repeat the same cold solve for ever: here two solves of 3 products reach what one does not."""
    scales = jnp.geomspace(1.0, 20.0, 20)
    problem = hg.BilevelProblem(
        lambda w, h, b, k: 0.5 * jnp.sum(scales * w**2) - jnp.sum(h * w), lambda w, h, b, k: jnp.sum(w)
    )
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.cg(3, warm_start=True)),
        inner_optimizer=optax.sgd(0.0),
        outer_optimizer=optax.sgd(0.1),
        guard=hg.guard(max_residual=0.1),
    )
    variables, update = hg.BilevelParams(jnp.ones(20), jnp.zeros(20)), jax.jit(tx.update)
    state, reasons, residuals = tx.init(variables), [], []
    for _ in range(12):
        _, state = update(None, state, variables, inner_batch=(), outer_batch=())
        reasons.append(hg.SkipReason(int(state.info.skip_reason)).name)
        residuals.append(float(state.info.solver.residual))
    assert reasons[0] == "SOLVE"
    assert reasons[-1] == "NONE"
    assert residuals[-1] < residuals[0]


def test_an_info_of_another_form_is_refused_by_leaf():
    base = breaking()
    other = base._replace(estimate=lambda s, ctx: base.estimate(s, ctx)._replace(info={"rate": jnp.zeros(())}))
    tx = hg.bilevel(other, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"structure of the blank info of its init, the estimator's info leaf \.num_products"
    ):
        tx.update(None, tx.init(START), START, inner_batch=0.0, outer_batch=())


def test_a_state_of_another_form_is_refused_by_leaf():
    grown = breaking()._replace(advance=lambda s, ctx: jnp.zeros(2))
    tx = hg.bilevel(grown, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"the estimator's state after train and advance of shape \(\); got"):
        tx.update(None, tx.init(START), START, inner_batch=0.0, outer_batch=())
