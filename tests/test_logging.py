"""Numbers for a logger, and the progress bar."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import ridge


def run(steps=5, **options):
    example = ridge()
    tx = hg.bilevel(
        hg.implicit(example.problem, hg.solvers.cg(5)),
        inner_optimizer=optax.sgd(0.1),
        outer_optimizer=optax.sgd(0.1),
        every=2,
        **options,
    )
    variables = example.variables
    state = tx.init(variables)
    batches = {"inner_batch": example.inner_batch, "outer_batch": example.outer_batch}
    for _ in range(steps):
        updates, state = tx.update(None, state, variables, **batches)
        variables = optax.apply_updates(variables, updates)
        yield state


def test_scalars_are_the_figures_of_the_info():
    first, *_, last = run()
    assert hg.diagnostics.scalars(first) == {}
    found = hg.diagnostics.scalars(last)
    assert found == hg.diagnostics.scalars(last.info)
    assert all(type(value) is float for value in found.values())
    assert found["step"] == 4.0
    assert found["outer_loss"] == float(last.info.outer_loss)
    assert found["solver/residual"] == float(last.info.solver.residual)
    assert found["num_skipped"] == 0.0
    assert set(found) == {
        *("step", "outer_loss", "inner_loss", "hypergrad_norm", "skip_reason", "num_skipped"),
        *(f"solver/{name}" for name in hg.SolveInfo._fields),
    }


def test_what_is_not_known_is_left_out():
    example = ridge()
    fn = hg.value_and_hypergrad(hg.implicit(example.problem, hg.solvers.identity()))
    _, info = fn(*example.variables, example.inner_batch, example.outer_batch, key=None)
    found = hg.diagnostics.scalars(info)
    assert "inner_loss" not in found  # functional calls do not know it
    assert "solver/residual" not in found  # identity() measures none
    two = hg.diagnostics.scalars(info._replace(method=(info.method, info.method)))
    assert two["solver/1/status"] == two["solver/0/status"]


def minimized(**options):
    example = ridge()
    batches = example.inner_batch, example.outer_batch
    return hg.minimize(example.problem, example.variables, *batches, max_steps=3, tol=0.0, **options)


def test_a_result_of_minimize_is_its_last_step():
    stream, seen = io.StringIO(), []
    with hg.diagnostics.progress(3, file=stream, ncols=200, mininterval=0) as show:
        result = minimized(callback=lambda result: (show(result), seen.append(hg.diagnostics.scalars(result))))
    assert "3/3" in stream.getvalue()
    assert "outer loss=" in stream.getvalue()
    assert "residual=" in stream.getvalue()
    assert [found["step"] for found in seen] == [0.0, 1.0, 2.0]
    history = result.history
    assert seen[1]["outer_loss"] == float(history.outer_loss[1])
    assert seen[-1]["num_gradients"] == float(history.num_gradients.sum())
    assert seen[-1] == hg.diagnostics.scalars(result)
    assert set(seen[-1]) == {"step", "status", *history._fields} - {"error_bound"}


def test_results_of_several_problems_are_refused():
    both = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), minimized())  # as vmap stacks them
    with pytest.raises(ValueError, match="the result of one problem"):
        hg.diagnostics.scalars(both)


def test_scalars_refuse_what_is_no_info():
    with pytest.raises(TypeError, match="a HypergradInfo"):
        hg.diagnostics.scalars({"outer_loss": 1.0})
    *_, last = run(2)
    with pytest.raises(TypeError, match="traced values"):
        jax.jit(lambda info: hg.diagnostics.scalars(info)["outer_loss"])(last.info)


def test_the_bar_shows_loss_residual_skips_and_pace():
    stream = io.StringIO()
    with hg.diagnostics.progress(5, file=stream, ncols=200, mininterval=0) as show:
        for state in run():
            show(state)
    text = stream.getvalue()
    assert "5/5" in text
    assert "outer loss=" in text
    assert "residual=" in text
    assert "s per outer step=" in text
    assert "skipped" not in text


def test_the_bar_names_the_reason_of_a_skip():
    stream = io.StringIO()
    *_, last = run(2)
    info = last.info._replace(
        outer_loss=jnp.array(np.nan), skip_reason=jnp.array(1, jnp.int32), num_skipped=jnp.array(3, jnp.int32)
    )
    with hg.diagnostics.progress(4, file=stream, ncols=200, mininterval=0) as show:
        show(info, advance=4)
    assert "skipped=3 (OUTER_LOSS)" in stream.getvalue()
    assert "outer loss=nan" in stream.getvalue()
