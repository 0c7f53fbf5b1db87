"""Few-shot learning: meta-gradients against plain JAX, closed forms and differences, memory, and the experiment."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from experiments import few_shot

STEPS, RATE = 3, 0.3


def loss(w, h, batch, key):
    out = jnp.tanh(batch[0] @ w["in"] + w["shift"]) @ w["out"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


def setting(hidden=4, inputs=6, examples=5):
    keys = jax.random.split(jax.random.key(0), 5)
    start = {
        "in": jax.random.normal(keys[0], (inputs, hidden)),
        "out": jax.random.normal(keys[1], (hidden, 5)),
        "shift": jax.random.normal(keys[2], (hidden,)),
    }
    rates = jax.tree.map(lambda w: RATE * jnp.linspace(0.5, 1.5, w.size).reshape(w.shape), start)
    batches = [(jax.random.normal(key, (examples, inputs)), jnp.arange(examples) % 5) for key in keys[3:]]
    return {"start": start, "rates": rates}, *batches


def outer(row, support, query, steps=STEPS):
    return lambda h: loss(few_shot.adapted(row, h, support, steps), None, query, None)


def by_hand(support, query, *, learned=False, stopped=False):
    def fn(h):
        w = h["start"]
        for _ in range(STEPS):
            grads = jax.grad(loss)(w, None, support, None)
            grads = jax.lax.stop_gradient(grads) if stopped else grads
            rates = h["rates"] if learned else jax.tree.map(lambda w: RATE, w)
            w = jax.tree.map(lambda w, r, g: w - r * g, w, rates, grads)
        return loss(w, None, query, None)

    return fn


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options"),
    [("MAML", {}), ("first-order MAML", {"stopped": True}), ("Meta-SGD", {"learned": True})],
)
def test_the_meta_gradient_is_that_of_steps_written_by_hand(name, options):
    h, support, query = setting()
    fn = outer(few_shot.methods(loss, RATE, STEPS)[name], support, query)
    value, found = jax.value_and_grad(fn)(h)
    expected_value, expected = jax.value_and_grad(by_hand(support, query, **options))(h)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert (optax.tree.norm(found["rates"]) > 0.01) == (name == "Meta-SGD")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "part"),
    [pytest.param("MAML", "start", marks=pytest.mark.slow), ("Meta-SGD", "start"), ("Meta-SGD", "rates")],
)
def test_the_meta_gradient_is_that_of_finite_differences(name, part):
    h, support, query = setting()
    fn = jax.jit(outer(few_shot.methods(loss, RATE, STEPS)[name], support, query))
    keys = jax.random.split(jax.random.key(1), 3)
    along = {n: jax.random.normal(k, w.shape) for k, (n, w) in zip(keys, h[part].items(), strict=True)}
    moved = lambda by: fn(h | {part: jax.tree.map(lambda w, v: w + by * v, h[part], along)})  # noqa: E731
    slope = optax.tree.vdot(jax.grad(fn)(h)[part], along)
    assert abs(slope) > 1e-3
    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(float(slope), rel=1e-7)


@pytest.mark.usefixtures("x64")
def test_the_second_derivatives_of_maml_count():
    h, support, query = setting()
    rows = few_shot.methods(loss, RATE, STEPS)
    exact, first = (jax.grad(outer(rows[n], support, query))(h)["start"] for n in ("MAML", "first-order MAML"))
    assert optax.tree.norm(optax.tree.sub(exact, first)) > 0.05 * optax.tree.norm(exact)


@pytest.mark.usefixtures("x64")
def test_imaml_on_a_quadratic_task_is_the_closed_form():
    rho, n = 2.0, 4
    root = jax.random.normal(jax.random.key(0), (n, n))
    a, centre, target = root @ root.T / n, jnp.arange(4.0), jnp.ones(n)
    start = {"w": jnp.linspace(-1.0, 1.0, n)}

    def quadratic(w, h, batch, key):
        return 0.5 * (w["w"] - centre) @ a @ (w["w"] - centre)

    row = few_shot.methods(quadratic, RATE, STEPS, rho)["iMAML"]
    inverse = jnp.linalg.inv(a + rho * jnp.eye(n))
    solved = inverse @ (a @ centre + rho * start["w"])

    def value(h):  # the steps begin at the minimum, and stay there
        found = row.adapt({"w": solved}, h, hg.IndexedBatch((), jnp.zeros((16, 1), int)), key=None)["w"]
        return 0.5 * jnp.sum((found - target) ** 2)

    found = jax.grad(value)({"start": start})["start"]["w"]
    np.testing.assert_allclose(found, rho * inverse @ (solved - target), rtol=1e-5)


def memory(name, steps):
    h, support, query = setting(hidden=64, inputs=64, examples=25)
    fn = jax.jit(jax.grad(outer(few_shot.methods(loss, RATE, STEPS)[name], support, query, steps)))
    return fn.lower(h).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_the_memory_of_imaml_is_flat_in_the_inner_steps_and_that_of_maml_grows():
    implicit, unrolled = ([memory(name, steps) for steps in (5, 20, 80)] for name in ("iMAML", "MAML"))
    assert max(implicit) <= 1.01 * min(implicit), implicit
    assert min(unrolled[1:]) > 2 * unrolled[0], unrolled  # from 50 steps on, a checkpoint is kept every √K steps


def test_tasks_have_distinct_classes_and_drawings():
    images = jnp.asarray(np.arange(12 * 7, dtype=np.uint8).reshape(12, 7, 1, 1))
    (x, y), (at, of) = few_shot.draw_tasks(images, 5, 2, 3, jax.random.key(0), 50)
    assert x.shape == (50, 10, 1, 1)
    assert at.shape == (50, 15, 1, 1)
    for task in range(50):
        numbers = np.round(255 * np.concatenate([x[task], at[task]])).astype(int).ravel()
        labels = np.concatenate([y[task], of[task]])
        assert len(set(numbers)) == 25
        assert all(len(set(numbers[labels == label] // 7)) == 1 for label in range(5))
        assert len({numbers[labels == label][0] // 7 for label in range(5)}) == 5


def test_the_nearest_neighbour_is_that_of_all_pairs():
    images = jnp.asarray(few_shot.strokes(0, 8, 6))
    (x, y), (at, of) = tasks = few_shot.draw_tasks(images, 3, 2, 2, jax.random.key(0), 4)
    found = few_shot.nearest(tasks)
    for task in range(4):
        right = 0
        for image, label in zip(np.asarray(at[task]), np.asarray(of[task]), strict=True):
            distances = [np.sum((image - other) ** 2) for other in np.asarray(x[task])]
            right += int(y[task][int(np.argmin(distances))] == label)
        assert found[task] == pytest.approx(right / len(of[task]))


@pytest.mark.slow
def test_few_shot(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    record = few_shot.main(["--quick", "--out", str(tmp_path)])
    assert record["data"] == "random strokes"
    assert set(record["rows"]) == {"MAML", "first-order MAML", "Meta-SGD", "iMAML"}
    for (run,) in record["rows"].values():
        assert run["steps"] >= 1
        assert 0 <= run["accuracy"] <= 1
        assert math.isfinite(run["seconds"])
    assert 0.3 < record["nearest"] < 1
    assert json.loads((tmp_path / "few_shot.json").read_text())["ways"] == 5
    assert "| MAML |" in (tmp_path / "few_shot.md").read_text()
    assert (tmp_path / "few_shot.png").stat().st_size > 10_000
    assert "nearest neighbour" in capsys.readouterr().out
