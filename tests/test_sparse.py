"""Sparse features: BCOO arrays in batches give what dense ones give."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

import hypergrad as hg
from hypergrad.data import num_examples
from tests.problems import relative_error

RNG = np.random.default_rng(0)
DENSE = (RNG.random((30, 8)) < 0.3) * RNG.normal(size=(30, 8))
Y = jnp.asarray((DENSE.sum(1) > 0).astype(np.float32))
ROWS = jnp.array([3, 1, 20, 20, 7])
forms = pytest.mark.parametrize("n_batch", [pytest.param(0, marks=pytest.mark.slow), 1])


def features(n_batch):
    """Return the features as dense and as sparse array."""
    dense = jnp.asarray(DENSE, jnp.float32)
    return dense, sparse.BCOO.fromdense(dense, n_batch=n_batch)


def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.BilevelProblem(
    lambda w, h, batch, key: error(w, batch) + hg.penalties.l2(w, jnp.exp(h)), lambda w, h, batch, key: error(w, batch)
)
AT = hg.BilevelParams(jnp.full(8, 0.1), jnp.zeros(8))


@forms
@pytest.mark.parametrize("estimator", [hg.implicit(PROBLEM, hg.solvers.cg(20)), hg.sama(PROBLEM)])
def test_hypergradients(n_batch, estimator):
    dense, thin = features(n_batch)
    want, got = (hg.hypergrad(estimator)(*AT, (x, Y), (x, Y), key=None) for x in (dense, thin))
    assert relative_error(got, want) < 1e-5


@forms
def test_indexed_batches_take_rows(n_batch):
    dense, thin = features(n_batch)
    fn = hg.hypergrad(hg.implicit(PROBLEM, hg.solvers.cg(20)))
    want = fn(*AT, (dense[ROWS], Y[ROWS]), (dense, Y), key=None)
    got = fn(*AT, hg.IndexedBatch((thin, Y), ROWS), (thin, Y), key=None)
    assert relative_error(got, want) < 1e-5
    with pytest.raises(ValueError, match="common leading axis"):
        fn(*AT, hg.IndexedBatch((thin, Y[:20]), ROWS), (thin, Y), key=None)


@forms
def test_training_on_indices(n_batch):
    dense, thin = features(n_batch)
    window = jnp.asarray(RNG.integers(0, 30, (3, 10)))
    tx = hg.bilevel(
        hg.implicit(PROBLEM), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.adam(0.1), window=3, every=1
    )
    got, want = (
        tx.update(None, tx.init(AT), AT, inner_batch=hg.IndexedBatch((x, Y), window), outer_batch=(x, Y))[0]
        for x in (thin, dense)
    )
    assert relative_error(got, want) < 1e-4


@pytest.mark.slow
@forms
def test_minimize_and_cross_validation(n_batch):
    dense, thin = features(n_batch)
    found, want = (hg.minimize(PROBLEM, AT, (x, Y), (x, Y), max_steps=5) for x in (thin, dense))
    assert relative_error(found.hyperparams, want.hyperparams) < 1e-3
    rows = np.arange(30)
    folds = hg.cross_validation(PROBLEM, [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)])
    start = hg.BilevelParams(jnp.zeros((3, 8)), jnp.zeros(8))
    found, want = (hg.minimize(folds, start, (x, Y), (x, Y), max_steps=4) for x in (thin, dense))
    assert relative_error(found.hyperparams, want.hyperparams) < 1e-2


def test_a_sparse_batch_tells_its_number_of_examples():
    _, thin = features(0)
    assert thin.nse > 30  # more entries than rows
    assert num_examples((thin, Y)) == (False, 30)
    assert num_examples(hg.IndexedBatch((thin, Y), ROWS)) == (True, 30)
